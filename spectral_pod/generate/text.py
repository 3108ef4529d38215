"""From the bytes that a model writes, piece by piece, to text: where it stops, and what to show."""

import codecs
from collections.abc import Iterator, Sequence

from spectral_pod.errors import ConfigError
from spectral_pod.generate.decode import PLAIN, context_of, generate
from spectral_pod.generate.restore import Trained
from spectral_pod.generate.sampling import Sampling
from spectral_pod.parallel.sharding import num_shards


class UntilStop:
    """The bytes before the first occurrence of a stop string, which may straddle pieces.

    >>> text = UntilStop(b"END")
    >>> text.add(b"of the E"), text.add(b"ast ENDLESS"), text.stopped
    (b'of the ', b'East ', True)
    """

    def __init__(self, stop: bytes):
        """`stop`: empty never stops."""
        self._stop = stop
        self._held = b""  # what may be the beginning of a stop string
        self.stopped = False

    def add(self, piece: bytes) -> bytes:
        """What is now known to be before a stop string."""
        if self.stopped:
            return b""
        known = self._held + piece
        before, found, _ = known.partition(self._stop) if self._stop else (known, b"", b"")
        if found:
            self.stopped, self._held = True, b""
            return before
        longest = min(len(self._stop) - 1, len(known))
        held = next((n for n in range(longest, 0, -1) if self._stop.startswith(known[-n:])), 0)
        self._held = known[len(known) - held :]
        return known[: len(known) - held]

    def end(self) -> bytes:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, b""
        return held


def continuations(
    trained: Trained,
    prompts: Sequence[bytes],
    *,
    num_bytes: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    stop: bytes = b"",
) -> Iterator[list[bytes]]:
    """`decode.generate` of a trained model, on its mesh, which is set, up to a stop string.

    Joined, the pieces of a prompt are its whole continuation. The seed, the prompt's place and its
    bytes decide it; other prompts, the mesh and the stop string do not, but that it ends there.

    Raises:
      ValueError: a prompt is empty.
      ConfigError: the model does not predict bytes.
    """
    if trained.objective != "next":
        raise ConfigError(
            f"a {trained.config.model.name} trained on {trained.config.data.task!r} does not "
            "predict the byte that follows; text can only come from a language model"
        )
    texts = [UntilStop(stop) for _ in prompts]
    pieces = generate(
        trained.module,
        trained.params,
        prompts,
        num_bytes=num_bytes,
        seed=seed,
        sampling=sampling,
        context=context_of(trained.module),
        rows=num_shards("batch"),
    )
    for row in pieces:
        yield [text.add(piece) for text, piece in zip(texts, row)]
        if all(text.stopped for text in texts):
            return
    yield [text.end() for text in texts]


def decoded(pieces: Iterator[bytes]) -> Iterator[str]:
    """Valid text as it arrives: characters whole, and U+FFFD for bytes that are no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
