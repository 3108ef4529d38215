"""One block of a model: norm -> mixer -> residual, norm -> channel mixer -> residual."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import BatchNorm, LayerNorm
from spectral_pod.layers.dropout import Dropout
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixer import Mixer, State
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.probes import PROBES, probe, valid_rms
from spectral_pod.parallel.sharding import constrain

# Rematerialization of a block: what is stored for the backward pass rather than recomputed.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def mixers_of(config: Architecture) -> dict[str, type[Mixer]]:
    """The classes of a model's mixers, its channel mixer included, by name."""
    names = {name: MIXERS[name] for block in config.pattern for name in block.split("+")}
    return names | {config.channel_mixer: CHANNEL_MIXERS[config.channel_mixer]}


class Block(nn.Module):
    """The mixers of `pattern`, e.g. 'spectral' or 'spectral+delta', then the channel mixer.

    The decode state is the tuple of the mixers' states.
    """

    config: Architecture
    pattern: str
    deterministic: bool

    def setup(self) -> None:
        config = self.config
        classes = {name: MIXERS[name] for name in self.pattern.split("+")}
        both = config.bidirectional and not config.causal
        self.reverse = {
            name: self._make(cls, f"{name}_reverse")
            for name, cls in classes.items()
            if both and cls.one_directional
        }
        channel_mixer = CHANNEL_MIXERS[config.channel_mixer]
        self.gates: dict[str, Any] = {}
        if channel_mixer.within_branch:
            self.gates = {name: self._make(channel_mixer, f"{name}_gate") for name in classes}
        else:
            classes["feed_forward"] = channel_mixer
        self.mixers = {name: self._make(cls, name) for name, cls in classes.items()}
        self.norms = {name: self._norm(f"{name}_norm") for name in classes}
        self.drops = {
            name: Dropout(config.dropout, self.deterministic, name=f"Dropout_{i}")
            for i, name in enumerate(classes)
        }

    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: Any = None, chunked: bool = False
    ) -> tuple[jax.Array, Any]:
        """[B, N, D] to [B, N, D] in the model's dtype, and what is carried on if `chunked`."""
        after: dict[str, Any] = {}
        for name, mixer in self.mixers.items():
            input_BND = self._input(name, x_BND, mask_BN)
            if chunked:
                before = carry[name] if carry else None
                y_BND, after[name] = mixer.extend(input_BND, mask_BN, before)
            else:
                y_BND = mixer(input_BND, mask_BN)
            if name in self.reverse:
                from_end = self.reverse[name](input_BND[:, ::-1], mask_BN[:, ::-1])
                y_BND += from_end[:, ::-1]
            x_BND = self._residual(name, x_BND, y_BND, mask_BN)
        probe(self, "rms", lambda: valid_rms(x_BND, mask_BN))
        return x_BND, after

    def init_state(self, batch: int) -> State:
        return tuple(mixer.init_state(batch) for mixer in self.mixers.values())

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, State]:
        """See `layers/mixer.py`."""
        states = []
        for name, mixer in self.mixers.items():
            y_BPD, state = mixer.prefill(self._input(name, x_BPD), mask_BP)
            x_BPD = self._residual(name, x_BPD, y_BPD)
            states.append(state)
        return x_BPD, tuple(states)

    def advance(
        self, x_B1D: jax.Array, state: State, position: jax.Array
    ) -> tuple[jax.Array, State]:
        """See `layers/mixer.py`."""
        states = []
        for (name, mixer), before in zip(self.mixers.items(), state):
            y_B1D, after = mixer.advance(self._input(name, x_B1D), before, position)
            x_B1D = self._residual(name, x_B1D, y_B1D)
            states.append(after)
        return x_B1D, tuple(states)

    def _make(self, cls: type[Mixer], name: str) -> Mixer:
        return cls.from_config(self.config, deterministic=self.deterministic, name=name)

    def _norm(self, name: str) -> LayerNorm | BatchNorm:
        if self.config.normalization == "batch":
            return BatchNorm(self.deterministic, name=name)
        return LayerNorm(name=name)

    def _input(self, name: str, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        pre_norm = self.config.norm == "pre"
        return self.norms[name](x_BND, mask_BN).astype(x_BND.dtype) if pre_norm else x_BND

    def _residual(
        self, name: str, x_BND: jax.Array, y_BND: jax.Array, mask_BN: jax.Array | None = None
    ) -> jax.Array:
        """Pre-norm `x + layer(norm(x))` or post-norm `norm(x + layer(x))`, with dropout."""
        dtype = x_BND.dtype
        if name in self.gates:
            y_BND = self.gates[name](y_BND, mask_BN)
        probe(self, f"{name}_rms", lambda: valid_rms(y_BND, mask_BN))
        x_BND = x_BND + self.drops[name](y_BND)
        if self.config.norm == "post":
            x_BND = self.norms[name](x_BND, mask_BN).astype(dtype)
        # Left to itself, XLA would split the width over `tensor` and gather it for every product.
        return constrain(x_BND, "batch", "position", "width")


class BlockGroup(nn.Module):
    """The blocks of one repeat of a model's pattern: the body of the scan over layers."""

    config: Architecture
    patterns: tuple[str, ...]
    deterministic: bool
    chunked: bool

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: Any
    ) -> tuple[jax.Array, list[Any]]:
        after = []
        for i, pattern in enumerate(self.patterns):
            block = Block(self.config, pattern, self.deterministic, name=f"block_{i}")
            before = carry[i] if carry else None
            x_BND, carried = block(x_BND, mask_BN, before, self.chunked)
            after.append(carried)
        return x_BND, after


