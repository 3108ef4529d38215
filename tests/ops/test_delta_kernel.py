"""The kernels of the delta rule, interpreted, against float64: the results against numpy's loop,
and the gradients against those of the recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import reference
from spectral_pod.ops.delta_recurrence import DeltaInputs, delta_rule_recurrent
from spectral_pod.ops.delta_rule import delta_rule
from spectral_pod.ops.kernels import NotServed, delta, delta_gpu, delta_gpu_chunks
from spectral_pod.ops.kernels.cost import kernels
from tests.ops.test_delta_rule import error

# Sequences, tokens, heads, keys, values, gates, clips. One of each kind of head sizes, of lengths
# around a chunk of 64 or 128 tokens, and of heads that fill tiles and cells or do not.
QUICK = [(1, 70, 1, 8, 6, "mixed", "some")]
SLOW = [
    (2, 64, 2, 64, 64, "none", "never"), (1, 1, 3, 64, 8, "strong", "never"),
    (2, 65, 3, 8, 64, "none", "some"), (2, 127, 2, 100, 128, "mixed", "some"),
    (1, 260, 2, 128, 65, "none", "never"), (1, 150, 6, 64, 64, "strong", "all"),
    (9, 40, 2, 16, 16, "mixed", "all"), (1, 200, 18, 32, 32, "none", "long keys"),
]  # fmt: skip
KERNELS = {"tpu": delta, "gpu": delta_gpu, "gpu chunks": delta_gpu_chunks}
TOLERANCE = 2e-5  # of the largest value
EXACT = 1e-6  # without matrix products of bfloat16 terms


def drawn(B, N, H, K, V, gates="none", clips="never"):
    """Inputs in float32, the initial state, weights of the results, and a clip."""
    rng = np.random.default_rng(N)
    q, k = rng.normal(size=(2, B, N, H, K))
    v = 0.3 * rng.normal(size=(B, N, H, V))
    beta, uniform = rng.uniform(size=(2, B, N, H))
    if clips == "long keys":
        beta *= 0.1
    else:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    clip = {"never": None, "all": 1e-3}.get(clips, 0.32 * V**0.5)
    log_gate = {"none": None, "mixed": -5 * uniform**8, "strong": -4 - 200 * uniform**8}[gates]
    state, weights = rng.normal(size=(2, B, H, V, K))
    arrays = DeltaInputs(q, k, v, beta, log_gate), 0.1 * state, (rng.normal(size=v.shape), weights)
    return *jax.tree.map(jnp.float32, arrays), clip


def with_gradients(rule, inputs, state, weights):
    """The reads, the last state, and the gradients of their weighted sums; the clipped tokens."""

    def results(inputs, state):
        o, state, clipped = rule(inputs, state)
        return (o, state), clipped

    found, pullback, clipped = jax.vjp(results, inputs, state, has_aux=True)
    return jax.tree.leaves([found, pullback(weights)]), clipped


def in_float64(inputs, state, weights, clip):
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, state, weights))
        rule = functools.partial(delta_rule_recurrent, clip=clip)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(with_gradients, rule))(*arrays))


def interpreted(inputs, state, weights, clip, kernel="tpu"):
    rule = functools.partial(KERNELS[kernel].delta_rule, clip=clip, interpret=True)
    return jax.jit(functools.partial(with_gradients, rule))(inputs, state, weights)


def errors(found, expected):
    return [float(error(x, exact)) for x, exact in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("kernel", "tolerance"), [("tpu", TOLERANCE), ("gpu", EXACT), ("gpu chunks", TOLERANCE)]
)
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_equals_the_float64_loop_and_its_gradients(case, kernel, tolerance):
    inputs, state, weights, clip = drawn(*case)
    (o, last, *gradients), clipped = interpreted(inputs, state, weights, clip, kernel)
    expected, clipped_exactly = in_float64(inputs, state, weights, clip)
    q, k, v, beta, log_gate = inputs
    loop = reference.delta_rule(q, k, v, beta, state, clip=clip, log_gate_BNH=log_gate)
    assert max(errors([o, last], loop)) <= tolerance
    assert max(errors(gradients, expected[2:])) <= tolerance
    np.testing.assert_array_equal(clipped, clipped_exactly)
    share = float(clipped.mean()) / case[1]
    expected = {"never": share == 0, "some": 0 < share < 0.9, "all": share == 1}
    assert expected.get(case[-1], share > 0), share


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keys", ["one key", "random keys"])
def test_errors_do_not_add_up(keys, kernel):
    """One key in all tokens is the worst case: an error in one token's write is in every read."""
    inputs, state, weights, clip = drawn(1, 2048, 2, 64, 64)
    if keys == "one key":
        inputs = inputs._replace(k=jnp.broadcast_to(inputs.k[:, :1], inputs.k.shape))
    found, _ = interpreted(inputs, state, weights, clip, kernel)
    assert max(errors(found, in_float64(inputs, state, weights, clip)[0])) <= TOLERANCE


