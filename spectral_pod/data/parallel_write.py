"""A byte store written by several processes side by side, that goes on where it was stopped.

The caller's *items* are pieces of the input, the same every time they are asked for, and a pure
function makes records of one. Process 0 reads the items in order; workers convert them and write
what comes out as parts of the store. What an item became is noted when its parts are written:

    STORE/unfinished/plan.json      what is being written
    STORE/unfinished/00012.json     item 12 is done: its parts, and what the conversion said of it

When every item is noted the manifest is written and the notes are deleted. A write that was killed
leaves no manifest, so nothing takes it for a store, and the same write later skips what is noted.
"""

import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorstore as ts

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from spectral_pod.errors import DataError

# Records by split, and JSON-able facts about the conversion.
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
    on_item: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes a store, or what an earlier, stopped write of the same plan has left to do.

    Args:
      path: a folder or a gs:// URL.
      items: picklable; they and `convert` follow from the plan. At most `num_workers` + 1 are
        held at a time.
      convert: picklable; from an item to its records by split, and facts to keep.
      plan: JSON-able; says everything that the records depend on. What another plan left
        unfinished at `path` is deleted.
      splits: of the store, each of which must get a record.
      classes: the name of every class, by label.
      documents: in each record.
      provenance: from the facts of all items, in their order, to that of the manifest; may raise.
      num_workers: processes that convert; they are spawned, so a script that calls this needs the
        usual `if __name__ == "__main__"`.
      on_item: is told how many items are done, whenever that changes.

    Raises:
      DataError: an item cannot be converted, or a split gets no records.
    """
    notes = byte_store.open_kvstore(f"{path}/unfinished")
    mine = json.dumps(dict(plan), sort_keys=True).encode()
    if notes.read("plan.json").result().value != mine:
        byte_store.clear(path)
        notes.write("plan.json", mine).result()
    done = {key.decode() for key in notes.list().result()}
    num_items = 0
    finished = len(done) - 1
    if finished:
        on_item(finished)
    options = {"num_classes": len(classes), "documents": documents}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        pending: set[concurrent.futures.Future[None]] = set()
        try:
            for index, item in enumerate(items):
                num_items = index + 1
                if _note(index) in done:
                    continue
                pending.add(pool.submit(_write_item, path, index, item, convert, options))
                finished += _collect(pending, at_most=num_workers, on_done=on_item, done=finished)
            _collect(pending, at_most=0, on_done=on_item, done=finished)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    written = [json.loads(notes[_note(index)]) for index in range(num_items)]
    parts = {
        split: [note["parts"][split] for note in written if split in note["parts"]]
        for split in splits
    }
    facts = provenance([note["facts"] for note in written])
    for split, held in parts.items():
        if not held:
            raise DataError(f"{path}: no record is left for split {split!r}")
    byte_store.finish(path, parts, classes=classes, provenance=facts, documents=documents)
    notes.delete_range(ts.KvStore.KeyRange()).result()


def _collect(pending: set[Any], *, at_most: int, on_done: Callable[[int], None], done: int) -> int:
    """Waits until so many are pending; returns how many were done, and raises their failures."""
    count = 0
    while len(pending) > at_most:
        ended, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        pending -= ended
        for future in ended:
            future.result()
            count += 1
            on_done(done + count)
    return count


def _note(index: int) -> str:
    return f"{index:05}.json"


def _write_item(
    path: str,
    index: int,
    item: Any,
    convert: Callable[[Any], Converted],
    options: Mapping[str, int],
) -> None:
    """Runs in a worker."""
    records, facts = convert(item)
    parts = {
        split: byte_store.write_part(path, split, index, held, **options)
        for split, held in records.items()
        if held
    }
    note = json.dumps({"parts": parts, "facts": facts}).encode()
    byte_store.open_kvstore(f"{path}/unfinished").write(_note(index), note).result()
