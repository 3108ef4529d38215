"""Shape suffixes and type aliases: `x_BND` is an array of shape [B, N, D].

    B  batch (sequences)                 L  bytes in a sequence
    N  positions after patching          D  model width
    E  byte embedding width              F  frequency bins of a real FFT
    H  heads                             K  key width of a memory head
    V  value width of a memory head      C  classes
    A  micro-batches (accumulation)      M  hidden width of a channel mixer
    G  chunks, blocks or segments        T  positions in a chunk, or taps of a filter
    J  layers decoded together           P  positions of a prompt
    R  filters mixed per input           S  keys visible to a query, or wavelet bands
    O  projections of one input

The aliases annotate the inputs and outputs of operations and models; tests check them at run time.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

# Bytes are 0..255; byte 0 is data, never padding. Id 257 is reserved. The tokens of a larger
# vocabulary go on after the special ones: see `symbol`.
PAD = 256
EOS = 258
SEP = 259
VOCAB_SIZE = 260
NUM_SPECIAL = VOCAB_SIZE - 256

# Symbols of conversations (`agent/protocol.py`), which only models of conversations have. Those
# that a model may write are first.
END, THOUGHT, CALL, ANSWER, USER, RESULT = range(VOCAB_SIZE, VOCAB_SIZE + 6)


def symbol(token: Any, xp: Any = np) -> Any:
    """What a model reads for a token, or an array of them: itself below 256, and from there on a
    number after the special tokens. `xp` is NumPy, or jax.numpy for arrays of JAX."""
    return xp.where(token < 256, token, token + NUM_SPECIAL)


Tokens = Int[Array, "B L"]
TokenMask = Bool[Array, "B L"]
Logits = Float[Array, "B C"]
SequenceLogits = Float[Array, "B L C"]
Positions = Float[Array, "B N D"]
PositionMask = Bool[Array, "B N"]
Pooled = Float[Array, "B D"]
Spectrum = Complex[Array, "F D"]
