"""What every part that reaches gs:// shares: patience, access, and files that are there whole.

Three libraries reach it: tensorstore (records and arrays), gcsfs through etils' epath (all other
files) and google-cloud-storage (Orbax's look at the bucket, and the check below). All use Google's
default credentials and repeat what failed with 408, 429, 5xx, or a broken connection. Importing
this module sets what they read from the environment, so it comes before their first use.
"""

import os
import sys
import uuid
from typing import Any

from spectral_pod.errors import UserError

_SILENCE = 20  # seconds after which a connection counts as broken
_ENVIRONMENT = {
    # epath would take TensorFlow's file system where that is installed: slow to import, and without
    # the endpoint override that tests need.
    "EPATH_USE_TF": "false",
    # gcsfs would ask each bucket, by gRPC, whether its folders are real ones.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    # gcsfs keeps listings for good, and so would not see what tensorstore or a peer has written.
    "FSSPEC_GCS": '{"use_listings_cache": false}',
    # A connection that went silent is an error that is tried again, and no endless wait.
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": f"{_SILENCE}",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": f"{_SILENCE}",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

_START_TIMEOUT = 60.0  # seconds in which storage must answer at start-up
_LOGIN = (
    "log in with `gcloud auth application-default login`, or point GOOGLE_APPLICATION_CREDENTIALS "
    "at the key file of a service account"
)
_READER = "roles/storage.objectViewer"
_WRITER = "roles/storage.objectUser and roles/storage.legacyBucketReader"


def is_remote(url: str) -> bool:
    """Whether a path is a URL of object storage rather than a folder."""
    return url.startswith("gs://")


def context(*, cache_bytes: int = 0) -> dict[str, Any]:
    """The spec of a `tensorstore.Context`; the pieces for gs:// do nothing elsewhere.

    Retries wait 0.5, 1, 2, 4 and then 8 seconds, each with up to 0.5 more: 16 of them outlast an
    outage of 100 seconds and notice its end within 8.5; what stays broken is reported after 104 to
    112 seconds (tensorstore's own 32 retries: after a quarter of an hour).

    Args:
      cache_bytes: bound of the decoded chunks that are kept in memory; 0 keeps none.
    """
    return {
        "cache_pool": {"total_bytes_limit": cache_bytes},
        "gcs_request_retries": {"max_retries": 16, "initial_delay": "500ms", "max_delay": "8s"},
        # A batch's random reads go out at once: each takes some 50 ms, however small.
        "gcs_request_concurrency": {"limit": 128},
    }


def check_access(url: str, *, write: bool) -> None:
    """Makes sure at start-up that storage can be used; returns at once for folders.

    Lists an object below `url`. With `write` also looks at the bucket, as Orbax does, and makes and
    deletes an empty object. Tries for a minute.

    Raises:
      UserError: there are no credentials, no such bucket, no permission, or no network; says which
        and what to do.
    """
    if not is_remote(url):
        return
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
    """Has gcsfs, too, try again where a connection went silent: it would wait and then fail."""
    import aiohttp
    import fsspec

    limits = aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)
    fsspec.config.conf.setdefault("gcs", {})["requests_timeout"] = limits


def client(url: str, *, write: bool, project: str | None = None) -> Any:
    """A google-cloud-storage client with Google's default credentials, for work on `url`.

    To read, one without will do. `project` is by default that of the credentials.

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
        return storage.Client.create_anonymous_client()  # some buckets are open to everyone
    except OSError as error:  # of a user's own credentials
        raise UserError(
            f"{url}: the credentials name no project; set GOOGLE_CLOUD_PROJECT to yours"
        ) from error


def failures() -> tuple[type[Exception], ...]:
    """What reading and writing files raise when storage fails for good, for an `except` clause."""
    kinds: list[type[Exception]] = [OSError]
    for module, name in (
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("google.api_core.exceptions", "GoogleAPIError"),
    ):
        if module in sys.modules:  # what was never imported has raised nothing
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def modified(file: Any) -> float:
    """When an `epath.Path` was written, in seconds since 1970.

    Raises:
      FileNotFoundError: there is none.
    """
    if is_remote(os.fspath(file)):
        return float(file.stat().mtime or 0)
    return os.stat(file).st_mtime  # epath's fails where the owner has no name, as in containers


def write_whole(file: Any, data: str | bytes) -> None:
    """Writes an `epath.Path` so that whoever reads or is killed never finds half of it."""
    raw = data.encode() if isinstance(data, str) else data
    if is_remote(os.fspath(file)):
        file.write_bytes(raw)  # an object appears when its upload is complete
        return
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(raw)
    temporary.replace(file)