@pytest.mark.slow
def test_zero_tokens_change_nothing():
    """As a mask makes them. A token that clips decides nothing about others of its chunk."""
    inputs, state, _, clip = drawn(2, 100, 2, 64, 64, "mixed", "some")
    mask = np.arange(100)[None] < np.array([[37], [100]])
    masked = jax.tree.map(
        lambda x: jnp.where(jnp.expand_dims(mask, range(2, x.ndim)), x, 0), inputs
    )
    o, last, _ = jax.jit(functools.partial(delta.delta_rule, clip=clip, interpret=True))(
        masked, state
    )
    q, k, v, beta, log_gate = inputs
    exact = reference.delta_rule(q, k, v, beta, state, mask, clip, log_gate)
    assert max(errors([o, last], exact)) <= TOLERANCE


@pytest.mark.slow
def test_overflow_without_clips_does_no_harm():
    """Long keys diverge unless writes are clipped: what was computed before is discarded."""
    inputs, state, weights, _ = drawn(1, 64, 2, 64, 64)
    inputs = inputs._replace(k=1e4 * inputs.k, beta=jnp.ones_like(inputs.beta))
    found, clipped = interpreted(inputs, state, weights, 1.0)
    expected, _ = in_float64(inputs, state, weights, 1.0)
    assert clipped.all()
    assert max(errors(found[:2], expected[:2])) <= TOLERANCE
    assert all(np.isfinite(x).all() for x in found)


def test_without_gradients_nothing_is_saved_for_them():
    inputs, state, weights, clip = drawn(1, 70, 1, 16, 16, "mixed", "some")
    rule = functools.partial(delta_gpu.delta_rule, clip=clip, interpret=True)

    def outputs(fn, *arguments):
        return [len(x.outvars) for x in kernels(jax.make_jaxpr(fn)(*arguments).jaxpr)]

    gradients = functools.partial(with_gradients, rule)
    assert outputs(rule, inputs, state) == [3]
    # Of the forward pass also the errors, the factors, and states.
    assert outputs(gradients, inputs, state, weights) == [6, 6]


def test_the_cost_is_that_of_reading_and_writing_once():
    """Counted from the kernel's program, without the computation of clipped writes."""
    inputs, state, _, _ = drawn(1, 128, 2, 64, 64)

    def counted(clip):
        rule = functools.partial(delta.delta_rule, clip=clip, interpret=True)
        (kernel,) = kernels(jax.make_jaxpr(rule)(inputs, state).jaxpr)
        return kernel.params["cost_estimate"]

    # q, k, v, o, E, P and the states before the chunks; the states, beta, and the counts.
    tokens = 7 * inputs.q.nbytes + inputs.beta.nbytes
    assert counted(None).bytes_accessed == tokens + 2 * state.nbytes + 4 * 2 * 64
    assert counted(1.0) == counted(None)
    # Rows times terms of 64 x 64 products for each head and chunk, in blocks twice as wide.
    rows = 2 * 128 * 3 + 64 * 6 + 128 * 6 + 6 * 32 * 6
    assert counted(None).flops == 2 * 2 * rows * 128 * 128


def test_what_it_does_not_serve_is_said():
    inputs, state, _, _ = drawn(1, 1, 1, 8, 8)
    with pytest.raises(ValueError, match="it is a kernel for TPUs, and this is a cpu"):
        delta.delta_rule(inputs, state, None)
    with pytest.raises(ValueError, match="it is a kernel for GPUs, and this is a cpu"):
        delta_gpu.delta_rule(inputs, state, None)
    with pytest.raises(ValueError, match="'fused_chunks': it is a kernel for GPUs"):
        delta_gpu_chunks.delta_rule(inputs, state, None)
    assert delta.unserved(8, 8)


def test_it_is_a_method_of_the_operation():
    """With a mask, of which the operation makes zeros; and without a TPU it says what it needs."""
    inputs, _, _, _ = drawn(2, 70, 1, 8, 6)
    mask_BN = np.arange(70) >= np.array([[0], [20]])
    run = functools.partial(delta_rule, *map(jnp.asarray, inputs[:4]), mask_BN=jnp.asarray(mask_BN))
    ours, exact = jax.jit(lambda: (run(method="fused_interpreted"), run(method="recurrent")))()
    for x, y in zip(ours, exact, strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE * max(1, np.abs(y).max()))
    with pytest.warns(NotServed, match="'chunked' is used in place of 'fused': it is a kernel"):
        run(method="fused")
