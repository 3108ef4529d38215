"""One block of a model: norm -> mixer -> residual, norm -> channel mixer -> residual."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from spectral_pod.layers.dense import layer_norm
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.parallel.sharding import constrain

# Rematerialization of a block in the backward pass: what is kept instead of computed again.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """The mixers of `pattern`, e.g. 'spectral' or 'spectral+delta', then the channel mixer."""

    config: ml_collections.FrozenConfigDict
    pattern: str
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in the model's dtype; `position`: see `layers/mixers.py`."""
        config = self.config
        context = (mask_BN,) if position is None else (mask_BN, position)
        for name in self.pattern.split("+"):
            mixer = MIXERS[name](config, self.deterministic, name)
            x_BND = self._residual(x_BND, mixer, context, f"{name}_norm")
        mixer = CHANNEL_MIXERS[config.channel_mixer](config, self.deterministic, "feed_forward")
        return self._residual(x_BND, mixer, context, "feed_forward_norm")

    def _residual(
        self, x_BND: jax.Array, layer: nn.Module, context: tuple[jax.Array, ...], norm: str
    ) -> jax.Array:
        """Pre-norm `x + layer(norm(x))` or post-norm `norm(x + layer(x))`, with dropout."""
        drop = nn.Dropout(self.config.dropout, deterministic=self.deterministic)
        if self.config.norm == "pre":
            x_BND += drop(layer(layer_norm(x_BND, norm).astype(x_BND.dtype), *context))
        else:
            x_BND = layer_norm(x_BND + drop(layer(x_BND, *context)), norm).astype(x_BND.dtype)
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
    position: jax.Array | None = None,
) -> jax.Array:
    """Applies `config.num_layers` blocks, `patterns` repeating, scanned and rematerialized.

    Called inside a module's compact method. One compiled group serves every repeat; layers beyond
    the last whole repeat follow as a shorter group of their own. With `config.decoding` every layer
    is a module `layer_i` of its own, with the parameters that `unstack` gives it.
    """
    if config.decoding:
        for i in range(config.num_layers):
            block = Block(config, patterns[i % len(patterns)], deterministic, name=f"layer_{i}")
            x_BND = block(x_BND, mask_BN, position)
        return x_BND
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


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model with a stack of blocks, every layer's by itself as `layer_i`."""
    rest = {name: value for name, value in params.items() if name not in ("blocks", "last_blocks")}
    layers = []
    if "blocks" in params:
        group = params["blocks"]
        repeats = len(jax.tree.leaves(group)[0])
        for r in range(repeats):
            layers += [
                jax.tree.map(lambda x, r=r: x[r], group[f"block_{i}"]) for i in range(len(group))
            ]
    if "last_blocks" in params:
        group = params["last_blocks"]
        layers += [group[f"block_{i}"] for i in range(len(group))]
    return rest | {f"layer_{i}": layer for i, layer in enumerate(layers)}
