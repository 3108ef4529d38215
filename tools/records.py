"""Writes and inspects byte stores, on disk or in Google Cloud Storage.

    python -m tools.records write --task=records --out=DIR --train='*.jsonl.xz' --label=stars
    python -m tools.records write --task=lm --out=gs://BUCKET/code --source=FOLDER
    python -m tools.records describe STORE [--duplicates]
    python -m tools.records verify STORE
    python -m tools.records head STORE [--split=train] [--count=5]
    python -m tools.records tfds STORE --name=NAME --data_dir=DIR

`write` takes the options of a task (`spectral_pod/data/tasks`) as flags; `write --task=NAME --help`
lists them. Records of files (`--task=records`) are written by several processes, and the same
command continues a write that was stopped. A run reads the store with
`--config.data.stores="('STORE',)"`; several are mixed with `"(('A', 3.0), ('B', 1.0))"`.

`describe` counts records; with --duplicates it looks for records that two splits share and for
labels that can be predicted from a record's length or its first and last bytes. `verify` reads
every byte and compares it with the manifest's sha256. `head` prints the first records, with
non-text bytes escaped. `tfds` copies a store to a dataset of TensorFlow Datasets.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence

from spectral_pod import fields, storage
from spectral_pod.data import byte_store, duplicates, store_lease, tasks
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Positive

from . import shell

_SHOWN_BYTES = 200  # of a document


def main(argv: Sequence[str]) -> int:
    again = "Interrupted; the same command continues"
    return shell.run(_parser(argv), lambda a: a.command(a), argv, interrupted=again)


def write(arguments: argparse.Namespace) -> None:
    out = arguments.out
    task = _stored_tasks()[arguments.task]
    options = {
        name: fields.parse(annotation, text, f"--{name}")
        for name, annotation in task.annotations().items()
        if (text := getattr(arguments, f"option_{name}")) is not None
    }
    storage.check_access(out, write=True)
    started = time.monotonic()
    with store_lease.hold(out):
        if byte_store.exists(out):
            raise DataError(f"{out} holds a finished store; give another --out, or delete it first")
        task.from_options(options).build(out)
    shell.say(f"{out} in {time.monotonic() - started:.1f} s")
    describe(argparse.Namespace(store=out, duplicates=False))


def describe(arguments: argparse.Namespace) -> None:
    store = _open(arguments.store)
    manifest = store.manifest
    print(f"{store.path}  sha256 of its contents {store.digest}")
    print(f"{len(store.classes)} classes, {manifest['documents']} document(s) a record")
    header = f"{'split':<12}{'records':>12}{'bytes':>16}{'longest':>12}{'parts':>8}  of each class"
    print(header)
    for name, info in manifest["splits"].items():
        shown = ", ".join(
            f"{_printable(label)} {count:,}"
            for label, count in zip(store.classes, info["class_counts"])
        )
        print(
            f"{name:<12}{info['records']:>12,}{info['bytes']:>16,}{info['longest']:>12,}"
            f"{len(info['parts']):>8}  {shown[:120]}{'...' if len(shown) > 120 else ''}"
        )
    print(json.dumps(manifest["provenance"], indent=1))
    if arguments.duplicates:
        total = sum(info["records"] for info in manifest["splits"].values())
        progress = Progress("Comparing", total, "records")
        report = duplicates.report(store, progress.add)
        store.verification.wait()
        progress.end()
        print(json.dumps(report, indent=1))


def verify(arguments: argparse.Namespace) -> None:
    path = arguments.store
    splits = _open(path).manifest["splits"]
    progress = Progress("Reading", sum(len(info["parts"]) for info in splits.values()), "parts")
    byte_store.verify(path, lambda part: progress.add())
    progress.end()
    records = sum(info["records"] for info in splits.values())
    size = sum(info["bytes"] for info in splits.values())
    print(f"{path} is sound: {records:,} records, {size:,} bytes, as the manifest says")


def head(arguments: argparse.Namespace) -> None:
    store = _open(arguments.store)
    split = store.split(arguments.split)
    count, k = min(arguments.count, len(split)), split.documents
    documents = split.read(range(count * k))
    store.verification.wait()
    for i in range(count):
        print(f"{i}: class {_printable(store.classes[split.labels[i]])}")
        for document in documents[i * k : (i + 1) * k]:
            data = document[:_SHOWN_BYTES].tobytes()
            text = data.decode(errors="backslashreplace").encode("unicode_escape").decode()
            more = "..." if len(document) > _SHOWN_BYTES else ""
            print(f"   {len(document):,} bytes: {text}{more}")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)


def to_tfds(arguments: argparse.Namespace) -> None:
    from spectral_pod.data import tfds_builder  # imports TensorFlow

    if not re.fullmatch(r"[A-Za-z]\w{0,99}", arguments.name, re.ASCII):
        raise ConfigError(
            f"--name is {arguments.name!r}; the name of a TFDS dataset is a letter and at most 99 "
            "letters, digits and underscores"
        )
    store = _open(arguments.store)
    storage.check_access(arguments.data_dir, write=True)
    folder = tfds_builder.write(store, name=arguments.name, data_dir=arguments.data_dir)
    print(f"tfds.load({arguments.name!r}, data_dir={arguments.data_dir!r}): {folder}")


def _parser(argv: Sequence[str]) -> shell.Parser:
    parser = shell.parser("records", __doc__)
    commands = parser.add_subparsers(required=True, metavar="write|describe|verify|head|tfds")
    writes = commands.add_parser("write", help="writes a task's records")
    stored = _stored_tasks()
    writes.add_argument("--task", choices=sorted(stored), required=True)
    writes.add_place("--out", required=True, help="a folder or a gs:// URL")
    # The other flags depend on the task, which is therefore parsed first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", nargs="?", default="")
    task = first.parse_known_args(argv)[0].task
    task = task if task in stored else min(stored)  # the error is reported with the other flags
    for name, default in stored[task]().options.items():
        writes.add_argument(f"--{name}", dest=f"option_{name}", help=f"default {default!r}")
    writes.set_defaults(command=write)
    for name, function, about in (
        ("describe", describe, "counts, classes, and the origin of the records"),
        ("verify", verify, "compares every byte with its sha256"),
        ("head", head, "prints the first records"),
        ("tfds", to_tfds, "copies the store to a dataset of TensorFlow Datasets"),
    ):
        reads = commands.add_parser(name, help=about)
        reads.add_place("store", help="a folder or a gs:// URL")
        reads.set_defaults(command=function)
        if name == "describe":
            reads.add_argument("--duplicates", action="store_true")
        if name == "tfds":
            reads.add_argument("--name", required=True)
            reads.add_place("--data_dir", local=True, required=True)
        if name == "head":
            reads.add_argument("--split", default="train")
            reads.add_value("--count", Positive, 5, "(5)")
    return parser


def _stored_tasks() -> dict[str, type[tasks.StoredTask]]:
    return {name: task for name, task in tasks.TASKS.items() if issubclass(task, tasks.StoredTask)}


def _open(path: str) -> byte_store.ByteStore:
    storage.check_access(path, write=False)
    return byte_store.ByteStore(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
