"""The lease on a byte store: one process at a time writes it, with its workers.

    with store_lease.hold(path):
        byte_store.write(path, ...)  # stops if another process takes the store over

It is the file `lease.json` in the store, which is deleted once the store is written.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

from spectral_pod.lease import Claim, Lease

FILE = "lease.json"
_claims: dict[str, Claim] = {}  # by the path of a store: the leases that this process holds


@contextlib.contextmanager
def hold(path: str) -> Iterator[None]:
    """Holds the lease on a store; waits for the end of another writer, or continues if it dies."""
    say = functools.partial(print, flush=True)
    with Lease(os.path.join(path, FILE), f"the store {path}", wait=True, say=say) as lease:
        _claims[path] = lease.claim
        try:
            yield
        finally:
            del _claims[path]


def check_of(path: str) -> Callable[[], None]:
    """A check, to be called before a store is written, and which can be sent to a worker.

    It raises a `TakenOverError` if another process has taken over the lease that this one holds.
    """
    return _claims[path].check if path in _claims else _unchecked


def _unchecked() -> None:
    """The check of a store that is written without a lease, as in tests."""
