"""Decoding byte after byte: SpectralGPT of 6 layers and width 256, batch 1, float32.

Sides: the decoder (`generate/decode.py`); the same model with each long convolution as a dot
product with all inputs so far; the whole prefix computed again for every byte; and the model
without long convolutions, which is what there is to reach. Group: decode.
"""

import functools
from collections.abc import Callable
from typing import Any
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
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops.online_conv import BLOCK
from tools.bench.settings import Settings
from tools.bench.timing import Case, Comparison, Group, Ratio, Row, Seconds, timed, times_faster

_SAMPLE = 64  # positions of a stage that are run
_NUM_CLASSES = 257
_SHORT, _LONG = 1024, 16_384


def groups(settings: Settings) -> list[Group]:
    size = (2, 16, 128, 256, 2) if settings.quick else (6, 256, _SHORT, _LONG, 8)
    return [Group("decode", 1, functools.partial(_decode, *size))]


def _decode(layers: int, width: int, short: int, long: int, stages: int) -> Comparison:
    def case(name: str, what: str, num_bytes: int, run: Callable[[], Seconds]) -> Case:
        shape = f"layers={layers} D={width} N={num_bytes}"
        return Case(name, what, shape, run, "", work={"bytes": num_bytes})

    model = functools.partial(_Model, layers, width)
    what = {
        "online": "tiles by FFT, in blocks of 32 from the host",
        "cached": f"dot product with all inputs so far, in {stages} stages",
        "recomputed": "the prefix again for every byte, at the price of the mean one",
        "no_convolution": "the same model without long convolutions",
    }
    cases = [
        case(f"{name}_{named}", what[name], num_bytes, run(model, num_bytes))
        for name, run, named, num_bytes in (
            ("online", _online, _SHORT, short),
            ("online", _online, _LONG, long),
            ("cached", functools.partial(_cached, stages), _LONG, long),
            ("recomputed", _recomputed, _SHORT, short),
            ("no_convolution", _without, _SHORT, short),
        )
    ]

    def speed(rows: Any, name: str) -> float:
        row: Row = rows[name]
        return row.rates["bytes"]

    online, without = f"online_{_LONG}", f"no_convolution_{_SHORT}"
    return Comparison(
        cases,
        [
            times_faster(f"online_vs_cached_dot_{_LONG}", online, f"cached_{_LONG}", ">= 25"),
            times_faster(
                f"online_vs_recompute_{_SHORT}", f"online_{_SHORT}", f"recomputed_{_SHORT}"
            ),
            Ratio(
                f"speed_{_LONG}_vs_{_SHORT}",
                lambda rows: speed(rows, online) / speed(rows, f"online_{_SHORT}"),
                ">= 0.5",
            ),
            Ratio(
                f"speed_{_LONG}_vs_no_convolution",
                lambda rows: speed(rows, online) / speed(rows, without),
                ">= 0.45",
            ),
        ],
    )


class _Model:
    """The model for N positions with one form of its long convolutions, and its parameters."""

    def __init__(self, layers: int, width: int, length: int, form: str = "hyena"):
        config = config_lib.default()
        # A form has a name of its own, as programs are cached by a model's configuration.
        pattern = (form, f"{form}+delta")
        fields = {"name": "spectral_gpt", "num_layers": layers, "hidden_dim": width}
        fields |= {"pattern": pattern, "dtype": "float32", "positions": "none"}
        config.update_from_flattened_dict({f"model.{k}": v for k, v in fields.items()})
        self.module = models.build(config, seq_len=length, num_classes=_NUM_CLASSES, decoding=True)
        tokens_BL = jnp.zeros((1, BLOCK), jnp.int32)
        init = jax.jit(self.module.init)
        self.params = nn.unbox(init(jax.random.key(0), tokens_BL, tokens_BL == 0)["params"])

    def decode(self, num_bytes: int) -> jax.Array:
        """Draws that many bytes after a prompt of one block, whole blocks of them."""
        decoder = Decoder(self.module, self.params, np.zeros((1, BLOCK)), num_positions=num_bytes)
        keys_B = jax.random.split(jax.random.key(0), 1)
        token_B = jnp.zeros(1, jnp.int32)
        for drawn in range(0, num_bytes, BLOCK):
            token_B = decoder.extend(token_B, keys_B, drawn, Sampling())[:, -1]
        return token_B


