"""Every mixer: causality, masks and decoding; the baselines against references in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.config import default
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.mixer import GrowingState
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.selective import BLOCK
from tests.models.drawn import drawn

WIDTH, HEADS, WINDOW, RANK, MAX_POSITIONS = 8, 2, 6, 5, 150
SMALL = {
    "dtype": "float32",
    "hyena.filter": "implicit",
    "wavelet.num_heads": HEADS,
    "attention.num_heads": HEADS,
    "attention.window": WINDOW,
    "attention.rank": RANK,
    "s5.state_dim": 6,
    "s5.blocks": 3,
    "selective.rank": 3,
    "scales.ratios": (4, 3),
    "memory.num_heads": HEADS,
    "memory.head_dim": 4,
    "memory.method": "recurrent",  # compiles fastest; both methods agree (tests/ops)
}
CAUSAL = sorted(name for name, mixer in MIXERS.items() if mixer.can_be_causal)
NOT_CAUSAL = MIXERS.keys() - set(CAUSAL)
# These depend on `causal`; of the others, those in NOT_CAUSAL are never causal, the rest always.
EITHER = ["attention", "linear_attention", "local_attention", "s5", "selective"]
ALL = [*((name, True) for name in CAUSAL), *((name, False) for name in sorted(NOT_CAUSAL))]
ALL += [(name, False) for name in EITHER]
# FFTs spread rounding errors over all positions; the other mixers have exactly zero gradient.
BY_FFT = ("hyena", "selective", "wavelet")


@functools.cache
def make(name, causal, **overrides):
    """(the module, parameters, jitted apply(x, mask) with them)."""
    model = default().model
    model.update_from_flattened_dict(
        SMALL | {k.replace("__", "."): v for k, v in overrides.items()}
    )
    config = Architecture.of(
        model.to_dict(), hidden_dim=WIDTH, max_positions=MAX_POSITIONS, causal=causal
    )
    module = MIXERS[name].from_config(config, deterministic=True, name="mixer")
    x, mask = np.zeros((1, MAX_POSITIONS, WIDTH), np.float32), np.ones((1, MAX_POSITIONS), bool)
    key = jax.random.key(0)
    params = drawn(jax.eval_shape(module.init, key, x, mask).get("params", {}))
    apply = functools.partial(jax.jit(module.apply), {"params": params})
    return module, params, lambda *inputs: np.asarray(apply(*inputs))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(actual, expected, where=None, tolerance=1e-4):
    actual, expected = np.asarray(actual), np.asarray(expected)
    if where is not None:
        actual, expected = actual[where], expected[where]
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def leak(name, causal, rows, length, **overrides):
    """The largest gradients of the outputs up to a random position, by later and other inputs."""
    module, params, _ = make(name, causal, **overrides)
    last = np.random.default_rng(length).integers(length // 3, length - 1)

    @jax.jit
    def gradient(params, x, dy):
        mask = jnp.ones(x.shape[:2], bool)
        return jax.vjp(lambda x: module.apply({"params": params}, x, mask), x)[1](dy)[0]

    dy = draw(rows, length, WIDTH, seed=1)
    dy[:, last + 1 :] = 0
    dx = np.abs(gradient(params, draw(rows, length, WIDTH), dy))
    return dx[:, last + 1 :].max(), dx[:, : last + 1].max()


@pytest.mark.parametrize(
    ("rows", "length"), [(3, 149), pytest.param(1, 37, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mixers_never_see_the_future(name, rows, length):
    after, before = leak(name, True, rows, length)
    assert before > 1e-3
    assert after <= (1e-5 * before if name in BY_FFT else 0)


def test_the_broadcast_form_of_a_causal_selective_mixer_never_sees_the_future():
    assert leak("selective", True, 2, 149, selective__form="broadcast")[0] == 0


@pytest.mark.parametrize("name", [*sorted(NOT_CAUSAL), *EITHER])
def test_the_others_see_it(name):
    after, before = leak(name, False, 2, 37)
    assert after > 1e-3 * before


@pytest.mark.parametrize(("name", "causal"), ALL)
def test_padding_changes_nothing(name, causal):
    """Right padding for all mixers, left padding for causal ones too, whatever its content."""
    _, _, apply = make(name, causal)
    x, places = draw(2, 137, WIDTH), np.arange(137)
    lengths = np.array([[101], [70]])
    short = apply(x[:, :101], places[:101] < lengths)
    right = apply(x, places < lengths)
    valid = places[:101] < lengths
    assert_close(right[:, :101], short, valid, tolerance=1e-5)
    if causal:
        shifted = np.stack([np.roll(row, 137 - n, axis=0) for row, (n,) in zip(x, lengths)])
        left = np.array(apply(shifted, places >= 137 - lengths))
        back = np.stack([np.roll(row, n - 137, axis=0) for row, (n,) in zip(left, lengths)])
        assert_close(back[:, :101], short, valid, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), ALL)
def test_bfloat16_stays_finite_and_near(name, causal):
    x, mask = draw(2, 101, WIDTH), np.arange(101) < [[101], [1]]
    got = make(name, causal, dtype="bfloat16")[2](x.astype(jnp.bfloat16), mask)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(make(name, causal)[2](x, mask))
    got = np.asarray(got.astype(jnp.float32))
    assert np.isfinite(got).all()
    error = np.linalg.norm((got - want)[mask]) / np.linalg.norm(want[mask])
    assert error < 0.05


@pytest.mark.parametrize("name", ["delta", "gated_delta", *EITHER])
def test_steps_continue_a_prompt(name):
    """Mixers with long convolutions need the decoder; 'selective' is tested in its form without."""
    overrides = {"selective__form": "broadcast"} if name == "selective" else {}
    module, params, apply = make(name, True, **overrides)
    prompt, length = 50, 80
    # What comes after `length` changes nothing; so long a program is needed by other tests, too.
    x, mask = draw(2, 137, WIDTH), np.arange(137) >= [[0], [21]]
    variables = {"params": params}
    prefill = jax.jit(functools.partial(module.apply, method="prefill"))
    step = jax.jit(functools.partial(module.apply, method="advance"))

    def steps(state, first):
        if isinstance(state, GrowingState):
            state = state.extend(length)
        for position in range(first, length):
            y, state = step(variables, x[:, position : position + 1], state, position)
            yield y

    y, state = prefill(variables, x[:, :prompt], mask[:, :prompt])
    whole = apply(x, mask)
    assert_close(y, whole[:, :prompt], mask[:, :prompt], tolerance=1e-5)
    outputs = np.concatenate(list(steps(state, prompt)), axis=1)
    assert_close(outputs, whole[:, prompt:length], tolerance=1e-5)
    # Without a prompt.
    state = module.apply(variables, 2, method="init_state")
    outputs = np.concatenate(list(steps(state, 0)), axis=1)
    assert_close(outputs, apply(x, np.ones_like(mask))[:, :length], tolerance=1e-5)


# ---- References in float64


def dense(params, x, num_in=1):
    kernel = np.float64(params["kernel"])
    return np.tensordot(x, kernel, num_in) + np.float64(params.get("bias", 0.0))


def heads(params, x):
    q, k, v = np.moveaxis(dense(params["query_key_value"], x), 3, 0)
    if "query_value_bias" in params:  # softmax attention has no bias of keys
        bias = np.float64(params["query_value_bias"])
        q, v = q + bias[:, 0], v + bias[:, 1]
    return q, k, v


def softmax(scores, seen):
    weights = np.where(seen, np.exp(np.where(seen, scores, 0)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def seen_from(mask, causal, near=lambda lag: True):
    """[B, H=1, N, N]"""
    n = np.arange(mask.shape[1])
    lag = n[:, None] - n
    return (mask[:, None] & (near(lag) & ((lag >= 0) | (not causal))))[:, None]


def attention(params, x, mask, causal, near=lambda lag: True):
    q, k, v = heads(params, x)
    scores = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(WIDTH / HEADS)
    weights = softmax(scores, seen_from(mask, causal, near))
    return dense(params["out"], np.einsum("bhnm,bmhk->bnhk", weights, v), 2)


def local_attention(params, x, mask, causal):
    if causal:
        return attention(params, x, mask, True, lambda lag: lag < WINDOW)
    return attention(params, x, mask, False, lambda lag: (lag <= 3) & (lag >= -2))


def linear_attention(params, x, mask, causal):
    q, k, v = heads(params, x)
    q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    weights = np.einsum("bnhk,bmhk->bhnm", q, k) * seen_from(mask, causal)
    weights /= weights.sum(-1, keepdims=True) + 1e-6
    return dense(params["out"], np.einsum("bhnm,bmhk->bnhk", weights, v), 2)


def linformer(params, x, mask, causal):
    q, k, v = heads(params, x)
    k, v = (
        np.einsum(
            "bnhk,nr->brhk", a * mask[..., None, None], np.float64(params[name])[: x.shape[1]]
        )
        for a, name in ((k, "key_combinations"), (v, "value_combinations"))
    )
    scores = np.einsum("bnhk,brhk->bhnr", q, k) / np.sqrt(WIDTH / HEADS)
    weights = softmax(scores, np.ones_like(scores, bool))
    return dense(params["out"], np.einsum("bhnr,brhk->bnhk", weights, v), 2)


def fnet(params, x, mask, causal):
    dft_n, dft_d = (
        np.exp(-2j * np.pi * np.outer(np.arange(m), np.arange(m)) / m) / np.sqrt(m)
        for m in (MAX_POSITIONS, WIDTH)
    )
    length = x.shape[1]
    x = x * mask[..., None]
    return np.einsum("nm,bmd,de->bne", dft_n[:length, :length], x, dft_d).real


def s5(params, x, mask, causal):
    x, p = x * mask[..., None], jax.tree.map(np.float64, params)
    eigenvalue, step = p["ssm_lambda"][0] + 1j * p["ssm_lambda"][1], np.exp(p["ssm_log_step"])
    a = np.exp(eigenvalue * step)
    b = (a - 1) / eigenvalue * (p["ssm_b"][:, 0] + 1j * p["ssm_b"][:, 1])

    def scan(x, name):
        c, state, y = p[name][0] + 1j * p[name][1], 0, []
        for n in range(x.shape[1]):
            state = a * state + x[:, n] @ b
            y.append(2 * (state @ c).real)
        return np.stack(y, 1)

    y = scan(x, "readout") + p["skip"] * x
    return y if causal else y + scan(x[:, ::-1], "readout_reverse")[:, ::-1]


def context(params, mean):
    h = dense(params["context_hidden"], mean)
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return dense(params["context_out"], h)


def contexts(params, x, mask, causal):
    """[B, N, R] by definition, one position at a time."""
    rows = []
    for row, valid in zip(x, mask):
        c = []
        for n in range(len(row)):
            index = valid[: n + 1].sum() - 1
            before = row[valid][: max(index, 0) // BLOCK * BLOCK] if causal else row[valid]
            c.append(context(params, before.mean(0) if len(before) else np.zeros(WIDTH)))
        rows.append(np.stack(c))
    return np.stack(rows)


def selective(params, x, mask, causal, taps=None):
    """Mixes the filters of every position first, then applies the result."""
    x = x * mask[..., None]
    length = x.shape[1]
    if causal:
        kernel = np.pad(np.float64(taps), ((0, MAX_POSITIONS), (0, 0)))
    else:
        kernel = np.fft.irfft(params["filter"][0] + 1j * np.float64(params["filter"][1]), axis=0)
    kernel = kernel.reshape(2 * MAX_POSITIONS, WIDTH, -1)  # negative lags at the end
    c = contexts(params, x, mask, causal)
    c = np.concatenate([np.ones_like(c[..., :1]), c], axis=-1)
    mixed = np.einsum("bnr,tdr->bntd", c, kernel)
    lag = np.arange(length)[:, None] - np.arange(length)
    return np.einsum("bnmd,bmd->bnd", mixed[:, np.arange(length)[:, None], lag], x)


REFERENCES = {
    "attention": attention,
    "local_attention": local_attention,
    "linear_attention": linear_attention,
    "linformer": linformer,
    "fnet": fnet,
    "s5": s5,
    "selective": selective,
}
CASES = [(name, causal) for name, causal in ALL if name in REFERENCES]


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_equals_its_definition(name, causal):
    module, params, apply = make(name, causal)
    x, n = draw(2, 137, WIDTH), np.arange(137)
    mask = (n >= [[13], [0]]) & (n < [[137], [70]])
    options = {}
    if (name, causal) == ("selective", True):
        prefill = jax.jit(functools.partial(module.apply, method="prefill"))
        _, state = prefill({"params": params}, x, mask)
        options["taps"] = state.long.taps_DT.T
    expected = REFERENCES[name](jax.device_get(params), np.float64(x), mask, causal, **options)
    assert_close(apply(x, mask), expected, mask, tolerance=2e-5)


def test_a_filter_without_frequencies_is_a_product():
    """The original selective block, with w tiled over frequencies, only multiplies x by w."""
    _, params, apply = make("selective", False, selective__form="broadcast")
    x, mask = draw(2, 139, WIDTH), np.arange(139) < [[139], [70]]
    x *= mask[..., None]
    w = contexts(jax.device_get(params), np.float64(x), mask, False)[:, :1]
    original = np.fft.irfft(np.fft.rfft(x, 278, axis=1) * np.tile(w, (1, 140, 1)), axis=1)[:, :139]
    assert_close(apply(x, mask), original, tolerance=1e-5)
    assert_close(apply(x, mask), x * w, tolerance=1e-5)


def test_the_broadcast_form_takes_its_context_from_blocks_before():
    _, params, apply = make("selective", True, selective__form="broadcast")
    x, mask = draw(2, 139, WIDTH), np.arange(139) >= [[0], [30]]
    w = contexts(jax.device_get(params), np.float64(x), mask, True)
    assert_close(apply(x, mask), x * w, mask, tolerance=1e-5)
