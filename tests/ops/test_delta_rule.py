"""All forms of the delta rule and their gradients against a float64 loop."""

import functools
import itertools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.analysis import hlo, hlo_cost
from spectral_pod.layers import delta_memory
from spectral_pod.layers.delta_memory import DeltaMemoryLayer
from spectral_pod.ops import delta_batched, delta_chunks, reference
from spectral_pod.ops.delta_algebra import unit_lower_inverse
from spectral_pod.ops.delta_recurrence import DeltaInputs
from spectral_pod.ops.delta_rule import METHODS, choose, delta_rule
from spectral_pod.ops.kernels import delta_gpu
from tests.models.drawn import drawn

PRODUCTS = ["chunked", "batched"]  # the methods by matrix products
LENGTHS = [1, 31, 32, 33, 63, 64, 100, 256, 257, 513]  # around chunks of 32 or 64, segments of 256
CLIPS = ["never", "once", "everywhere"]
GATES = ["none", "mixed", "strong"]
B, K, V = 2, 8, 6
# Float32 against float64, relative to the largest entry. Measured: at most 2e-6 and 2e-5.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def problem(seed, N, H=2, clips="never", gates="none", beta=(0.0, 1.0), unit_keys=True):
    """q, k, v, beta, log gates or None, and an initial state, in float32.

    `clips` says how often the clip of 10 takes effect. Mixed gates are mostly near 1, with some as
    strong as e^-5; strong gates are at least e^-4.
    """
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, N, H, K))
    if unit_keys:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = 0.3 * rng.normal(size=(B, N, H, V))
    if clips == "everywhere":
        v *= 200
    elif clips == "once":
        v[1, N // 2, 0] *= 200
    state = 0.1 * rng.normal(size=(B, H, V, K))
    inputs = [q, k, v, rng.uniform(*beta, (B, N, H)), state]
    uniform = rng.uniform(size=(B, N, H))
    log_gate = {"none": None, "mixed": -5 * uniform**8, "strong": -4 - uniform}[gates]
    inputs.insert(4, log_gate)
    return jax.tree.map(np.float32, inputs)


@functools.partial(jax.jit, static_argnames=("method", "clip"))
def result(q, k, v, beta, log_gate, state=None, mask=None, method="chunked", clip=10.0):
    gate = {"log_gate_BNH": log_gate}
    return delta_rule(
        q, k, v, beta, **gate, state_BHVK=state, mask_BN=mask, method=method, clip=clip
    )


def run(*inputs, **options):
    """The reads and the last state."""
    return result(*inputs, **options)[:2]


def truth(q, k, v, beta, log_gate, state=None, mask=None, clip=10.0):
    return reference.delta_rule(q, k, v, beta, state, mask, clip, log_gate)


def loss(fn, weights, inputs):
    """A scalar to which every output and every entry of the final state contributes differently."""
    *tokens, state = inputs
    return sum(
        jnp.sum(w * jnp.sin(x))
        for w, x in zip(weights, fn(DeltaInputs(*tokens), state, 10.0)[:2], strict=True)
    )


@functools.partial(jax.jit, static_argnames="method")
def gradients(weights, inputs, method="chunked"):
    return jax.tree.leaves(jax.grad(functools.partial(loss, METHODS[method], weights))(inputs))


def float64_gradients(weights, inputs):
    with jax.enable_x64(True):
        weights, inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (weights, inputs))
        found = gradients(weights, inputs, "recurrent")
        assert all(x.dtype == jnp.float64 for x in found)
        return jax.tree.map(np.asarray, found)


def random_weights(seed, inputs):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=inputs[2].shape), rng.normal(size=inputs[-1].shape)
    return tuple(x.astype(np.float32) for x in weights)


