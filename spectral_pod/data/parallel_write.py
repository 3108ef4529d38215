"""Writes a byte store by several processes in parallel, and resumes interrupted writes.

The input is a sequence of *items*, the same on every call, and a pure function converts an item to
records. Process 0 reads the items in order; workers convert them and write the results as parts of
the store. Each item is noted as done once its parts are written:

    STORE/unfinished/plan.json      what is being written
    STORE/unfinished/00012.json     item 12 is done: its parts, and facts about its conversion

When every item is done the manifest is written and the notes are deleted. An interrupted write has
no manifest, so it is never mistaken for a store, and a repeated write skips the items done.
"""

import concurrent.futures
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorstore as ts

from spectral_pod import project_files, storage
from spectral_pod.data import byte_store, store_lease, workers
from spectral_pod.data.byte_store import Record

# Records by split, and JSON-serializable facts about the conversion.
Converted = tuple[Mapping[str, Sequence[Record]], Any]


def write(
    path: str,
    items: Iterable[Any],
    convert: Callable[[Any], Converted],
    *,
    plan: Mapping[str, Any],
    splits: Sequence[str],
    classes: Sequence[str],
    documents: int,
    provenance: Callable[[list[Any]], Mapping[str, Any]],
    num_workers: int,
) -> None:
    """Writes a store, or the rest of it if an earlier write with the same plan was interrupted.

    Args:
      path: a folder or a gs:// URL.
      items: picklable items, determined by the plan, as is `convert`. At most `num_workers` + 1 are
        in memory at a time.
      convert: a picklable function from an item to its records by split, and facts to keep.
      plan: JSON-serializable; states everything that the records depend on. Remains of an
        interrupted write with another plan are deleted.
      splits: the names of the splits.
      classes: the name of every class, in the order of labels.
      documents: the number of documents per record.
      provenance: a function from the facts of all items, in order and after a round trip through
        JSON, to the manifest's provenance; may raise.
      num_workers: number of converting processes, see `workers.pool`.

    Raises:
      DataError: an item cannot be converted.
      TakenOverError: another process writes the store.
    """
    notes = storage.kvstore(f"{path}/unfinished")
    encoded_plan = json.dumps(dict(plan), sort_keys=True).encode()
    if notes.read("plan.json").result().value != encoded_plan:
        byte_store.clear(path)
        notes.write("plan.json", encoded_plan).result()
    done = {name for name in notes.list().result() if _done(notes[name])}
    convert_and_write = functools.partial(
        _write_item,
        path=path,
        convert=convert,
        options={"num_classes": len(classes), "documents": documents},
        check=store_lease.check_of(path),  # here, as workers hold no lease
    )
    counted = itertools.count()
    numbered = ((next(counted), item) for item in items)
    work = ((index, item) for index, item in numbered if _note(index).encode() not in done)
    first = list(itertools.islice(work, 2))
    if len(first) < 2:  # not worth starting a process
        for index, item in first:
            convert_and_write(index, item)
    else:
        with workers.pool(num_workers) as pool:
            pending: set[concurrent.futures.Future[None]] = set()
            try:
                for index, item in itertools.chain(first, work):
                    pending.add(pool.submit(convert_and_write, index, item))
                    _wait(pending, at_most=num_workers)
                _wait(pending, at_most=0)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    written = [project_files.ITEM.content(notes[_note(i)]) for i in range(next(counted))]
    parts = {
        split: [note["parts"][split] for note in written if split in note["parts"]]
        for split in splits
    }
    facts = provenance([note["facts"] for note in written])
    byte_store.finish(path, parts, classes=classes, provenance=facts, documents=documents)
    notes.delete_range(ts.KvStore.KeyRange()).result()


def _wait(pending: set[Any], *, at_most: int) -> None:
    """Waits until at most `at_most` futures are pending; raises the failures of the others."""
    while len(pending) > at_most:
        ended, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        pending -= ended
        for future in ended:
            future.result()


def _done(note: bytes) -> bool:
    """Whether a note says that its item is written; a damaged one, or the plan, does not."""
    try:
        project_files.ITEM.content(note)
    except ValueError:
        return False
    return True


def _note(index: int) -> str:
    return f"{index:05}.json"


def _write_item(
    index: int,
    item: Any,
    *,
    path: str,
    convert: Callable[[Any], Converted],
    options: Mapping[str, int],
    check: Callable[[], None],
) -> None:
    """Converts and writes one item, in a worker process."""
    records, facts = convert(item)
    parts = {}
    for split, split_records in records.items():
        if split_records:
            check()
            parts[split] = byte_store.write_part(path, split, index, split_records, **options)
    check()
    note = project_files.ITEM.encode({"parts": parts, "facts": facts})
    storage.kvstore(f"{path}/unfinished").write(_note(index), note).result()
