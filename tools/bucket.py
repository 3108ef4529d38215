"""Creates a bucket for runs, and uploads files to it.

    python -m tools.bucket create gs://NAME --location=us-central2 [--project=PROJECT]
    python -m tools.bucket create gs://NAME --location=... --delete=scratch/:30
    python -m tools.bucket upload FILE_OR_FOLDER gs://NAME/PREFIX

A new bucket has uniform access and public access prevention. --delete=PREFIX:DAYS deletes objects
below a prefix once they are that old. Put the bucket where the chips are: reads across regions
cost money and time. `upload` copies byte stores, workdirs or records, several files at once. Files
that the bucket already has with the same size and checksum are skipped, so the same command
continues an upload that was stopped. Manifests are uploaded last: a store that can be opened is
complete.
"""

import argparse
import base64
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
from google.api_core.exceptions import Conflict

from spectral_pod import storage
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError, DataError

from . import shell

_THREADS = 16


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("bucket", __doc__)
    commands = parser.add_subparsers(required=True, metavar="create|upload")
    creates = commands.add_parser("create", help="creates a bucket")
    creates.add_place("url", root=True, help="gs://NAME")
    creates.add_argument("--location", required=True, help="a region, such as us-central2")
    creates.add_argument("--project", help="by default that of the credentials")
    creates.add_argument("--delete", action="append", default=[], metavar="PREFIX:DAYS")
    creates.set_defaults(command=create)
    uploads = commands.add_parser("upload", help="copies files to a bucket")
    uploads.add_place("source", local=True, help="a file or a folder")
    uploads.add_place("url", help="gs://NAME/PREFIX")
    uploads.set_defaults(command=upload)
    again = "Interrupted; the same command continues"
    return shell.run(parser, lambda a: a.command(a), argv, interrupted=again)


def create(arguments: argparse.Namespace) -> None:
    name, _ = _parts(arguments.url)
    bucket = storage.client(arguments.url, write=True, project=arguments.project).bucket(name)
    bucket.iam_configuration.uniform_bucket_level_access_enabled = True
    bucket.iam_configuration.public_access_prevention = "enforced"
    for rule in arguments.delete:
        prefix, _, days = rule.rpartition(":")
        if not (prefix and days.isdigit() and int(days)):
            raise ConfigError(f"--delete={rule}; it is PREFIX:DAYS, such as scratch/:30")
        bucket.add_lifecycle_delete_rule(age=int(days), matches_prefix=[prefix])
    try:
        bucket.create(location=arguments.location)
    except Conflict as error:
        raise DataError(
            f"gs://{name} exists already, here or in a project of someone else; take another name"
        ) from error
    print(f"gs://{name} in {arguments.location}")


def upload(arguments: argparse.Namespace) -> None:
    source = pathlib.Path(arguments.source)
    if not source.exists():
        raise DataError(f"{source} does not exist")
    storage.check_access(arguments.url, write=True)
    name, prefix = _parts(arguments.url)
    bucket = storage.client(arguments.url, write=True).bucket(name)
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    names = {file: _target(file, source, prefix) for file in files}
    present = {blob.name: blob for blob in bucket.list_blobs(prefix=prefix)}
    todo = [file for file, target in names.items() if not _is_same(file, present.get(target))]
    total = sum(file.stat().st_size for file in todo)
    progress = Progress("Uploading", total, "bytes")

    def put(file: pathlib.Path) -> None:
        blob = bucket.blob(names[file])
        blob.upload_from_filename(str(file), checksum="crc32c")
        progress.add(file.stat().st_size)

    manifests = [file for file in todo if file.name == "manifest.json"]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(put, [file for file in todo if file not in manifests]):
            pass
        for _ in pool.map(put, manifests):
            pass
    progress.end()
    skipped = len(files) - len(todo)
    print(f"{len(todo)} files, {total:,} bytes to {arguments.url}; {skipped} were there")


def _target(file: pathlib.Path, source: pathlib.Path, prefix: str) -> str:
    relative = file.name if source.is_file() else file.relative_to(source).as_posix()
    return f"{prefix}/{relative}"


def _is_same(file: pathlib.Path, blob: Any) -> bool:
    if blob is None or blob.size != file.stat().st_size:
        return False
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        for _ in checksum.consume(stream, 1 << 20):
            pass
    return bool(blob.crc32c == base64.b64encode(checksum.digest()).decode())


def _parts(url: str) -> tuple[str, str]:
    if not storage.is_remote(url):
        raise ConfigError(f"{url!r} is no gs:// URL")
    name, _, prefix = url.removeprefix("gs://").partition("/")
    return name, prefix


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