def error(actual, expected):
    """The largest difference relative to the largest expected entry; NaN if either is NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def assert_close(actual, expected, tolerance):
    errors = [float(error(a, e)) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, errors
    assert not np.isnan(errors).any()


@functools.cache
def problems_and_truths(N):
    found = []
    for clips, gates in itertools.product(CLIPS, GATES):
        inputs = problem(N, N, H=3 if N % 2 else 1, clips=clips, gates=gates)
        found.append((inputs, truth(*inputs)))
    return found


# A length is a program. The slow ones stand to chunks as another does; a loop has no chunks.
QUICK = {(N, "chunked") for N in (1, 31, 32, 33, 256, 257, 513)}
QUICK |= {(N, "batched") for N in (1, 33, 256, 513)}
QUICK |= {(N, "recurrent") for N in (1, 33, 513)}


@pytest.mark.parametrize(
    ("N", "method"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(LENGTHS, METHODS)
    ],
)
def test_equals_the_float64_loop(N, method):
    for inputs, expected in problems_and_truths(N):
        assert_close(run(*inputs, method=method), expected, OUTPUT_TOLERANCE)


@pytest.mark.parametrize("method", PRODUCTS)
def test_another_chunk_length_gives_the_same(method):
    rule = functools.partial(METHODS[method], clip=10.0)
    chunked = jax.jit(functools.partial(rule, chunk=16))
    for clips in CLIPS:
        *tokens, state = inputs = problem(0, 150, clips=clips, gates="mixed")
        assert_close(chunked(DeltaInputs(*tokens), state)[:2], truth(*inputs), OUTPUT_TOLERANCE)
    with pytest.raises(ValueError, match="must have 8"):
        jax.eval_shape(functools.partial(rule, chunk=24), DeltaInputs(*tokens), state)


def test_starts_from_an_empty_memory():
    *tokens, _ = problem(0, 40)
    assert_close(run(*tokens, method="recurrent"), truth(*tokens), OUTPUT_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_carries_a_split_sequence(method):
    cut = int(np.random.default_rng(3).integers(1, 300))
    for clips in CLIPS:
        *tokens, state = problem(3, 300, clips=clips, gates="mixed")
        whole = run(*tokens, state, method=method)
        first, between = run(*(x[:, :cut] for x in tokens), state, method=method)
        second, last = run(*(x[:, cut:] for x in tokens), between, method=method)
        assert_close((np.concatenate([first, second], 1), last), whole, OUTPUT_TOLERANCE)


def with_garbage(tokens, mask):
    return [
        np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, np.float32(1e30))
        for x in tokens
    ]


@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens_neither_write_nor_read(method):
    mask = np.random.default_rng(4).uniform(size=(B, 70)) < 0.7
    for clips in CLIPS:
        *tokens, state = problem(4, 70, clips=clips, gates="mixed")
        actual = run(*with_garbage(tokens, mask), state, mask, method=method)
        assert_close(actual, truth(*tokens, state, mask), OUTPUT_TOLERANCE)
        assert not np.asarray(actual[0])[~mask].any()


def test_masked_tokens_get_no_gradient():
    *tokens, state = problem(4, 40, clips="once", gates="mixed")
    mask = np.random.default_rng(4).uniform(size=(B, 40)) < 0.7

    @jax.jit
    def gradient_of_reads(tokens):
        return jax.grad(lambda tokens: jnp.sum(run(*tokens, state, mask)[0] ** 2))(tokens)

    for gradient in map(np.asarray, gradient_of_reads(with_garbage(tokens, mask))):
        assert np.isfinite(gradient).all()
        assert not gradient[~mask].any()
        assert gradient[mask].any()


@pytest.mark.parametrize("method", PRODUCTS)
@pytest.mark.parametrize("beta", [(0.3, 0.3), (0.97, 1.0)])
@pytest.mark.parametrize("different_keys", [1, 3])
def test_repeated_keys(different_keys, beta, method):
    inputs = problem(5, 300, beta=beta)
    inputs[1] = inputs[1][:, np.arange(300) % different_keys]
    weights = random_weights(5, inputs)
    assert_close(run(*inputs, method=method), truth(*inputs), OUTPUT_TOLERANCE)
    expected = float64_gradients(weights, inputs)
    assert_close(gradients(weights, inputs, method), expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_the_clip_keeps_long_keys_finite(method):
    """Without clips the whole first segment overflows to NaN, which must not affect the results."""
    inputs = problem(1, 300, beta=(0.5, 1.0))
    inputs[1][:, :16] *= 3e5
    assert np.isnan(run(*inputs, method=method, clip=None)[0]).any()
    assert_close(run(*inputs, method=method), truth(*inputs), OUTPUT_TOLERANCE)
    weights = random_weights(6, inputs)
    expected = float64_gradients(weights, inputs)
    assert_close(gradients(weights, inputs, method), expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("method", PRODUCTS)
def test_agrees_with_the_recurrence_on_raw_keys(method):
    """Raw Gaussian keys make the clipped recurrence chaotic: float64 results soon diverge."""
    inputs = problem(6, 300, beta=(0.5, 1.0), unit_keys=False)
    assert not np.isfinite(run(*inputs, clip=None)[0]).all()
    by_recurrence = run(*inputs, method="recurrent")
    assert_close(run(*inputs, method=method), by_recurrence, OUTPUT_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clips", CLIPS)
def test_the_clip_matters(clips, method):
    inputs = problem(7, 300, clips=clips)
    unclipped = run(*inputs, method=method, clip=None)
    assert_close(unclipped, truth(*inputs, clip=None), OUTPUT_TOLERANCE)
    difference = error(run(*inputs, method=method)[0], unclipped[0])
    assert difference == 0 if clips == "never" else difference > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_clipped_writes_are_counted(method):
    for clips, count in (("never", 0), ("everywhere", 300)):
        inputs = problem(7, 300, clips=clips)
        assert (np.asarray(result(*inputs, method=method).clipped_BH) == count).all()
    inputs = problem(7, 300, clips="once")
    found = result(*inputs, method=method).clipped_BH.sum()
    assert found == result(*inputs, method="recurrent").clipped_BH.sum() > 0


def test_the_chunked_form_detects_clips_exactly():
    chunks = delta_chunks
    certified = jax.jit(lambda tokens, state: chunks.forward(*chunks.cut(tokens, 10.0), state))
    detected = []
    for seed in range(40):
        *tokens, state = problem(seed, 64, gates="mixed" if seed % 2 else "none")
        tokens[2][0, seed, 0] *= 9.99 / np.linalg.norm(tokens[2][0, seed, 0])  # an error near 10
        _, clipped = truth(*tokens, state)
        _, unclipped = truth(*tokens, state, clip=None)
        _, residuals = certified(DeltaInputs(*tokens), state)
        detected.append(bool(residuals.clipped.any()))
        assert detected[-1] == np.any(clipped != unclipped), seed
    assert 5 < sum(detected) < 35


def solved_in_rounds(inputs):
    """Whether the batched form needs no recurrence for a clip of 10."""
    *tokens, state = inputs
    batched = delta_batched
    forward = jax.jit(lambda tokens, state: batched.forward(*batched.cut(tokens, 10.0), state))
    return not forward(DeltaInputs(*tokens), state)[1].unsolved


def test_rounds_find_the_clips_of_unit_keys():
    for clips, gates in itertools.product(CLIPS, ("none", "mixed")):
        assert solved_in_rounds(problem(7, 300, clips=clips, gates=gates))


def test_the_recurrence_computes_what_the_rounds_do_not():
    inputs = problem(7, 100, clips="everywhere", gates="mixed")
    weights = random_weights(7, inputs)
    with mock.patch.object(delta_batched, "ROUNDS", 1):
        assert not solved_in_rounds(inputs)
        rule = functools.partial(METHODS["batched"], clip=10.0)
        *tokens, state = inputs
        found = jax.jit(rule)(DeltaInputs(*tokens), state)
        gradient = jax.grad(functools.partial(loss, METHODS["batched"], weights))
        dinputs = jax.tree.leaves(jax.jit(gradient)(inputs))
    assert_close(found[:2], truth(*inputs), OUTPUT_TOLERANCE)
    assert (np.asarray(found.clipped_BH) == 100).all()
    assert_close(dinputs, float64_gradients(weights, inputs), GRADIENT_TOLERANCE)


@pytest.mark.slow
def test_the_batched_form_has_few_operations():
    """Forward, on CPUs, 277 instructions, of the chunked form 3,146."""
    B, N, H, K = 8, 2048, 4, 64
    shapes = *[(B, N, H, K)] * 3, (B, N, H), (B, H, K, K)
    *tokens, state = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def count(fn, *args):
        """The instructions that a run executes, with loops unrolled."""
        program = hlo.Program(jax.jit(fn).lower(*args).compile().as_text())
        runs = program.runs(lambda i: float(i.opcode not in hlo_cost._FREE), fused=False)
        return sum(times for _, times in runs)

    def forward_and_both(method):
        def both(tokens, state, cotangents):
            result, pullback = jax.vjp(METHODS[method], tokens, state)
            return result, pullback(cotangents)

        args = DeltaInputs(*tokens), state  # without a clip, hence without the recurrence
        cotangents = jax.eval_shape(METHODS[method], *args)
        return count(METHODS[method], *args), count(both, *args, cotangents)

    found = forward_and_both("batched")
    for few, limit, many in zip(found, (320, 620), forward_and_both("chunked"), strict=True):
        assert few < limit < many / 9, (few, many)


def test_the_method_is_chosen_by_platform():
    """The kernel for TPUs is chosen on a mesh of them (`test_delta_kernel_on_tpus.py`)."""
    assert choose("cpu", 64, 64, 1000).method == "chunked"
    with mock.patch.object(delta_gpu, "platform", return_value="gpu"):
        assert choose("gpu", 64, 64, 1000).method == "fused"
        assert choose("gpu", 64, 64, 32).method == "batched"
        assert choose("gpu", 256, 64, 1000).method == "batched"


@functools.cache
def problem_and_gradients(seed, clips, gates):
    inputs = problem(seed, 300, clips=clips, gates=gates)
    weights = random_weights(seed, inputs)
    return inputs, weights, float64_gradients(weights, inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("clips", CLIPS)
def test_gradients_equal_float64(clips, gates, method):
    for seed in range(3):
        inputs, weights, expected = problem_and_gradients(seed, clips, gates)
        assert_close(gradients(weights, inputs, method), expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("clips", CLIPS)
def test_the_float64_gradients_equal_finite_differences(clips):
    inputs = [x.astype(np.float64) for x in problem(8, 300, clips=clips, gates="mixed")]
    weights = random_weights(8, inputs)
    rng = np.random.default_rng(8)

    def value(i, at, shift):
        row = slice(at[0], at[0] + 1)  # the other sequence does not change
        moved = [x[row].copy() for x in inputs]
        moved[i][0, *at[1:]] += shift
        return sum(np.sum(w[row] * np.sin(x)) for w, x in zip(weights, truth(*moved)))

    for i, gradient in enumerate(float64_gradients(weights, inputs)):
        for _ in range(4):
            at = tuple(rng.integers(gradient.shape))
            slope = (value(i, at, 1e-6) - value(i, at, -1e-6)) / 2e-6
            np.testing.assert_allclose(gradient[at], slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clips", CLIPS)
def test_no_read_depends_on_a_later_token(clips, method):
    inputs = problem(9, 300, clips=clips, gates="mixed")
    for t in (0, 45, 149, 256, 298):
        o_weights, state_weights = map(np.zeros_like, random_weights(9, inputs))
        o_weights[:, t] = 1
        *of_tokens, _ = map(np.asarray, gradients((o_weights, state_weights), inputs, method))
        for gradient in of_tokens:
            assert not gradient[:, t + 1 :].any()
            assert gradient[:, t].any()


def test_computes_in_float32_and_returns_the_dtype_of_v():
    *tokens, state = problem(10, 40)
    tokens = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tokens)
    o, last_state = run(*tokens, state, method="recurrent")
    assert o.dtype == jnp.bfloat16
    assert last_state.dtype == jnp.float32
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), tokens)
    expected = truth(*rounded, state)
    assert_close((last_state,), expected[1:], OUTPUT_TOLERANCE)
    assert_close((o,), expected[:1], 2**-8)  # half a unit in the last place of bfloat16


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_unit_lower_inverse(size):
    rng = np.random.default_rng(size)
    repeated = np.tril(np.full((size, size), 0.3), -1)
    lower = np.stack([repeated, 3 * repeated, np.tril(rng.normal(size=(size, size)), -1) / 4])
    actual = jax.jit(unit_lower_inverse)(np.float32(lower))
    assert_close((actual,), (np.linalg.inv(np.eye(size)[None] + lower),), 1e-6)


def test_a_layer_clips_what_is_longer_than_ordinary_values():
    """At initialisation no write is; the original limit was made for 64 and clips at 128."""
    x = jnp.asarray(np.random.default_rng(11).normal(size=(B, 64, 128)), jnp.float32)
    mask = jnp.asarray(np.arange(64)[None] < np.asarray([[64], [40]]))

    def share(clip):
        layer = DeltaMemoryLayer(128, head_dim=128, clip=clip, method="recurrent")
        init = functools.partial(layer.init, jax.random.key(0), x, mask)
        params = drawn(jax.eval_shape(init)["params"])
        apply = functools.partial(layer.apply, mutable="metrics")
        return float(jax.jit(apply)({"params": params}, x, mask)[1]["metrics"]["clipped_writes"][0])

    assert share(DeltaMemoryLayer.clip) == 0
    assert share(10 / 128**0.5) > 0.5
    assert share(1e-3) == 1  # of the valid positions


def test_a_gated_layer_starts_out_forgetting_slowly_and_learns_to():
    layer = DeltaMemoryLayer(16, num_heads=4, head_dim=8, method="recurrent", gated=True)
    x = jnp.asarray(np.random.default_rng(11).normal(size=(B, 40, 16)), jnp.float32)
    mask = jnp.ones((B, 40), bool)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, mask))

    def square_and_log_gates(params):
        with mock.patch.object(delta_memory, "delta_rule", wraps=delta_rule) as rule:
            y = layer.apply(params, x, mask)
        return jnp.sum(y[0] ** 2), rule.call_args.kwargs["log_gate_BNH"]

    gradients, log_gates = jax.jit(jax.grad(square_and_log_gates, has_aux=True))(params)
    rates = -np.asarray(log_gates)
    assert (rates > 0).all()
    np.testing.assert_allclose(np.median(rates, (0, 1)), [0.001, 0.0046, 0.022, 0.1], rtol=0.5)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradients["params"]["gate"]))
