"""Text from the bytes that a model generates piece by piece: stop strings, and valid UTF-8."""

import codecs
from collections.abc import Iterator, Sequence

from spectral_pod.errors import ConfigError
from spectral_pod.generate.decode import PLAIN, context_of, generate_tokens
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
        self._held = b""  # possibly the beginning of a stop string
        self.stopped = False

    def add(self, piece: bytes) -> bytes:
        """Returns the bytes that are now known to be before a stop string."""
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
        """Returns the bytes that were held back, as nothing follows."""
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
    """Continues prompts, up to a stop string; the model's mesh must be set.

    The pieces of a prompt, joined, are its whole continuation. It depends on the seed, the prompt
    and its index, and not on other prompts or the mesh. Of a model of tokens, `num_bytes` counts
    these.

    Raises:
      ValueError: a prompt is empty.
      ConfigError: the model does not predict text.
      DataError: the tokenizer of the model is missing, or another one; or a prompt is not UTF-8,
        and the model has one.
    """
    if not trained.objective.is_language_model:
        raise ConfigError(
            f"a {trained.config.model.name} trained on {trained.config.data.task!r} does not "
            "predict the byte that follows; text can only come from a language model"
        )
    vocabulary = trained.vocabulary
    tokens = [vocabulary.encode(prompt).tolist() for prompt in prompts]
    texts, decoders = [UntilStop(stop) for _ in prompts], list(map(vocabulary.decoder, tokens))
    pieces = generate_tokens(
        trained.module,
        trained.params,
        tokens,
        num_tokens=num_bytes,
        seed=seed,
        sampling=sampling,
        context=context_of(trained.module),
        rows=num_shards("batch"),
    )
    for row in pieces:
        yield [x.add(decode(piece)) for x, decode, piece in zip(texts, decoders, row)]
        if all(text.stopped for text in texts):
            return
    yield [text.end() for text in texts]


def decoded(pieces: Iterator[bytes]) -> Iterator[str]:
    """Valid text from pieces: whole characters, and U+FFFD for bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
