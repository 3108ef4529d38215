"""One block of a model: norm -> mixer -> residual, norm -> channel mixer -> residual."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from spectral_pod.layers.delta_memory import DeltaMemoryLayer
from spectral_pod.layers.dense import layer_norm
from spectral_pod.layers.feed_forward import GatedFeedForward
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.parallel.sharding import constrain

# Rematerialization of a block in the backward pass: what is kept instead of computed again.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _spectral(config: ml_collections.ConfigDict, deterministic: bool, name: str) -> nn.Module:
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


class _Delta(nn.Module):
    """The delta memory as a mixer: without its state."""

    config: ml_collections.FrozenConfigDict
    gated: bool

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        memory = self.config.memory
        return DeltaMemoryLayer(
            num_heads=memory.num_heads,
            head_dim=memory.head_dim,
            normalize_keys=memory.normalize_keys,
            beta_range=(memory.beta_min, memory.beta_max),
            method=memory.method,
            gated=self.gated,
            dtype=jnp.dtype(self.config.dtype),
            name="memory",
        )(x_BND, mask_BN)[0]


# Mixers by name; each is called with (x_BND, mask_BN) and returns [B, N, D].
MIXERS: dict[str, Callable[[Any, bool, str], nn.Module]] = {
    "spectral": _spectral,
    "delta": lambda config, deterministic, name: _Delta(config, gated=False, name=name),
    "gated_delta": lambda config, deterministic, name: _Delta(config, gated=True, name=name),
}


class Block(nn.Module):
    """The mixers of `pattern`, e.g. 'spectral' or 'spectral+delta', then the channel mixer."""

    config: ml_collections.FrozenConfigDict
    pattern: str
    deterministic: bool

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in the model's dtype."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        for mixer_name in self.pattern.split("+"):
            mixer = MIXERS[mixer_name](config, self.deterministic, mixer_name)
            x_BND = self._residual(x_BND, lambda h, f=mixer: f(h, mask_BN), f"{mixer_name}_norm")
        channel_mixer = GatedFeedForward(
            config.mlp_expansion, config.dropout, self.deterministic, dtype, name="feed_forward"
        )
        return self._residual(x_BND, channel_mixer, "feed_forward_norm")

    def _residual(
        self, x_BND: jax.Array, layer: Callable[[jax.Array], jax.Array], norm: str
    ) -> jax.Array:
        """Pre-norm `x + layer(norm(x))` or post-norm `norm(x + layer(x))`, with dropout."""
        drop = nn.Dropout(self.config.dropout, deterministic=self.deterministic)
        if self.config.norm == "pre":
            x_BND += drop(layer(layer_norm(x_BND, norm).astype(x_BND.dtype)))
        else:
            x_BND = layer_norm(x_BND + drop(layer(x_BND)), norm).astype(x_BND.dtype)
        # Whole between layers: XLA would split it over tensor and gather it for every product.
        return constrain(x_BND, "batch", "position", "width")


class BlockGroup(nn.Module):
    """The blocks of one repeat of a model's pattern; what the scan over layers repeats."""

    config: ml_collections.FrozenConfigDict
    patterns: tuple[str, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> tuple[jax.Array, None]:
        for i, pattern in enumerate(self.patterns):
            x_BND = Block(self.config, pattern, self.deterministic, name=f"block_{i}")(
                x_BND, mask_BN
            )
        return x_BND, None


def block_stack(
    config: ml_collections.FrozenConfigDict,
    patterns: tuple[str, ...],
    deterministic: bool,
    x_BND: jax.Array,
    mask_BN: jax.Array,
) -> jax.Array:
    """Applies `config.num_layers` blocks, `patterns` repeating, scanned and rematerialized.

    Called inside a module's compact method. One compiled group serves every repeat; layers beyond
    the last whole repeat follow as a shorter group of their own.
    """
    group = BlockGroup
    if config.remat != "none":
        # Inside a loop nothing merges what is computed twice; layers written out need to be told.
        group = nn.remat(BlockGroup, prevent_cse=config.unroll > 1, policy=REMAT[config.remat])
    repeats, rest = divmod(config.num_layers, len(patterns))
    if repeats:
        scanned = nn.scan(
            group,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=repeats,
            unroll=min(config.unroll, repeats),
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        x_BND, _ = scanned(config, patterns, deterministic, name="blocks")(x_BND, mask_BN)
    if rest:
        x_BND, _ = group(config, patterns[:rest], deterministic, name="last_blocks")(x_BND, mask_BN)
    return x_BND
