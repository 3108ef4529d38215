"""Activations and filters by frequency: the energy of bands, and filters without one of them.

The bands are the thirds of the frequencies from 0 to 1/2 cycle per position.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pywt
import scipy.linalg

from spectral_pod.layers.long_convolution import CausalFilter
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.probes import PROBES
from spectral_pod.layers.selective import SelectiveLayer
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.models.model import Model
from spectral_pod.ops.wavelet import wavedec

BANDS = {"low": (0, 1 / 6), "middle": (1 / 6, 1 / 3), "high": (1 / 3, 1 / 2)}  # cycles per position
WAVELET = "db4"  # of the levels of activations

Filters = Mapping[str, Any]  # arrays


def band_energies(x_BND: jax.Array, mask_BN: jax.Array) -> dict[str, jax.Array]:
    """The energy of valid positions and its shares by frequency along the positions.

    Returns:
      float32 scalars: 'rms', over valid positions and channels; the shares of BANDS, which add up
      to 1; and 'constant', the share of the frequency 0, which 'low' includes.
    """
    x_BND = jnp.where(mask_BN[..., None], x_BND.astype(jnp.float32), 0.0)
    length = x_BND.shape[1]
    square_BFD = jnp.square(jnp.abs(jnp.fft.rfft(x_BND, axis=1)))
    energy_F = jnp.sum(square_BFD, axis=(0, 2))
    # All frequencies but 0 and 1/2 stand for their negatives as well.
    twice_F = np.full(len(energy_F), 2.0, np.float32)
    twice_F[0] = 1
    if length % 2 == 0:
        twice_F[-1] = 1
    energy_F = energy_F * twice_F
    total = jnp.maximum(jnp.sum(energy_F), jnp.finfo(jnp.float32).tiny)
    frequency_F = np.fft.rfftfreq(length)
    shares = {
        name: jnp.sum(jnp.where(_in_band(frequency_F, name), energy_F, 0.0)) / total
        for name in BANDS
    }
    count = jnp.maximum(jnp.sum(mask_BN), 1).astype(jnp.float32) * x_BND.shape[2]
    rms = jnp.sqrt(jnp.sum(jnp.square(x_BND)) / count)
    return {"rms": rms, **shares, "constant": energy_F[0] / total}


def level_energies(x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """The shares of the levels of PyWavelets' decimated transform `wavedec`, which add up to 1.

    The transform, of WAVELET along the positions, is orthonormal (mode 'periodization').

    Returns:
      float32 [levels + 1]: the approximation, then the details from coarse to fine. There are as
      many levels as the length allows, at least one.
    """
    x_BND = jnp.where(mask_BN[..., None], x_BND.astype(jnp.float32), 0.0)
    levels = max(1, pywt.dwt_max_level(x_BND.shape[1], pywt.Wavelet(WAVELET).dec_len))
    coefficients = wavedec(x_BND, WAVELET, levels, "periodization")
    energies = jnp.stack([jnp.sum(jnp.square(c)) for c in coefficients])
    return energies / jnp.maximum(jnp.sum(energies), jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, static_argnums=0)
def observed(model: Model, params: Any, tokens_BL: jax.Array, mask_BL: jax.Array) -> Any:
    """(by mixer and side its `band_energies` and `level_energies`; the probes that layers sow).

    Args:
      model: with its layers unstacked; of one that reads chunks, the first chunk is observed.
    """
    found: dict[str, Any] = {}
    if model.config.chunk:
        tokens_BL, mask_BL = (x[:, : model.config.chunk] for x in (tokens_BL, mask_BL))

    def observe(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y_BND, module = next_function(*args, **kwargs), context.module
        # A channel mixer may consist of others, which are further down.
        is_mixer = isinstance(module, Mixer) and len(module.path) == 2
        if is_mixer and context.method_name == "__call__":
            x_BND = args[0]
            mask_BN = args[1] if len(args) > 1 else jnp.ones(x_BND.shape[:2], bool)
            found["/".join(module.path)] = {
                side: (band_energies(z_BND, mask_BN), level_energies(z_BND, mask_BN))
                for side, z_BND in (("input", x_BND), ("output", y_BND))
            }
        return y_BND

    with nn.intercept_methods(observe):
        _, sown = model.apply({"params": params}, tokens_BL, mask_BL, mutable=[PROBES])
    return found, sown.get(PROBES, {})


# ---- Filters


def learned_filters(model: Model, params: Any, tokens_BL: jax.Array, mask_BL: jax.Array) -> Filters:
    """The learned filters of a model with unstacked layers, by the path of their module.

    Returns:
      Of a causal filter its taps, float32 [D, T]; of others the transfer function, complex64 [F, D]
      at equidistant frequencies from 0 to 1/2. Recurrences, short convolutions and fixed wavelets
      are none of these.
    """
    found: dict[str, jax.Array] = {}

    def keep(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_function(*args, **kwargs)
        if _gives_filter(context):
            found["/".join(context.module.path)] = result
        elif _holds_filter(context):
            transfer = context.module.transfer
            found["/".join(context.module.path)] = jax.lax.complex(transfer[0], transfer[1])
        return result

    def all_filters(params: Any) -> Filters:
        with nn.intercept_methods(keep):
            model.apply({"params": params}, tokens_BL, mask_BL)
        return found

    return jax.jit(all_filters)(params)


@contextlib.contextmanager
def with_filters(params: Any, filters: Filters) -> Iterator[Any]:
    """Models applied within have these filters, as `learned_filters` returns them.

    Yields:
      the parameters to apply them with, in place of `params`.
    """

    def replace(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        given = filters.get("/".join(context.module.path))
        if given is not None and _gives_filter(context):
            return given
        return next_function(*args, **kwargs)

    for path, given in filters.items():
        layer, mixer = path.split("/")[:2]
        own = params[layer][mixer]
        if jnp.iscomplexobj(given) and own["filter"].ndim == 3:  # a transfer function itself
            own = own | {"filter": jnp.stack([given.real, given.imag])}
            params = params | {layer: params[layer] | {mixer: own}}
    with nn.intercept_methods(replace):
        yield params


def without_band(filter: jax.Array, band: str) -> np.ndarray:
    """A filter of `learned_filters` without a band of frequencies.

    A transfer function is zero in the band. Causal taps become those nearest to them, in the sense
    of least squares, that have almost no energy in the band: h minimises |h - h'|^2 + 10^4 times
    the energy in the band, as no causal filter is zero there.
    """
    given: np.ndarray = np.asarray(filter)
    if np.iscomplexobj(given):
        frequency_F = np.linspace(0, 0.5, len(given))
        return np.where(_in_band(frequency_F, band)[:, None], 0, given)
    taps_TD = given.T.astype(np.float64)
    taps_TD = scipy.linalg.cho_solve(_penalty(len(taps_TD), band), taps_TD)
    return taps_TD.T.astype(np.float32)


@functools.lru_cache(maxsize=3)
def _penalty(length: int, band: str) -> Any:
    """The Cholesky factors of the normal equations: I + 10^4 R with the energy h^T R h of taps."""
    low, high = BANDS[band]
    lag_T = np.arange(length)
    autocorrelation_T = 2 * (high * np.sinc(2 * high * lag_T) - low * np.sinc(2 * low * lag_T))
    matrix = scipy.linalg.toeplitz(1e4 * autocorrelation_T)
    matrix[np.diag_indices(length)] += 1
    return scipy.linalg.cho_factor(matrix, overwrite_a=True)


def _in_band(frequency_F: np.ndarray, band: str) -> np.ndarray:
    low, high = BANDS[band]
    is_last = high == 1 / 2
    return (frequency_F >= low) & ((frequency_F < high) | is_last)


def _gives_filter(context: Any) -> bool:
    """Whether a method of a module returns a learned filter."""
    module, method = context.module, context.method_name
    return (isinstance(module, CausalFilter) and method == "__call__") or (
        isinstance(module, SpectralLayer) and method == "_transfer"
    )


def _holds_filter(context: Any) -> bool:
    """Whether a called module holds a learned transfer function itself."""
    module = context.module
    is_selective = isinstance(module, SelectiveLayer) and context.method_name == "__call__"
    return is_selective and module.form == "low_rank" and not module.causal