def _online(model: Any, num_bytes: int) -> Callable[[], Seconds]:
    return functools.partial(timed, model(num_bytes).decode, num_bytes - BLOCK)


def _without(model: Any, num_bytes: int) -> Callable[[], Seconds]:
    return _with(_NoConvolution, model, num_bytes, num_bytes - BLOCK)


def _cached(stages: int, model: Any, num_bytes: int) -> Callable[[], Seconds]:
    """O(t) a position, in stages that touch no more than the inputs up to their own end.

    All positions of a stage cost the same, so some of them are run, and counted for all.
    """
    length = num_bytes // stages
    sample = min(_SAMPLE, length)
    runs = [
        _with(_CachedConvolution, model, (stage + 1) * length, sample) for stage in range(stages)
    ]

    def run() -> Seconds:
        took = [run() for run in runs]
        total = Seconds(sum(t.wall for t in took), sum(t.cpu for t in took))
        return _times(length // sample, total)

    return run


def _with(form: type[nn.Module], model: Any, length: int, num_bytes: int) -> Callable[[], Seconds]:
    """A repetition with another form of long convolution, which is compiled here."""
    name = form.__name__
    MIXERS[name] = lambda config, deterministic, _: MIXERS["hyena"](config, deterministic, name)
    with mock.patch.object(hyena, "LongConvolution", form):
        made = model(length, name)
        made.decode(num_bytes)
    return functools.partial(timed, made.decode, num_bytes)


def _recomputed(model: Any, num_bytes: int) -> Callable[[], Seconds]:
    """N forward passes over the prefix of N/2 bytes."""
    made = model(num_bytes)
    tokens_BL = jnp.zeros((1, num_bytes // 2), jnp.int32)

    @jax.jit
    def prefix(params: Any, tokens_BL: jax.Array) -> jax.Array:
        logits_BLC = made.module.apply({"params": params}, tokens_BL, tokens_BL == 0)
        return logits_BLC[:, -1]

    return lambda: _times(num_bytes, timed(prefix, made.params, tokens_BL))


class _NoConvolution(hyena.LongConvolution):
    """What goes in comes out."""

    @nn.compact
    def __call__(self, v_BND: jax.Array, position: jax.Array | None = None) -> jax.Array:
        return v_BND


class _CachedConvolution(hyena.LongConvolution):
    """A dot product with all inputs so far."""

    @nn.compact
    def __call__(self, v_BND: jax.Array, position: jax.Array | None = None) -> jax.Array:
        N, D = self.num_taps, v_BND.shape[-1]
        if position is None:
            filters = hyena.CausalFilter(N, self.parametrization, self.decay, name="filter")
            # Back to front, and zeros for the inputs that are still to come.
            self.put_variable("cache", "reversed", jnp.pad(filters(D).T[::-1], ((0, N), (0, 0))))
            self.put_variable("cache", "seen", jnp.zeros((N, D)))
            return v_BND
        seen_ND = jax.lax.dynamic_update_slice(
            self.get_variable("cache", "seen"), v_BND[0], (position, 0)
        )
        self.put_variable("cache", "seen", seen_ND)
        reversed_ND = self.get_variable("cache", "reversed")
        aligned_ND = jax.lax.dynamic_slice(reversed_ND, (N - 1 - position, 0), (N, D))
        return jnp.sum(aligned_ND * seen_ND, 0)[None, None]


def _times(count: int, one: Seconds) -> Seconds:
    return Seconds(wall=count * one.wall, cpu=count * one.cpu)
