"""The diagonal state space mixer of S5 (Smith et al. 2023, "Simplified State Space Layers")."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.ops.diagonal_scan import diagonal_scan
from spectral_pod.parallel.sharding import constrain, partitioned

STEP_SIZES = (0.001, 0.1)  # first steps are drawn log-uniformly between these
_MAX_REAL = -1e-4  # states cannot grow


def hippo(state_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and -vectors of HiPPO-LegS-N, one of each conjugate pair.

    HiPPO-LegS plus its low-rank term is normal: -1/2 on the diagonal and skew-symmetric off it,
    `sqrt((n + 1/2) (k + 1/2))` in absolute value (Gu et al. 2022, "On the Parameterization and
    Initialization of Diagonal State Space Models").

    Returns:
      lambda_K, complex, with positive imaginary parts from small to large; v_MK with
      M = 2 `state_dim` and K = `state_dim`.
    """
    p_M = np.sqrt(np.arange(2 * state_dim) + 0.5)
    skew_MM = np.triu(np.outer(p_M, p_M), 1)
    # -i times a skew-symmetric matrix is Hermitian.
    imaginary_M, v_MM = np.linalg.eigh(-1j * (skew_MM - skew_MM.T))
    return -0.5 + 1j * imaginary_M[state_dim:], v_MM[:, state_dim:]


class S5Layer(nn.Module):
    """`x' = Lambda x + B u`, `y = 2 Re(C x) + D u`, by zero-order hold with learned steps.

    The states stand for conjugate pairs, of which the real parts add up twice. Without `causal` a
    second scan runs from the end, with a C of its own.

    Attributes:
      state_dim: K complex states.
      causal: whether a position sees none after it.
    """

    state_dim: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, u_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        width = u_BND.shape[-1]
        u_BND = jnp.where(mask_BN[..., None], u_BND, jnp.zeros((), u_BND.dtype)).astype(self.dtype)
        log_a_K, b_D2K = self._dynamics(width)
        b_D2K = b_D2K.astype(self.dtype)
        bu_BN2K = jnp.einsum("bnd,dck->bnck", u_BND, b_D2K, preferred_element_type=jnp.float32)
        bu_BN2K = constrain(bu_BN2K, "batch", "position", None, "channel")
        bu_BNK = jax.lax.complex(bu_BN2K[:, :, 0], bu_BN2K[:, :, 1])
        if position is None:
            x_BNK = diagonal_scan(log_a_K, bu_BNK)
        else:
            x_BNK = jnp.exp(log_a_K)[None, None] * self.get_variable("cache", "state") + bu_BNK
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "state", x_BNK[:, -1:])
        y_BND = self._read("readout", x_BNK, width)
        if not self.causal:
            reverse_BNK = diagonal_scan(log_a_K, bu_BNK, reverse=True)
            y_BND += self._read("readout_reverse", reverse_BNK, width)
        skip_D = self.param("skip", partitioned(nn.initializers.normal(1.0), "width"), (width,))
        y_BND += skip_D.astype(self.dtype)[None, None] * u_BND
        return constrain(y_BND, "batch", "position", "width")

    def _dynamics(self, width: int) -> tuple[jax.Array, jax.Array]:
        """`Lambda Delta` [K] and the discrete B, real and imaginary [D, 2, K], in float32."""
        lambda_K, v_MK = hippo(self.state_dim)

        def init_lambda(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.stack([jnp.float32(lambda_K.real), jnp.float32(lambda_K.imag)])

        def init_b(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            """Rows of unit variance a state, in the eigenvectors' coordinates."""
            b_DM = jax.random.normal(key, (width, len(v_MK))) / jnp.sqrt(jnp.float32(width))
            b_DK = jnp.dot(b_DM.astype(jnp.complex64), jnp.complex64(v_MK.conj()))
            return jnp.stack([b_DK.real, b_DK.imag], axis=1)

        def init_log_step(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            low, high = np.log(STEP_SIZES)
            return jax.random.uniform(key, shape, minval=low, maxval=high)

        K = self.state_dim
        lambda_2K = self.param("ssm_lambda", partitioned(init_lambda, None, "hidden"), (2, K))
        b_D2K = self.param("ssm_b", partitioned(init_b, None, None, "hidden"), (width, 2, K))
        log_step_K = self.param("ssm_log_step", partitioned(init_log_step, "hidden"), (K,))
        eigenvalue_K = jax.lax.complex(jnp.minimum(lambda_2K[0], _MAX_REAL), lambda_2K[1])
        log_a_K = eigenvalue_K * jnp.exp(log_step_K).astype(jnp.complex64)
        scale_K = jnp.expm1(log_a_K) / eigenvalue_K
        b_DK = scale_K[None] * jax.lax.complex(b_D2K[:, 0], b_D2K[:, 1])
        return log_a_K, jnp.stack([b_DK.real, b_DK.imag], axis=1)

    def _read(self, name: str, x_BNK: jax.Array, width: int) -> jax.Array:
        """`2 Re(C x)` as one real product, in `dtype`."""
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1))
        shape = (2, self.state_dim, width)
        c_2KD = self.param(name, partitioned(init, None, "hidden", None), shape)
        x_BN2K = jnp.stack([x_BNK.real, -x_BNK.imag], axis=2).astype(self.dtype)
        return 2 * jnp.einsum("bnck,ckd->bnd", x_BN2K, c_2KD.astype(self.dtype))
