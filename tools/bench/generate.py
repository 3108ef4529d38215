"""Decoding byte by byte: SpectralGPT with 6 layers of width 256, batch 1, float32.

Cases: the decoder (`generate/decode.py`); the same model with each long convolution computed as a
dot product with all inputs so far; the whole prefix recomputed for every byte; and the model
without long convolutions, an upper bound. Group: decode.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.generate.decode import Decoder
from spectral_pod.generate.sampling import Sampling
from spectral_pod.layers import hyena
from spectral_pod.layers.long_convolution import LongConvolution
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops.online_conv import BLOCK

from .settings import Settings
from .timing import Case, Comparison, Group, Ratio, Row, Seconds, timed

_SAMPLE = 64  # positions of a stage that are timed
_NUM_CLASSES = 257
_SHORT, _LONG = 1024, 16_384


def groups(settings: Settings) -> list[Group]:
    size = (2, 16, 128, 256, 2) if settings.quick else (6, 256, _SHORT, _LONG, 8)
    return [Group("decode", 1, functools.partial(_decode, *size))]


def _decode(layers: int, width: int, short: int, long: int, stages: int) -> Comparison:
    def case(name: str, what: str, length: int, run: Callable[[], Seconds], timed: int) -> Case:
        shape = f"layers={layers} D={width} N={length}"
        return Case(name, what, shape, run, "", work={"bytes": timed})

    model = functools.partial(Model, layers, width)
    shorter, longer = short - 2 * BLOCK, long - 2 * BLOCK  # without the prompt and a first block
    without = _with(_NoConvolution, model, short, shorter)
    cases = [
        case(
            f"online_{_SHORT}",
            "tiles by FFT, in blocks of 32 from the host",
            short,
            functools.partial(model(short).decode, shorter),
            shorter,
        ),
        case(
            f"online_{_LONG}",
            "the same",
            long,
            functools.partial(model(long).decode, longer),
            longer,
        ),
        case(
            f"cached_{_LONG}",
            f"dot product with all inputs so far, in {stages} stages",
            long,
            _cached(stages, model, long),
            long,
        ),
        case(
            f"recomputed_{_SHORT}",
            "the prefix again for every byte, at the cost of the mean one",
            short,
            _recomputed(model, short),
            short,
        ),
        case("no_convolution", "without long convolutions", short, without, shorter),
    ]

    def speeds(name: str, fast: str, slow: str, target: str = "") -> Ratio:
        def of(rows: Mapping[str, Row]) -> float:
            return rows[fast].rates["bytes"] / rows[slow].rates["bytes"]

        return Ratio(name, of, target)

    online = f"online_{_LONG}"
    return Comparison(
        cases,
        [
            speeds(f"online_vs_cached_dot_{_LONG}", online, f"cached_{_LONG}", ">= 25"),
            speeds(f"speed_{_LONG}_vs_{_SHORT}", online, f"online_{_SHORT}", ">= 0.5"),
            speeds(f"speed_{_LONG}_vs_no_convolution", online, "no_convolution", ">= 0.45"),
            speeds(f"online_vs_recompute_{_SHORT}", f"online_{_SHORT}", f"recomputed_{_SHORT}"),
        ],
    )


class Model:
    """The model for N positions with one form of long convolution, and some parameters.

    They are drawn without a program that initializes them, as no time depends on their values.
    """

    sizes: ClassVar[dict[str, int]] = {"num_classes": _NUM_CLASSES}

    def __init__(self, layers: int, width: int, length: int, form: str = "hyena"):
        config: Any = config_lib.default()
        # Each form has its own name, as programs are cached by a model's configuration.
        pattern = (form, f"{form}+delta")
        fields = {"name": "spectral_gpt", "num_layers": layers, "hidden_dim": width}
        fields |= {"pattern": pattern, "dtype": "float32", "positions": "none"}
        config.update_from_flattened_dict({f"model.{k}": v for k, v in fields.items()})
        self.module = models.build(config, seq_len=length, decoding=True, **self.sizes)
        tokens_BL = jnp.zeros((1, BLOCK), jnp.int32)
        init = functools.partial(self.module.init, jax.random.key(0), tokens_BL, tokens_BL == 0)
        shapes = nn.unbox(jax.eval_shape(init)["params"])
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda x: jnp.float32(0.02 * rng.normal(size=x.shape)), shapes)

    def decode(self, num_bytes: int) -> Seconds:
        """Samples that many bytes, in whole blocks.

        The prompt, the preparation of the filters and a first block are not timed.
        """
        room = BLOCK + num_bytes
        decoder = Decoder(self.module, self.params, np.zeros((1, BLOCK)), num_positions=room)
        keys_B = jax.random.split(jax.random.key(0), 1)

        def draw(token_B: jax.Array, blocks: range) -> jax.Array:
            for block in blocks:
                tokens_BT = decoder.extend(token_B, keys_B, block * BLOCK, Sampling())
                token_B = tokens_BT[:, -1]
            return token_B

        token_B = jax.block_until_ready(draw(jnp.zeros(1, jnp.int32), range(1)))
        return timed(draw, token_B, range(1, 1 + num_bytes // BLOCK))


def _cached(stages: int, model: Any, num_bytes: int) -> Callable[[], Seconds]:
    """O(t) per position, in stages that read only the inputs up to the end of the stage.

    All positions of a stage cost the same, so some of them are timed and extrapolated.
    """
    length = num_bytes // stages
    sample = min(_SAMPLE, length)
    runs = [
        _with(_CachedConvolution, model, (stage + 1) * length, sample) for stage in range(stages)
    ]

    def run() -> Seconds:
        times = [run() for run in runs]
        total = Seconds(sum(t.wall for t in times), sum(t.cpu for t in times))
        return _times(length // sample, total)

    return run


def _with(form: type[nn.Module], model: Any, length: int, num_bytes: int) -> Callable[[], Seconds]:
    """A repetition with another form of long convolution, compiled beforehand."""
    name = form.__name__
    MIXERS[name] = type(name, (hyena.HyenaLayer,), {})
    with mock.patch.object(hyena, "LongConvolution", form):
        built = model(length, name)
        built.decode(num_bytes)
    return functools.partial(built.decode, num_bytes)


def _recomputed(model: Any, num_bytes: int) -> Callable[[], Seconds]:
    """N forward passes over the prefix of N/2 bytes."""
    built = model(num_bytes)
    tokens_BL = jnp.zeros((1, num_bytes // 2), jnp.int32)

    @jax.jit
    def prefix(params: Any, tokens_BL: jax.Array) -> jax.Array:
        logits_BLC = built.module.apply({"params": params}, tokens_BL, tokens_BL == 0)
        return logits_BLC[:, -1]

    return lambda: _times(num_bytes, timed(prefix, built.params, tokens_BL))


class _NoConvolution(LongConvolution):
    """The identity."""

    def __call__(self, v_BND: jax.Array) -> jax.Array:
        return v_BND

    def prefill(self, v_BPD: jax.Array) -> Any:
        return v_BPD, ()

    def advance(self, v_B1D: jax.Array, state: Any, position: jax.Array) -> Any:
        return v_B1D, state


class _CachedConvolution(LongConvolution):
    """A dot product with all inputs so far."""

    def __call__(self, v_BND: jax.Array) -> jax.Array:
        return self.prefill(v_BND)[0]

    def prefill(self, v_BPD: jax.Array) -> Any:
        h_DT = self.filter(self.width)
        # Reversed, with zeros for the inputs that are still to come.
        reversed_ND = jnp.pad(h_DT.T[::-1], ((0, self.num_taps), (0, 0)))
        return v_BPD, (reversed_ND, jnp.zeros((self.num_taps, self.width)))

    def advance(self, v_B1D: jax.Array, state: Any, position: jax.Array) -> Any:
        reversed_ND, seen_ND = state
        seen_ND = jax.lax.dynamic_update_slice(seen_ND, v_B1D[0], (position, 0))
        start = (self.num_taps - 1 - position, 0)
        aligned_ND = jax.lax.dynamic_slice(reversed_ND, start, seen_ND.shape)
        return jnp.sum(aligned_ND * seen_ND, 0)[None, None], (reversed_ND, seen_ND)


def _times(count: int, one: Seconds) -> Seconds:
    return Seconds(wall=count * one.wall, cpu=count * one.cpu)
