"""Who writes the model's turns of conversations: a trained model, or in tests another."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.agent import protocol
from spectral_pod.errors import ConfigError
from spectral_pod.generate.decode import context_of
from spectral_pod.generate.restore import Trained
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.turns import Grammar, Heard, TurnDecoder, aligned
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.parallel.sharding import num_shards
from spectral_pod.seeds import random_key
from spectral_pod.shapes import ANSWER, CALL, END, THOUGHT

GREEDY = Sampling(temperature=0.0)


class Stream(Protocol):
    """Conversations as they go on: see `generate.turns.TurnDecoder.go_on`."""

    def go_on(self, given: Sequence[Sequence[int]], live: Sequence[bool]) -> list[Heard]: ...


class Writer(Protocol):
    """What begins conversations.

    Attributes:
      context: the most symbols that one can have; None for no limit.
    """

    context: int | None

    def begin(self, symbols: Sequence[Sequence[int]], num_symbols: int) -> Stream:
        """Begins conversations with these symbols, of up to `num_symbols` each, these included."""


class ModelWriter:
    """A trained model. What it writes depends on the seed, the conversation and its place in the
    batch, and not on other conversations or the mesh.
    """

    def __init__(self, trained: Trained, *, sampling: Sampling = GREEDY, seed: int = 0):
        """See the class.

        Raises:
          ConfigError: the model was not trained on conversations.
        """
        sizes = trained.vocab_size, trained.num_classes
        if sizes != (protocol.VOCAB_SIZE, protocol.NUM_CLASSES) or not trained.module.causal:
            raise ConfigError(
                f"a {trained.config.model.name} trained on {trained.config.data.task!r} does not "
                "write conversations: it has no symbols of turns (spectral_pod/agent/protocol.py)"
            )
        self.context = context_of(trained.module)
        self._trained, self._sampling, self._seed = trained, sampling, seed

    def begin(self, symbols: Sequence[Sequence[int]], num_symbols: int) -> Stream:
        """See `Writer`."""
        return _ModelStream(self._trained, self._sampling, self._seed, symbols, num_symbols)


class _ModelStream:
    def __init__(
        self,
        trained: Trained,
        sampling: Sampling,
        seed: int,
        symbols: Sequence[Sequence[int]],
        num_symbols: int,
    ):
        self._mesh, self._num_rows = trained.mesh, len(symbols)
        with on_mesh(self._mesh):
            shards = num_shards("batch")
            num_rows = -(-len(symbols) // shards) * shards
            self._extra = num_rows - len(symbols)
            keys_B = jax.vmap(lambda row: jax.random.fold_in(random_key(seed), row))(
                jnp.arange(num_rows)
            )
            self._decoder = TurnDecoder(
                trained.module,
                trained.params,
                aligned(symbols, num_rows),
                num_positions=num_symbols - min(map(len, symbols)),
                keys_B=keys_B,
                sampling=sampling,
                grammar=grammar(),
            )

    def go_on(self, given: Sequence[Sequence[int]], live: Sequence[bool]) -> list[Heard]:
        with on_mesh(self._mesh):
            given, live = [*given, *[[0]] * self._extra], [*live, *[False] * self._extra]
            return self._decoder.go_on(given, live)[: self._num_rows]


def grammar() -> Grammar:
    """After END one of the symbols that begin a turn of the model; in a turn bytes, or its END."""
    classes = protocol.SYMBOL_OF_CLASS
    begins_C = np.isin(classes, [THOUGHT, CALL, ANSWER])
    allowed_VC = np.tile(~begins_C, (protocol.VOCAB_SIZE, 1))
    allowed_VC[END] = begins_C
    return Grammar(classes, allowed_VC, np.int32(classes.tolist().index(END)))
