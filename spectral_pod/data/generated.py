"""Examples that a generator draws: distinct, by several processes, the same for a seed."""

import contextlib
import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from spectral_pod.data import workers
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError

Example = TypeVar("Example")

_PATIENCE = 100  # chunks without an example that is new


def distinct(
    draw: Callable[[int], Sequence[Example]],
    content: Callable[[Example], bytes],
    num_examples: int,
    *,
    chunk: int,
    what: str,
    num_workers: int | None = None,
) -> Iterator[Example]:
    """The first distinct examples of the chunks 0, 1, 2, ... that `draw` draws, in order.

    Args:
      draw: from the number of a chunk to its `chunk` examples; picklable.
      content: the bytes in which two examples differ.
      what: the name in the progress report.
      num_workers: processes that draw (`workers.pool`), by default one a core; they change nothing
        else.

    Raises:
      ConfigError: many chunks in a row hold nothing new.
    """
    num_workers = min(num_workers or os.cpu_count() or 1, math.ceil(num_examples / chunk))
    seen: set[bytes] = set()
    progress = Progress(what, num_examples, "examples")
    in_vain = 0
    with contextlib.closing(_chunks(draw, num_workers)) as chunks:
        for examples in chunks:
            before = len(seen)
            for example in examples:
                digest = hashlib.blake2b(content(example), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield example
                if len(seen) == num_examples:
                    progress.end()
                    return
            in_vain = in_vain + 1 if len(seen) == before else 0
            if in_vain == _PATIENCE:
                raise ConfigError(
                    f"config.data.options ask for {num_examples:,} distinct examples of {what}, "
                    f"and there seem to be no more than {len(seen):,}"
                )
            progress.at(len(seen))


def splits(
    generate: Callable[[int], Iterator[Example]], *, train: int, validation: int, test: int
) -> dict[str, Iterable[Example]]:
    """The examples of `generate(how many)` by split, to be consumed in the order of the dict.

    They are cut from one stream, test first, so the test split of a seed is the same beside any
    number of training examples.
    """
    stream = generate(test + validation + train)
    sizes = {"test": test, "validation": validation, "train": train}
    return {name: itertools.islice(stream, size) for name, size in sizes.items()}


def _chunks(
    draw: Callable[[int], Sequence[Example]], num_workers: int
) -> Generator[Sequence[Example], None, None]:
    """Endless chunks in order, none of which depends on a worker."""
    if num_workers == 1:
        yield from map(draw, itertools.count())
        return
    pool = workers.pool(num_workers)
    try:
        ahead = deque(pool.submit(draw, index) for index in range(2 * num_workers))
        for index in itertools.count(2 * num_workers):
            yield ahead.popleft().result()
            ahead.append(pool.submit(draw, index))
    finally:
        pool.shutdown(cancel_futures=True)
