"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs").

    o_t = sum_s w_ts v_s / (sum_s w_ts + 1e-6),    w_ts = phi(q_t) . phi(k_s),    phi = elu + 1

over the valid positions s, and if causal only s <= t. The values are extended by a column of ones,
so that one state S = sum_s phi(k_s) [v_s, 1]^T holds both the numerators and the denominator.
"""

import jax
import jax.numpy as jnp

from spectral_pod.parallel.sharding import SEQUENCE, num_shards, shard_op

CHUNK = 64  # positions whose pairs are computed explicitly; earlier ones enter through the state
_EPSILON = 1e-6  # as in the authors' code


def linear_attention(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHV: jax.Array, mask_BN: jax.Array, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Linear attention over whole sequences, in float32 whatever the input dtype.

    Where the mesh splits positions, only states are communicated.

    Args:
      q_BNHK, k_BNHK, v_BNHV: queries, keys and values, any float dtype.
      mask_BN: whether a position is valid as a key and value.
      causal: whether queries attend to their own and earlier positions only.

    Returns:
      o_BNHV in the dtype of v, and the float32 state S [B, H, K, V + 1] of all positions, from
      which `linear_attention_step` continues.
    """
    split = num_shards("position") > 1

    def op(
        q: jax.Array, k: jax.Array, v: jax.Array, mask_BN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = _features(q), _features(k), _with_ones(v)
        k = jnp.where(mask_BN[..., None, None], k, 0.0)
        own_BHKV = jnp.einsum("bnhk,bnhv->bhkv", k, v)
        state_BHKV = jax.lax.psum(own_BHKV, SEQUENCE) if split else own_BHKV
        if causal:
            o_BNHV = _causal(q, k, v, _before(own_BHKV) if split else jnp.zeros_like(own_BHKV))
        else:
            o_BNHV = jnp.einsum("bnhk,bhkv->bnhv", q, state_BHKV)
        return _normalized(o_BNHV), state_BHKV

    tokens = ("batch", "position" if split else None, "head", None)
    state = ("batch", "head", None, None)
    run = shard_op(op, (tokens, tokens, tokens, tokens[:2]), (tokens, state))
    o_BNHV, state_BHKV = run(q_BNHK, k_BNHK, v_BNHV, mask_BN)
    return o_BNHV.astype(v_BNHV.dtype), state_BHKV


def linear_attention_step(
    q_BHK: jax.Array, k_BHK: jax.Array, v_BHV: jax.Array, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One more valid position: o_BHV in the dtype of v, and the updated state."""
    state_BHKV += _features(k_BHK)[..., None] * _with_ones(v_BHV)[..., None, :]
    o_BHV = jnp.einsum("bhk,bhkv->bhv", _features(q_BHK), state_BHKV)
    return _normalized(o_BHV).astype(v_BHV.dtype), state_BHKV


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, before_BHKV: jax.Array) -> jax.Array:
    """Numerators and denominator [B, N, H, V + 1], given the state of all earlier positions."""
    length = q.shape[1]

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % CHUNK), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])

    q_BGTHK, k_BGTHK, v_BGTHV = chunks(q), chunks(k), chunks(v)
    added_BGHKV = jnp.einsum("bgthk,bgthv->bghkv", k_BGTHK, v_BGTHV)
    carried_BGHKV = jnp.concatenate([before_BHKV[:, None], added_BGHKV[:, :-1]], axis=1)
    o = jnp.einsum("bgthk,bghkv->bgthv", q_BGTHK, jnp.cumsum(carried_BGHKV, axis=1))
    weights_BGHTS = jnp.tril(jnp.einsum("bgthk,bgshk->bghts", q_BGTHK, k_BGTHK))
    o += jnp.einsum("bghts,bgshv->bgthv", weights_BGHTS, v_BGTHV)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]


def _before(own_BHKV: jax.Array) -> jax.Array:
    """The sum of the states of the devices that hold earlier positions."""
    states = jax.lax.all_gather(own_BHKV, SEQUENCE)
    earlier = jnp.arange(len(states)) < jax.lax.axis_index(SEQUENCE)
    return jnp.sum(jnp.where(earlier[:, None, None, None, None], states, 0.0), axis=0)


def _features(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


def _with_ones(v: jax.Array) -> jax.Array:
    v = v.astype(jnp.float32)
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def _normalized(o: jax.Array) -> jax.Array:
    return o[..., :-1] / (o[..., -1:] + _EPSILON)
