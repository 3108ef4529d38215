"""Places on disk and in object storage (gs://): names, retries, permissions and atomic writes.

Three libraries access gs://: tensorstore (records and arrays), gcsfs through etils' epath (all
other files) and google-cloud-storage (Orbax's check of the bucket, and ours below). All of them use
Google's default credentials and retry on 408, 429, 5xx and broken connections. Importing this
module sets environment variables that they read, so it must be imported before their first use.
"""

import functools
import os
import re
import sys
import unicodedata
import urllib.parse
import uuid
from typing import Annotated, Any, NamedTuple

from spectral_pod import fields
from spectral_pod.errors import ConfigError, UserError, naming

_SILENCE = 20  # seconds without data after which a connection counts as broken
_ENVIRONMENT = {
    # Where TensorFlow is installed, epath would use its file system, which is slow to import and
    # lacks the endpoint override that the tests need.
    "EPATH_USE_TF": "false",
    # Otherwise gcsfs asks by gRPC whether each bucket has a hierarchical namespace.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    # gcsfs caches listings forever and would miss what tensorstore or another process writes.
    "FSSPEC_GCS": '{"use_listings_cache": false}',
    # A silent connection becomes an error that is retried, instead of blocking forever.
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": f"{_SILENCE}",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": f"{_SILENCE}",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

_START_TIMEOUT = 60.0  # seconds within which storage must answer at start-up
_LOGIN = (
    "log in with `gcloud auth application-default login`, or point GOOGLE_APPLICATION_CREDENTIALS "
    "at the key file of a service account"
)
_READER = "roles/storage.objectViewer"
_WRITER = "roles/storage.objectUser and roles/storage.legacyBucketReader"


def is_remote(url: str) -> bool:
    """Whether a path is a URL of object storage rather than a local folder."""
    return url.startswith("gs://")


def context(*, cache_bytes: int = 0) -> dict[str, Any]:
    """The spec of a `tensorstore.Context`; its gs:// entries have no effect on local paths.

    Retries wait 0.5, 1, 2, 4 and then 8 seconds, each plus up to 0.5 s of jitter. 16 retries
    survive an outage of 100 seconds and resume within 8.5 seconds of its end; a permanent failure
    is reported after 104 to 112 seconds (with tensorstore's default of 32, after 15 minutes).

    Args:
      cache_bytes: limit on decoded chunks cached in memory; 0 disables the cache.
    """
    return {
        "cache_pool": {"total_bytes_limit": cache_bytes},
        "gcs_request_retries": {"max_retries": 16, "initial_delay": "500ms", "max_delay": "8s"},
        # A batch's random reads are issued at once: each takes about 50 ms, however small.
        "gcs_request_concurrency": {"limit": 128},
    }


def kvstore_spec(url: str) -> dict[str, Any]:
    """The spec of a `tensorstore.KvStore` of the files below a folder or a gs:// URL."""
    if is_remote(url):
        bucket, _, path = url.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
    return {"driver": "file", "path": f"{os.path.abspath(url)}/"}


def kvstore(url: str) -> Any:
    """A `tensorstore.KvStore` of the files below a folder or a gs:// URL, by relative name."""
    import tensorstore as ts

    return ts.KvStore.open(kvstore_spec(url), context=uncached()).result()


@functools.cache
def uncached() -> Any:
    """The `tensorstore.Context` for everything that is not cached in memory."""
    import tensorstore as ts

    return ts.Context(context())


def stays_inside(name: str) -> bool:
    """Whether a relative name stays inside the folder that it is joined to.

    To be asked before a name from outside, of an object for example, becomes a part of a path.
    """
    parts = name.split("/")
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def check_access(url: str, *, write: bool) -> None:
    """Checks at start-up that a folder can be used, whether or not it exists.

    Lists one object below a gs:// URL. With `write` it also reads the bucket's metadata, as Orbax
    does, and creates and deletes an empty object. Retries for up to a minute.

    Raises:
      UserError: there are no credentials, no such bucket, no permission, or no network; on disk,
        the path is or goes through a file or a broken link, or permissions are missing. The message
        says which and what to do.
    """
    if not is_remote(url):
        return _check_disk(url, write=write)
    _bound_silence()
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.retry import DEFAULT_RETRY
    from requests.exceptions import RequestException

    name, _, path = url.removeprefix("gs://").partition("/")
    limits: Any = {"retry": DEFAULT_RETRY.with_timeout(_START_TIMEOUT), "timeout": _SILENCE}
    try:
        reach = client(url, write=write)
        bucket = reach.get_bucket(name, **limits) if write else reach.bucket(name)
        list(reach.list_blobs(bucket, prefix=path, max_results=1, **limits))
        if write:
            probe = bucket.blob(f"{path.rstrip('/')}/.access-{uuid.uuid4().hex}".lstrip("/"))
            probe.upload_from_string(b"", **limits)
            probe.delete(**limits)
    except exceptions.NotFound as error:
        raise UserError(
            f"{url}: there is no bucket {name!r}; check the name, or make it with "
            f"`gcloud storage buckets create gs://{name}`"
        ) from error
    except (exceptions.Unauthorized, exceptions.Forbidden) as error:
        do, roles = ("write", _WRITER) if write else ("read", _READER)
        raise UserError(
            f"{url}: you may not {do} this bucket; have its owner grant you {roles}, or {_LOGIN} "
            f"that may ({error})"
        ) from error
    except GoogleAuthError as error:
        raise UserError(f"{url}: the credentials do not work; {_LOGIN} ({error})") from error
    except (exceptions.GoogleAPIError, RequestException) as error:
        raise UserError(
            f"{url}: storage does not answer; check the network and start again ({error})"
        ) from error


def _bound_silence() -> None:
    """Sets socket timeouts for gcsfs, so that it retries on a connection that went silent."""
    import aiohttp
    import fsspec

    limits = aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)
    fsspec.config.conf.setdefault("gcs", {})["requests_timeout"] = limits