def all_blocks(
    config: Architecture,
    x_BND: jax.Array,
    mask_BN: jax.Array,
    train: bool,
    carry: Any = None,
    chunked: bool = False,
) -> tuple[jax.Array, Any]:
    """Applies `config.num_layers` blocks, stacked unless `config.decoding`.

    To be called in a module's compact method.

    Args:
      config: the architecture.
      x_BND: the input.
      mask_BN: valid positions.
      train: whether dropout is on.
      carry: what the blocks carried on from the chunk before; None for the first.
      chunked: whether x is a chunk of longer sequences.

    Returns:
      The output [B, N, D], and if `chunked` what is carried on to the next chunk.
    """
    after = []
    if config.decoding:
        for i, block in enumerate(separate_blocks(config)):
            x_BND, carried = block(x_BND, mask_BN, carry[i] if carry else None, chunked)
            after.append(carried)
        return x_BND, after
    for i, stack in enumerate(_stacked_blocks(config, not train, chunked)):
        x_BND, carried = stack(x_BND, mask_BN, carry[i] if carry else None)
        after.append(carried)
    return x_BND, after


def _stacked_blocks(config: Architecture, deterministic: bool, chunked: bool) -> list[nn.Module]:
    """`config.num_layers` blocks that repeat the pattern, scanned and rematerialized.

    The group of one repeat is compiled once for all repeats; layers beyond the last whole repeat
    form a shorter group. Each module takes (x_BND, mask_BN, carry) and returns (x_BND, carry).
    """
    group, patterns = BlockGroup, config.pattern
    if config.remat != "none":
        # XLA does not merge the recomputation in a loop's body with the forward pass; if the loop
        # is unrolled, this must be prevented.
        group = nn.remat(BlockGroup, prevent_cse=config.unroll > 1, policy=REMAT[config.remat])
    repeats, rest = divmod(config.num_layers, len(patterns))
    stack = []
    if repeats:
        scanned = nn.scan(
            group,
            variable_axes={"params": 0, "metrics": 0, "statistics": 0, PROBES: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=repeats,
            unroll=min(config.unroll, repeats),
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        stack.append(scanned(config, patterns, deterministic, chunked, name="blocks"))
    if rest:
        stack.append(group(config, patterns[:rest], deterministic, chunked, name="last_blocks"))
    return stack


def separate_blocks(config: Architecture) -> list[Block]:
    """The same blocks, each a module of its own, for decoding with parameters from `unstack`.

    To be called in a module's compact method.
    """
    patterns = config.pattern
    return [
        Block(config, patterns[i % len(patterns)], True, name=f"layer_{i}")
        for i in range(config.num_layers)
    ]


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits the parameters of stacked blocks into those of each layer, under `layer_i`."""
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
