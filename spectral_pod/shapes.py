"""The letters of shape suffixes, stated once; `x_BND` is an array of shape [B, N, D].

    B  batch (sequences)                 L  bytes in a sequence
    N  positions after patching          D  model width
    E  byte embedding width              F  frequency bins of a real FFT
    H  heads                             K  key width of a memory head
    V  value width of a memory head      C  classes
    A  micro-batches (accumulation)      M  hidden width of a channel mixer
    G  chunks or stretches               T  positions in a chunk, or taps of a filter
    J  layers that are decoded together  P  positions of a prompt
    R  filters that an input mixes       S  keys in sight of a query, or wavelet bands

The aliases annotate the boundaries of operations and models; the tests check them at every call.
"""

from jaxtyping import Array, Bool, Complex, Float, Int

# Bytes are 0..255, and byte 0 is data, never padding.
PAD = 256
BOS = 257
EOS = 258
SEP = 259
VOCAB_SIZE = 260

Tokens = Int[Array, "B L"]
TokenMask = Bool[Array, "B L"]
Logits = Float[Array, "B C"]
SequenceLogits = Float[Array, "B L C"]
Labels = Int[Array, " B"]
Positions = Float[Array, "B N D"]
PositionMask = Bool[Array, "B N"]
Pooled = Float[Array, "B D"]
Spectrum = Complex[Array, "F D"]