def client(url: str, *, write: bool, project: str | None = None) -> Any:
    """A google-cloud-storage client with Google's default credentials, for access to `url`.

    Reading works without credentials. `project` defaults to that of the credentials.

    Raises:
      UserError: there are no credentials, or they name no project.
    """
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client(project) if project else storage.Client()
    except DefaultCredentialsError as error:
        if write or "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
            raise UserError(
                f"{url}: there are no Google Cloud credentials; {_LOGIN} ({error})"
            ) from error
        return storage.Client.create_anonymous_client()  # some buckets are public
    except OSError as error:  # raised by a user's own credentials
        raise UserError(
            f"{url}: the credentials name no project; set GOOGLE_CLOUD_PROJECT to yours"
        ) from error


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a failed read or write of files, for an `except` clause."""
    kinds: list[type[Exception]] = [OSError]
    for module, name in (
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("google.api_core.exceptions", "GoogleAPIError"),
    ):
        if module in sys.modules:  # a module that was never imported cannot have raised
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def files_below(folder: Any) -> list[Any]:
    """Every file below an `epath.Path`, in no order."""
    files: list[Any] = []
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            (pending if path.is_dir() else files).append(path)
    return files


def modified(file: Any) -> float:
    """The modification time of an `epath.Path`, in seconds since 1970.

    Raises:
      FileNotFoundError: the file does not exist.
    """
    if is_remote(os.fspath(file)):
        return float(file.stat().mtime or 0)
    return os.stat(file).st_mtime  # epath's fails if the owner has no user name, as in containers


def write_whole(file: Any, data: str | bytes) -> None:
    """Writes an `epath.Path` atomically: no reader, and no crash, leaves a partial file.

    When it returns the data are stored, even if the machine then loses power.
    """
    raw = data.encode() if isinstance(data, str) else data
    if is_remote(os.fspath(file)):
        with naming(file):
            file.write_bytes(raw)  # an object becomes visible when its upload is complete
        return
    temporary = file.with_name(f"{file.name}.tmp")
    with naming(file):
        with open(temporary, "wb") as writer:
            writer.write(raw)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)


def _check_disk(folder: str, *, write: bool) -> None:
    existing = folder
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing) or ("/" if existing.startswith("/") else ".")
    name = folder if existing == folder else f"{folder}: {existing}"
    if not os.path.exists(existing):
        raise UserError(
            f"{name} is a link to {os.readlink(existing)!r}, which does not exist; remove the link "
            "or restore what it points to"
        )
    if not os.path.isdir(existing):
        raise UserError(f"{name} is a file, and must be a folder; give another path")
    if not os.access(existing, os.X_OK | (os.W_OK if write else os.R_OK)):
        do = "write to" if write else "read"
        raise UserError(f"{name} is a folder that you may not {do}; change its permissions")


# ---- what users type

_LONGEST = 800  # bytes: those of objects are 1024 at most, and what is below a place needs some
_LONGEST_NAME = 255  # bytes, of a file or folder on disk
_EXAMPLES = "a path on this disk, or gs://BUCKET/FOLDER"


class Place(NamedTuple):
    """An annotation of a field (`fields.py`) whose text is a place: it refuses what `place` does.

    Attributes:
      local: whether it is on disk.
      optional: whether the text may be empty.
    """

    local: bool = False
    optional: bool = False

    def check(self, text: str, field: str) -> None:
        if text or not self.optional:
            place(text, field, root=True, local=self.local)


Folder = Annotated[str, Place()]
LocalFolder = Annotated[str, Place(local=True)]
Source = Annotated[str, Place(optional=True)]  # what to read: files, a glob, or a workdir


def place(text: Any, flag: str, *, root: bool = False, local: bool = False) -> str:
    """The path or gs:// URL that is meant by what a user typed; a place is unchanged.

    `~` is expanded, `file:///x` is `/x`, and a URL's scheme is in lower case. There is no slash at
    the end, none is doubled, and `..` is resolved: on disk as the system does it, through links.

    Args:
      text: a str or an `os.PathLike`.
      flag: the flag, field or argument that has it, for messages.
      root: whether a whole bucket may be meant.
      local: whether it must be on disk.

    Raises:
      ConfigError: the text names no place, or one that cannot be used.
    """
    if isinstance(text, os.PathLike):
        text = os.fspath(text)
    if not isinstance(text, str):
        raise ConfigError(f"{flag} is {fields.shown(text)}; it must be text: {_EXAMPLES}")

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{flag} is {fields.shown(text)}; {why}")

    if text.lower().startswith("file:"):
        text = urllib.parse.unquote(text)
    if not text.strip():
        raise wrong(f"it must not be empty; give {_EXAMPLES}")
    if any(name != name.strip() for name in text.split("/")):
        raise wrong("a name in it begins or ends with a space; take that away")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise wrong("it has a control character, or one that is not UTF-8; take that away")
    scheme, slashes, rest = re.fullmatch(r"(?:([A-Za-z][\w+.-]*):)?(/*)(.*)", text).groups()  # type: ignore[union-attr]
    scheme = (scheme or "").lower()
    if scheme == "gs":
        if slashes != "//":
            raise wrong("write gs://BUCKET/FOLDER, with two slashes")
        if local:
            raise wrong("it must be a path on this disk")
        found = _object(rest, wrong)
        if "/" not in found.removeprefix("gs://") and not root:
            raise wrong(f"it is a whole bucket; name a folder below it, such as {found}/run")
    elif scheme == "file" and slashes not in ("/", "///"):
        raise wrong("write file:///FOLDER, or the path alone")
    elif scheme and scheme != "file" and slashes:
        raise wrong(f"{scheme}: is not supported; give {_EXAMPLES}")
    else:
        found = _path(f"/{rest}" if scheme == "file" else text, wrong)
        if found == "/":
            raise wrong("it is the whole disk; name a folder below it")
    if len(os.fsencode(found)) > _LONGEST:
        raise wrong(f"it is longer than {_LONGEST} bytes; take a shorter one")
    return found


def _object(name: str, wrong: Any) -> str:
    parts: list[str] = []
    for part in name.split("/"):
        if part == ".." and len(parts) < 2:
            raise wrong("it leaves its bucket; take '..' away")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts or not re.fullmatch("[a-z0-9][a-z0-9._-]*", parts[0]):
        raise wrong("a bucket has a name of lower-case letters, digits, '-', '_' and '.'")
    return f"gs://{'/'.join(parts)}"


def _path(text: str, wrong: Any) -> str:
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise wrong("there is no such home folder; give a whole path, or ./~ for a name with ~")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in path.split("/")):
        raise wrong(f"a name in it is longer than {_LONGEST_NAME} bytes; take a shorter one")
    if ".." in path.split("/"):
        return os.path.realpath(path)  # `normpath` would take the folder of a link for its target's
    path = re.sub("^//", "/", os.path.normpath(path))
    # Without its "./" such a name would mean something else.
    return f"./{path}" if re.match(r"~|[A-Za-z][\w+.-]*:", path) else path
