"""FLOPs counted from the jaxpr against counts by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from spectral_pod import models
from spectral_pod.analysis.flops import forward_flops, train_flops
from spectral_pod.config import default
from spectral_pod.generate.restore import one_device
from spectral_pod.models.model import abstract_params
from spectral_pod.ops.delta_rule import delta_rule


def arg(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


MATMUL = 2 * 3 * 4 * 5


@jax.custom_vjp
def product(a, b):
    return a @ b


product.defvjp(lambda a, b: (a @ b, (a, b)), lambda ab, dy: (dy @ ab[1].T, ab[0].T @ dy))


@pytest.mark.parametrize(
    ("fn", "args", "want"),
    [
        (jnp.matmul, (arg(3, 4), arg(4, 5)), MATMUL),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (arg(7, 3, 4), arg(7, 4, 5)), 7 * MATMUL),
        (jax.jit(jnp.matmul), (arg(3, 4), arg(4, 5)), MATMUL),
        (jax.checkpoint(jnp.matmul), (arg(3, 4), arg(4, 5)), MATMUL),
        (product, (arg(3, 4), arg(4, 5)), MATMUL),
        (jax.jit(jax.checkpoint(product)), (arg(3, 4), arg(4, 5)), MATMUL),
        (jax.vmap(product), (arg(7, 3, 4), arg(7, 4, 5)), 7 * MATMUL),
        (lambda x: jnp.fft.rfft(x, 16), (arg(6, 16),), 6 * 2.5 * 16 * 4),
        (lambda x: jnp.fft.fft(x), (arg(6, 16, dtype=jnp.complex64),), 6 * 5 * 16 * 4),
        (lambda x: jnp.fft.irfft(x, 16), (arg(6, 9, dtype=jnp.complex64),), 6 * 2.5 * 16 * 4),
        (jnp.sin, (arg(100),), 0),
    ],
)
def test_primitives(fn, args, want):
    assert forward_flops(fn, *args) == pytest.approx(want)


def test_a_scan_counts_every_turn_and_a_branch_its_cheapest_side():
    def repeated(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((4, 4)), None), x, length=9)[0]

    assert forward_flops(repeated, arg(4, 4)) == 9 * 2 * 4**3

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert forward_flops(either, arg(4, 4)) == 2 * 4**3


def test_the_delta_rule_by_hand():
    B, N, H, K, T = 2, 512, 3, 64, 32
    tokens = (*[arg(B, N, H, K)] * 3, arg(B, N, H))

    def per_token(**options):
        rule = functools.partial(delta_rule, **options)
        return forward_flops(rule, *tokens) / (B * N * H)

    recurrence = 3 * 2 * K * K  # S k, the write, S q
    # Sixteen products of 8 x 8 matrices, then two for each block off the diagonal.
    inverse = 2 * (16 * 8**3 + 2 * 2 * 8**3 + 2 * 16**3) / T
    chunked = 3 * 2 * K * K + 4 * 2 * T * K + inverse  # and k k^T, q k^T, and each times values
    assert per_token(method="recurrent") == recurrence
    assert per_token(clip=None) == pytest.approx(chunked)
    assert per_token(clip=10.0) == pytest.approx(chunked)  # the clip's fall-back is rare


def test_a_spectral_model_without_memory_is_its_products_and_ffts():
    config = default()
    config.model.memory_interval = 0
    config.model.num_layers, config.model.hidden_dim, config.model.embed_dim = 3, 32, 16
    model = models.build(config, seq_len=256, num_classes=10)
    B, L, N, D, E = 4, 256, 64, 32, 16
    tokens, mask = arg(B, L, dtype=jnp.int32), arg(B, L, dtype=bool)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((B, L), jnp.int32),
                                               jnp.ones((B, L), bool)))  # fmt: skip
    got = forward_flops(model.apply, params, tokens, mask)
    # The convolution is a product of the table of bytes (and none) and the kernel.
    encoder = 2 * 261 * 6 * E * D + 2 * B * N * D * D
    ffts = 2 * B * D * 2.5 * (2 * N) * np.log2(2 * N)
    feed_forward = 3 * 2 * B * N * D * D
    pooling_and_head = 2 * (2 * B * N * D) + 2 * B * D * 10
    want = encoder + 3 * (ffts + feed_forward) + pooling_and_head
    assert got == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    ("name", "pattern", "fields"),
    [
        ("spectral_gpt", ("hyena+delta",), [{"long_conv": m} for m in ("right_angle", "real",
         "matmul")] + [{"memory.method": m} for m in ("chunked", "batched", "recurrent")]),
        ("spectral_model", ("spectral",), [{"spectral.method": m} for m in ("right_angle", "real",
         "matmul", "plain")]),
        ("spectral_llm", ("wavelet",), [{"long_conv": m} for m in ("right_angle", "real")]),
    ],
)  # fmt: skip
def test_a_model_has_the_same_flops_whatever_method_computes_it(name, pattern, fields):
    """Otherwise a method with redundant work would increase the reported utilisation."""
    counts, params = set(), None
    for chosen in fields:
        config = default()
        small = {"name": name, "pattern": pattern, "num_layers": 2, "hidden_dim": 32,
                 "embed_dim": 16, "memory.head_dim": 8}  # fmt: skip
        config.update_from_flattened_dict({f"model.{k}": v for k, v in (small | chosen).items()})
        config.data.seq_len, config.train.global_batch_size = 256, 2
        model = models.build(config, seq_len=256, num_classes=257)
        params = params or nn.unbox(abstract_params(model, one_device()))
        counts.add(train_flops(config, params, 257))
    assert len(counts) == 1
    assert counts.pop() > 1e6


def test_a_kernel_counts_once_for_every_cell_of_its_grid():
    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = a_ref[...] @ b_ref[...]

    def blocks(a, b):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((12, 20), jnp.float32),
            grid=(3, 2),
            in_specs=[
                pl.BlockSpec((4, 8), lambda i, j: (i, 0)),
                pl.BlockSpec((8, 10), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((4, 10), lambda i, j: (i, j)),
        )(a, b)

    assert forward_flops(blocks, arg(12, 8), arg(8, 20)) == 2 * 12 * 8 * 20
