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
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorstore as ts

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record

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
) -> None:
    """Writes a store, or what an earlier, stopped write of the same plan has left to do.

    Args:
      path: a folder or a gs:// URL.
      items: picklable; they and `convert` follow from the plan. At most `num_workers` + 1 are
        held at a time.
      convert: picklable; from an item to its records by split, and facts to keep.
      plan: JSON-able; says everything that the records depend on. What another plan left
        unfinished at `path` is deleted.
      splits: of the store.
      classes: the name of every class, by label.
      documents: in each record.
      provenance: from the facts of all items, in their order and as JSON gives them back, to that
        of the manifest; may raise.
      num_workers: processes that convert; they are spawned, so a script that calls this needs the
        usual `if __name__ == "__main__"`.

    Raises:
      DataError: an item cannot be converted.
    """
    notes = byte_store.open_kvstore(f"{path}/unfinished")
    mine = json.dumps(dict(plan), sort_keys=True).encode()
    if notes.read("plan.json").result().value != mine:
        byte_store.clear(path)
        notes.write("plan.json", mine).result()
    done = {key.decode() for key in notes.list().result()}
    options = {"num_classes": len(classes), "documents": documents}
    num_items = 0

    def missing() -> Iterator[tuple[int, Any]]:
        nonlocal num_items
        for index, item in enumerate(items):
            num_items = index + 1
            if _note(index) not in done:
                yield index, item

    work = missing()
    first = list(itertools.islice(work, 2))
    if len(first) < 2:  # not worth a process
        for index, item in first:
            _write_item(path, index, item, convert, options)
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            pending: set[concurrent.futures.Future[None]] = set()
            try:
                for index, item in itertools.chain(first, work):
                    pending.add(pool.submit(_write_item, path, index, item, convert, options))
                    _wait(pending, at_most=num_workers)
                _wait(pending, at_most=0)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    written = [json.loads(notes[_note(index)]) for index in range(num_items)]
    parts = {
        split: [note["parts"][split] for note in written if split in note["parts"]]
        for split in splits
    }
    facts = provenance([note["facts"] for note in written])
    byte_store.finish(path, parts, classes=classes, provenance=facts, documents=documents)
    notes.delete_range(ts.KvStore.KeyRange()).result()


def _wait(pending: set[Any], *, at_most: int) -> None:
    """Waits until so many are pending; raises the failures of the others."""
    while len(pending) > at_most:
        ended, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        pending -= ended
        for future in ended:
            future.result()


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
