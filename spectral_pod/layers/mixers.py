"""Mixers by name: the layers through which positions see one another.

A mixer is called with (x_BND, mask_BN) and returns [B, N, D]. A causal one can also decode: called
with the collection `cache` mutable it leaves there what later positions need of these, and called
with a third argument `position` it takes x_B1D as the next position of the sequences in the cache
(`generate/decode.py`).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax.numpy as jnp

from spectral_pod.layers.attention import AttentionLayer, LinearAttentionLayer, LinformerLayer
from spectral_pod.layers.delta_memory import DeltaMemoryLayer
from spectral_pod.layers.fnet import FNetLayer
from spectral_pod.layers.hyena import HyenaLayer
from spectral_pod.layers.s5 import S5Layer
from spectral_pod.layers.selective import SelectiveLayer
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.layers.wavelet_attention import WaveletAttention

Config: TypeAlias = Any  # config.model, frozen


def _spectral(config: Config, deterministic: bool, name: str) -> nn.Module:
    return SpectralLayer(
        max_positions=config.max_positions,
        padding=config.spectral.padding,
        parametrization=config.spectral.parametrization,
        method=config.spectral.method,
        energy_gate=config.spectral.energy_gate,
        kernel_dropout=config.spectral.kernel_dropout,
        kernel_threshold=config.spectral.kernel_threshold,
        deterministic=deterministic,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _delta(config: Config, name: str, *, gated: bool) -> nn.Module:
    return DeltaMemoryLayer(
        num_heads=config.memory.num_heads,
        head_dim=config.memory.head_dim,
        normalize_keys=config.memory.normalize_keys,
        beta_range=(config.memory.beta_min, config.memory.beta_max),
        method=config.memory.method,
        gated=gated,
        short_conv=config.memory.short_conv,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _hyena(config: Config, deterministic: bool, name: str) -> nn.Module:
    return HyenaLayer(
        max_positions=config.max_positions,
        filter=config.hyena.filter,
        decay=config.hyena.decay,
        short_conv=config.hyena.short_conv,
        method=config.long_conv,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _wavelet(config: Config, deterministic: bool, name: str) -> nn.Module:
    return WaveletAttention(
        wavelet=config.wavelet.name,
        levels=config.wavelet.levels,
        num_heads=config.wavelet.num_heads,
        padding=config.wavelet.padding,
        method=config.long_conv,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _attention(config: Config, name: str, *, window: int | None) -> nn.Module:
    return AttentionLayer(
        num_heads=config.attention.num_heads,
        causal=config.causal,
        window=window,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _linear_attention(config: Config, deterministic: bool, name: str) -> nn.Module:
    return LinearAttentionLayer(
        num_heads=config.attention.num_heads,
        causal=config.causal,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _linformer(config: Config, deterministic: bool, name: str) -> nn.Module:
    return LinformerLayer(
        max_positions=config.max_positions,
        num_heads=config.attention.num_heads,
        rank=config.attention.rank,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _fnet(config: Config, deterministic: bool, name: str) -> nn.Module:
    return FNetLayer(max_positions=config.max_positions, dtype=jnp.dtype(config.dtype), name=name)


def _s5(config: Config, deterministic: bool, name: str) -> nn.Module:
    return S5Layer(
        state_dim=config.s5.state_dim,
        causal=config.causal,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


def _selective(config: Config, deterministic: bool, name: str) -> nn.Module:
    return SelectiveLayer(
        max_positions=config.max_positions,
        form=config.selective.form,
        rank=config.selective.rank,
        causal=config.causal,
        filter=config.hyena.filter,
        decay=config.hyena.decay,
        method=config.long_conv if config.causal else config.spectral.method,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


MIXERS: dict[str, Callable[[Config, bool, str], nn.Module]] = {
    "spectral": _spectral,
    "delta": lambda config, deterministic, name: _delta(config, name, gated=False),
    "gated_delta": lambda config, deterministic, name: _delta(config, name, gated=True),
    "hyena": _hyena,
    "selective": _selective,
    "attention": lambda config, deterministic, name: _attention(config, name, window=None),
    "local_attention": lambda config, deterministic, name: _attention(
        config, name, window=config.attention.window
    ),
    "linear_attention": _linear_attention,
    "linformer": _linformer,
    "fnet": _fnet,
    "s5": _s5,
    "wavelet": _wavelet,
}
# They see the whole sequence whatever the model: not for causal ones.
NOT_CAUSAL = frozenset({"spectral", "linformer", "fnet"})


def can_be_causal() -> dict[str, bool]:
    """Of every mixer, whether a causal model may have it."""
    return {name: name not in NOT_CAUSAL for name in MIXERS}


def mixers_of(patterns: tuple[str, ...]) -> set[str]:
    """The mixers that a model of these blocks has."""
    return {name for pattern in patterns for name in pattern.split("+")}
