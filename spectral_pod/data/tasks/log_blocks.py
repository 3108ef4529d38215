"""Log lines: is something wrong in a block of them? Generated: no real logs are here.

    09:14:03 storage[4f1c] file opened                 09:14:03 storage[4f1c] file opened
    09:14:03 storage[a09b] file opened                 09:14:03 storage[a09b] file opened
    09:14:05 storage[4f1c] 412 bytes written           09:14:05 storage[4f1c] 412 bytes written
    09:14:06 storage[a09b] 96 bytes written            09:14:06 storage[4f1c] 96 bytes written
    09:14:06 storage[a09b] file closed                 09:14:06 storage[a09b] file closed
    09:14:09 storage[4f1c] file closed                 09:14:09 storage[a09b] file closed

A block holds the lines of several sessions of one service, interleaved at random. Each session goes
through the steps of the service in its order. A normal block (left) is followed by an anomalous one
(right): two of its lines have exchanged their texts or their sessions, so that at least one session
does not go through its steps in order. The bytes of both are the same in another order: any rule
that looks at byte counts or at the length is right for exactly half of the records.

A block is written in one of LAYOUTS and is of one of SERVICES. One eighth of all pairs of a layout
and a service are in validation only, another eighth in test only, so no line's template is in two
splits, while each layout and each service is in all of them.

Figures on it say nothing about real systems. Lines or blocks of your own, with labels, are read by
the task `records`: `configs/logs.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from spectral_pod.data import byte_store, generated
from spectral_pod.data.tasks.task import StoredTask, execution
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive
from spectral_pod.seeds import entropy

CLASSES = ("normal", "anomalous")
SPLITS = ("train", "validation", "test")
MAX_SESSIONS = 6
_MIN_WINDOW = 640  # bytes, in which a session of any service fits
_CHUNK = 64
_TRIES = 1000


class Service(NamedTuple):
    """A service: its name, the texts of its steps a, b, c, ..., and a regular expression of their
    order in a session."""

    name: str
    steps: tuple[str, ...]
    order: str


class Event(NamedTuple):
    """What a line says: which session took which step, and the text with its numbers."""

    session: str
    step: str  # a, b, c, ...
    text: str


SERVICES = (
    Service(
        "gateway",
        ("connection accepted", "user authenticated", "request served in {n} ms",
         "connection closed"),
        "abc+d",
    ),
    Service("storage", ("file opened", "{n} bytes written", "file closed"), "ab+c"),
    Service(
        "database",
        ("transaction started", "statement executed, {n} rows", "transaction committed",
         "transaction rolled back"),
        "ab+[cd]",
    ),
    Service(
        "scheduler",
        ("job queued", "job assigned to node {n}", "progress {n} of 1000", "job finished"),
        "abc+d",
    ),
    Service("locks", ("lock requested", "lock granted after {n} us", "lock released"), "abc"),
    Service(
        "mail",
        ("message received, {n} bytes", "message scanned", "message deferred for {n} s",
         "message delivered"),
        "abc*d",
    ),
    Service(
        "builder",
        ("checkout of revision {n}", "step {n} passed", "artifacts stored", "build done"),
        "ab+cd",
    ),
    Service(
        "sensor",
        ("calibration begun", "calibration ended", "sample {n} taken", "upload confirmed"),
        "abc+d",
    ),
)  # fmt: skip
LAYOUTS = (
    "{clock} {service}[{session}] {text}",
    "[{clock}] INFO {service}: {text} (session {session})",
    '{{"t": "{clock}", "from": "{service}", "id": "{session}", "msg": "{text}"}}',
    "{service}/{session} {clock} - {text}",
    'time={clock} service={service} msg="{text}" session={session}',
    "{session} | {clock} | {service} | {text}",
    "{clock} <{session}> {service} {text}",
    "{service} at {clock}, {session}: {text}",
)


@dataclasses.dataclass(frozen=True)
class LogBlocks(StoredTask):
    """Blocks of lines, each as the service wrote it and with something out of order."""

    name = "log_blocks"
    version = 1
    num_classes = len(CLASSES)

    seed: int = 0  # draws the blocks
    window: Positive = 1024  # bytes in a block, at most
    train: Positive = 10_000  # pairs of a normal and an anomalous block; likewise the next two
    validation: Positive = 500
    test: Positive = 500
    num_workers: int | None = execution(None)  # processes that draw; None is one per core

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < _MIN_WINDOW:
            raise ConfigError(
                f"config.data.options.window is {self.window}; it must be at least {_MIN_WINDOW}, "
                "in which every session fits"
            )

    def build(self, path: str) -> None:
        """Writes the pairs as a byte store.

        Raises:
          ConfigError: so many distinct blocks are not found.
        """
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        byte_store.write(
            path,
            {split: self._records(split, size) for split, size in sizes.items()},
            classes=CLASSES,
            provenance={"task": self.name, "logs": "generated", **self.identity()},
        )

    def _records(self, split: str, size: int) -> Iterator[byte_store.Record]:
        pairs = generated.distinct(
            functools.partial(_chunk, split, self.seed, self.window),
            lambda pair: pair[0],
            size,
            chunk=_CHUNK,
            what=f"blocks of log lines, {split}",
            num_workers=self.num_workers,
        )
        for blocks in pairs:
            for name, block in zip(CLASSES, blocks):
                yield byte_store.Record(block, CLASSES.index(name))


def is_normal(service: Service, events: Sequence[Event]) -> bool:
    """Whether every session goes through the steps of the service in order, from first to last."""
    steps: dict[str, str] = {}
    for event in events:
        steps[event.session] = steps.get(event.session, "") + event.step
    return all(re.fullmatch(service.order, taken) for taken in steps.values())


def split_of(layout: int, service: int) -> str:
    """The split that has the blocks of a service in a layout."""
    return {0: "test", 1: "validation"}.get((layout + service) % len(LAYOUTS), "train")


def _chunk(split: str, seed: int, window: int, number: int) -> list[tuple[bytes, bytes]]:
    """Pairs of a normal and an anomalous block."""
    rng = np.random.default_rng([entropy(seed), SPLITS.index(split), number])
    kinds = [
        (layout, service)
        for layout in range(len(LAYOUTS))
        for service in range(len(SERVICES))
        if split_of(layout, service) == split
    ]
    chosen = (kinds[i] for i in rng.integers(len(kinds), size=_CHUNK))
    return [_pair(LAYOUTS[i], SERVICES[j], window, rng) for i, j in chosen]


def _pair(
    layout: str, service: Service, window: int, rng: np.random.Generator
) -> tuple[bytes, bytes]:
    """A block in which as many sessions as fit go through their steps, and an anomalous form."""
    names = _session_names(rng)
    sessions = [_session(service, name, rng) for name in names]
    second = int(rng.integers(86_400))
    gaps = rng.geometric(0.5, size=sum(map(len, sessions))) - 1
    while True:
        times = (second + np.cumsum(gaps)) % 86_400
        events = _interleaved(sessions, rng)
        block = _written(layout, service, events, times)
        if len(block) <= window:
            break
        sessions.pop()
    for _ in range(_TRIES):
        others = _exchanged(events, ("text", "session")[rng.integers(2)], rng)
        if not is_normal(service, others):
            return block, _written(layout, service, others, times)
    raise AssertionError(f"every exchange of lines of {service.name} leaves their steps in order")


def _session_names(rng: np.random.Generator) -> list[str]:
    """The names of 2 to MAX_SESSIONS sessions: 4 hexadecimal digits each, all different."""
    numbers = rng.choice(1 << 16, size=rng.integers(2, MAX_SESSIONS + 1), replace=False)
    return [f"{number:04x}" for number in numbers]


def _session(service: Service, name: str, rng: np.random.Generator) -> list[Event]:
    """The events of a session, in order."""
    steps = re.sub(r"\[(\w+)\]", lambda found: str(rng.choice(list(found[1]))), service.order)
    steps = re.sub(r"(\w)([+*])", lambda found: found[1] * _repeats(found[2], rng), steps)
    texts = [service.steps["abcd".index(step)] for step in steps]
    return [
        Event(name, step, text.format(n=rng.integers(1000)))
        for step, text in zip(steps, texts, strict=True)
    ]


def _repeats(sign: str, rng: np.random.Generator) -> int:
    return int(rng.integers(0 if sign == "*" else 1, 4))


def _interleaved(sessions: Sequence[Sequence[Event]], rng: np.random.Generator) -> list[Event]:
    """The events of all sessions, those of each in their order."""
    whose = rng.permutation([i for i, session in enumerate(sessions) for _ in session])
    ahead = [iter(session) for session in sessions]
    return [next(ahead[i]) for i in whose]


def _exchanged(
    events: Sequence[Event], what: Literal["text", "session"], rng: np.random.Generator
) -> list[Event]:
    """The events after two of them have exchanged their texts or their sessions."""
    i, j = rng.choice(len(events), size=2, replace=False)
    changed = list(events)
    one, two = events[i], events[j]
    if what == "text":
        one, two = two, one
    changed[i], changed[j] = one._replace(session=two.session), two._replace(session=one.session)
    return changed


def _written(layout: str, service: Service, events: Sequence[Event], times: np.ndarray) -> bytes:
    """The lines of a block; `times` are seconds of a day, int [n] or longer."""
    lines = []
    for event, time in zip(events, times.tolist()):
        clock = f"{time // 3600:02}:{time // 60 % 60:02}:{time % 60:02}"
        fields = {"service": service.name, "session": event.session, "text": event.text}
        lines.append(layout.format(clock=clock, **fields) + "\n")
    return "".join(lines).encode()
