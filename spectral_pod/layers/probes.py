"""What layers show of themselves: small summaries, by channel, head or layer, for those who ask.

A module calls `probe(self, name, value)`, where `value` is a function. Only where the collection
PROBES is mutable, as in `model.apply(..., mutable=[PROBES])`, is it called and its result kept. A
program without probes therefore has no trace of them. `models.model.probed` reads them by layer.

The names have one meaning in all layers:

    input_rms          root mean square of what the first block gets, over valid positions and
                       channels
    rms                the same of the residual stream after a block
    MIXER_rms          the same of what a mixer adds to it
    energy_gate_mean   mean over valid positions of a gate in [0, 1] that a filter's output sets
                       for itself, by channel
    gate_mean          mean over valid positions of any other gate in [0, 1], by channel
    gate_rms           root mean square of a gate of any size, by channel
    beta_mean          mean write strength of a memory, in [0, 1], by head
    clip_share         the share of a memory's writes that were clipped, by head
    memory_norm        mean Euclidean norm of a memory after the last position, by head
    decay              the factor by which a state, a filter or a memory fades from one position
                       to the next, in [0, 1], by state, channel or head
    response           the gain of a filter by frequency, [channels, BANDS]; see the function
    frequency_share    the share of a filter's frequencies that are in use (`train/selection.py`)
    band_share         the share of a wavelet band in the energy of all bands, by band and head
    convolution_share  the weight of the convolution in a frequency feed-forward, in [0, 1]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import filter_axis, shard_op

PROBES = "probes"
BANDS = 64  # into which frequencies are gathered


def probe(module: nn.Module, name: str, value: Callable[[], jax.Array]) -> None:
    """Keeps `value()`, an array of any shape, under the module's path if probes are asked for."""
    if module.is_mutable_collection(PROBES) and not module.is_initializing():
        kept = jax.lax.stop_gradient(value().astype(jnp.float32))
        module.sow(PROBES, name, kept, reduce_fn=_latest, init_fn=lambda: None)


def valid_mean(x: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
    """The float32 mean of x [B, N, ...] over valid positions, all if there is no mask: [...]."""
    x = x.astype(jnp.float32)
    if mask_BN is None:
        return jnp.mean(x, axis=(0, 1))
    weight_BN = mask_BN.astype(jnp.float32)
    # A product by 0 would let a NaN of an invalid position through.
    x = jnp.where(mask_BN.reshape(*mask_BN.shape, *(1,) * (x.ndim - 2)), x, 0.0)
    return jnp.sum(x, axis=(0, 1)) / jnp.maximum(jnp.sum(weight_BN), 1.0)


def channel_rms(x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
    """The float32 root mean square of x over valid positions, by channel: [D]."""
    return jnp.sqrt(valid_mean(jnp.square(x_BND.astype(jnp.float32)), mask_BN))


def valid_rms(x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
    """The same over channels too: []."""
    return jnp.sqrt(jnp.mean(jnp.square(channel_rms(x_BND, mask_BN))))


def response(w_FD: jax.Array) -> jax.Array:
    """The gain of filters in BANDS bands of equal width, root mean squares, float32 [D, BANDS].

    Args:
      w_FD: transfer functions, complex, at F frequencies from 0 to half a cycle per position. With
        fewer frequencies than BANDS each is a band of its own.
    """
    F, D = w_FD.shape
    bands = min(BANDS, F)

    def gathered(square_FD: jax.Array) -> jax.Array:
        index_F = jnp.arange(F) * bands // F
        totals = jax.ops.segment_sum(square_FD, index_F, bands, indices_are_sorted=True)
        counts = jax.ops.segment_sum(jnp.ones(F), index_F, bands, indices_are_sorted=True)
        return jnp.sqrt(totals / counts[:, None]).T

    axis = filter_axis(D)
    square_FD = jnp.square(w_FD.real) + jnp.square(w_FD.imag)
    return shard_op(gathered, [(None, axis)], (axis, None))(square_FD)


def frequency_share(filter_2FD: jax.Array) -> jax.Array:
    """The share of frequencies that a transfer function, as two parts, is not zero at: []."""
    return jnp.mean(jnp.any(filter_2FD != 0, axis=(0, 2)), dtype=jnp.float32)


def response_of_taps(h_DT: jax.Array) -> jax.Array:
    """`response` of causal filters, float32 [D, T]."""
    axis = filter_axis(len(h_DT))
    transform = partial(jnp.fft.rfft, n=2 * h_DT.shape[1], axis=1)
    w_DF = shard_op(transform, [(axis, None)], (axis, None))(h_DT)
    return response(w_DF.T)


def _latest(_: Any, value: jax.Array) -> jax.Array:
    return value
