"""The model of the original design documents, implemented literally, for comparison only.

Full complex FFTs with a filter W in C^{N x D}, a gate by the norm, post-norm residuals, and the
delta memory one token at a time: plain Flax in float32, without fusion, chunks or casts.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

_BETA = (0.01, 0.3)
_LARGEST_UPDATE = 10.0


class SeedNaive(nn.Module):
    """Bytes -> patches of four -> layers, a memory in every second -> pooling -> classes."""

    width: int
    num_layers: int
    memory_dim: int
    embed_dim: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        x = nn.Embed(256, self.embed_dim)(tokens_BL)
        x = nn.Conv(self.width, kernel_size=(6,), strides=4, padding=((2, 2),))(x)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(self.width)(x)))
        x += _sinusoidal(x.shape[1], self.width)
        for layer in range(self.num_layers):
            x = _SpectralLayer()(x)
            if layer % 2:
                x = nn.LayerNorm()(x + _DeltaMemory(self.memory_dim)(x))
        query_D = self.param("query", nn.initializers.normal(1.0), (self.width,))
        weights_BN = jax.nn.softmax(x @ query_D / jnp.sqrt(self.width))
        return nn.Dense(self.num_classes)(jnp.einsum("bn,bnd->bd", weights_BN, x))


class _SpectralLayer(nn.Module):
    """x <- LN(x + gate(u) u), u = Re(IFFT(W . FFT(x))); then a gated linear unit."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        init = nn.initializers.normal(0.02)
        w_real, w_imag = (self.param(name, init, x.shape[1:]) for name in ("w_real", "w_imag"))
        spectrum = jnp.fft.fft(x, axis=1) * jax.lax.complex(w_real, w_imag)
        u = jnp.fft.ifft(spectrum, axis=1).real
        # The square root has no gradient at zero.
        energy = jnp.sqrt(jnp.sum(u**2, axis=-1, keepdims=True) + 1e-12)
        x = nn.LayerNorm()(x + u * nn.sigmoid(energy))
        gated = nn.Dense(width)(x) * nn.gelu(nn.Dense(width)(x))
        return nn.LayerNorm()(x + nn.Dense(width)(gated))


class _DeltaMemory(nn.Module):
    """S <- S + beta clip((v - S k) k^T), o = S q: a scan over the tokens."""

    memory_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (nn.Dense(self.memory_dim, name=name)(x) for name in "qkv")
        logit = self.param("beta", nn.initializers.zeros_init(), ())
        beta = _BETA[0] + (_BETA[1] - _BETA[0]) * nn.sigmoid(logit)

        def step(S: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            q, k, v = token
            error = v - jnp.einsum("bvk,bk->bv", S, k)
            update = jnp.einsum("bv,bk->bvk", error, k)
            norm = jnp.sqrt(jnp.sum(update**2, axis=(-2, -1), keepdims=True) + 1e-12)
            update *= jnp.minimum(1.0, _LARGEST_UPDATE / norm)
            S += beta * update
            return S, jnp.einsum("bvk,bk->bv", S, q)

        tokens = tuple(jnp.swapaxes(y, 0, 1) for y in (q, k, v))
        empty = jnp.zeros((x.shape[0], self.memory_dim, self.memory_dim))
        _, o = jax.lax.scan(step, empty, tokens)
        scale = self.param("scale", nn.initializers.constant(0.1), ())
        return nn.Dense(x.shape[-1])(jnp.swapaxes(o, 0, 1)) * scale


def _sinusoidal(length: int, width: int) -> jax.Array:
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def train_step(model: SeedNaive, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """(params, opt_state, tokens_BL, labels_B) -> (params, opt_state, loss)."""

    def loss_fn(params: Any, tokens_BL: jax.Array, labels_B: jax.Array) -> jax.Array:
        logits_BC = model.apply({"params": params}, tokens_BL)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B).mean()

    def step(params: Any, opt_state: Any, tokens_BL: jax.Array, labels_B: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BL, labels_B)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step
