"""The letters of shape suffixes, stated once; `x_BND` is an array of shape [B, N, D].

    B  batch (sequences)                 L  bytes in a sequence
    N  positions after patching          D  model width
    E  byte embedding width              F  frequency bins of a real FFT
    H  heads                             K  key width of a memory head
    V  value width of a memory head      C  classes
    A  micro-batches (accumulation)      M  hidden width of a channel mixer
    G  chunks                            T  positions in a chunk

`b` in `_Bb`-like suffixes never occurs: one letter, one meaning. Token values are those of
`models.md`: bytes are 0..255 and byte 0 is data, never padding.
"""

from jaxtyping import Array, Bool, Complex, Float, Int

PAD = 256
BOS = 257
EOS = 258
SEP = 259
VOCAB_SIZE = 260

Tokens = Int[Array, "B L"]
TokenMask = Bool[Array, "B L"]
Sequence = Float[Array, "B N D"]
SequenceMask = Bool[Array, "B N"]
Spectrum = Complex[Array, "F D"]
