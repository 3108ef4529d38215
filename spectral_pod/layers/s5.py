"""The diagonal state space mixer of S5 (Smith et al. 2023, "Simplified State Space Layers")."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, PositiveFloat
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.parameter import Group, parameter
from spectral_pod.layers.probes import probe
from spectral_pod.ops.diagonal_scan import diagonal_scan
from spectral_pod.parallel.sharding import constrain

_MAX_REAL = -1e-4  # the largest real part of an eigenvalue, so that states cannot grow


def hippo(state_dim: int, blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS, one of each conjugate pair.

    With several blocks, those of a block-diagonal matrix of equal, smaller ones.

    HiPPO-LegS plus a low-rank term is normal: -1/2 on the diagonal and skew-symmetric off it, with
    entries of absolute value `sqrt((n + 1/2) (k + 1/2))` (Gu et al. 2022, "On the Parameterization
    and Initialization of Diagonal State Space Models").

    Returns:
      complex128 lambda_K, with positive imaginary parts, in ascending order within a block, and
      complex128 v_MK, where M = 2 `state_dim` and K = `state_dim`.
    """
    size = state_dim // blocks
    p_M = np.sqrt(np.arange(2 * size) + 0.5)
    skew_MM = np.triu(np.outer(p_M, p_M), 1)
    # -i times a skew-symmetric matrix is Hermitian.
    imaginary_M, v_MM = np.linalg.eigh(-1j * (skew_MM - skew_MM.T))
    return np.tile(-0.5 + 1j * imaginary_M[size:], blocks), np.kron(np.eye(blocks), v_MM[:, size:])


class S5Layer(Mixer):
    """`x' = Lambda x + B u`, `y = 2 Re(C x) + D u`, by zero-order hold with learned step sizes.

    Each state stands for a conjugate pair, hence the factor of 2. If not `causal`, a second scan
    runs from the end, with its own C. The decode state is x, complex64 [B, 1, K].

    It starts as the published program does: with a block-diagonal HiPPO matrix and B of variance
    1 / 2K. The published recipes use 8 blocks of 1 complex state for ListOps, 12 of 8 for Text, and
    8 of 16 for Pathfinder, with `c_init='trunc_standard_normal'`; Path-X has `'complex_normal'` and
    `dt_min=0.0001`.

    Attributes:
      state_dim: K, the number of complex states.
      blocks: HiPPO blocks, which divide K. The largest imaginary part grows with the square of a
        block's size: a single block of 64 states has parts up to 5,215, and a fifth of all pairs of
        state and step size alias.
      c_init: the name of C's initial values in the published program. The variance of its real and
        imaginary parts is 1 / 2KD for 'lecun_normal', 1 / 2K for 'trunc_standard_normal', and 1 / 2
        for 'complex_normal'.
      dt_min, dt_max: initial step sizes are drawn log-uniformly between these.
      dt_global: trains step sizes at the learning rate of the other parameters, with their weight
        decay, rather than as dynamics.
    """

    state_dim: Positive = 64
    blocks: Positive = 8
    c_init: Literal["lecun_normal", "trunc_standard_normal", "complex_normal"] = "lecun_normal"
    dt_min: PositiveFloat = 0.001
    dt_max: PositiveFloat = 0.1
    dt_global: bool = False

    section = "s5"
    divisible = (
        ("model.s5.state_dim", "model.s5.blocks"), ("model.s5.state_dim", "mesh.tensor"),
    )  # fmt: skip

    @classmethod
    def check(cls, config: Architecture) -> None:
        low, high = config.option("s5.dt_min"), config.option("s5.dt_max")
        if not low <= high <= 1e3:
            raise ConfigError(
                f"config.model.s5.dt_min, dt_max are {low}, {high}; they need dt_min <= dt_max, "
                "and dt_max at most 1000"
            )

    def setup(self) -> None:
        self.log_a_K, self.b_D2K = self._dynamics()
        inverse_variance = {
            "lecun_normal": 2 * self.state_dim * self.width,
            "trunc_standard_normal": 2 * self.state_dim,
            "complex_normal": 2,
        }
        init = nn.initializers.normal(inverse_variance[self.c_init] ** -0.5)
        readout = parameter(init, None, "hidden", None, group="decayed", inputs=2)
        shape = (2, self.state_dim, self.width)
        self.c_2KD = self.param("readout", readout, shape)
        if not self.causal:
            self.c_reverse_2KD = self.param("readout_reverse", readout, shape)
        skip = parameter(nn.initializers.normal(1.0), "width", group="undecayed")
        self.skip_D = self.param("skip", skip, (self.width,))

    def __call__(self, u_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        u_BND, bu_BNK = self._input(u_BND, mask_BN)
        x_BNK = diagonal_scan(self.log_a_K, bu_BNK)
        return self._output(x_BNK, u_BND, None if self.causal else bu_BNK)

    def extend(
        self, u_BND: jax.Array, mask_BN: jax.Array, carry: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Carries the state x; the scan from the end begins anew in each chunk."""
        u_BND, bu_BNK = self._input(u_BND, mask_BN)
        first_BNK = bu_BNK
        if carry is not None:
            first_BNK = bu_BNK.at[:, :1].add(jnp.exp(self.log_a_K)[None, None] * carry)
        x_BNK = diagonal_scan(self.log_a_K, first_BNK)
        return self._output(x_BNK, u_BND, None if self.causal else bu_BNK), x_BNK[:, -1:]

    def init_state(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, 1, self.state_dim), jnp.complex64)

    def prefill(self, u_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
        u_BPD, bu_BPK = self._input(u_BPD, mask_BP)
        x_BPK = diagonal_scan(self.log_a_K, bu_BPK)
        return self._output(x_BPK, u_BPD), x_BPK[:, -1:]

    def advance(
        self, u_B1D: jax.Array, x_B1K: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        u_B1D, bu_B1K = self._input(u_B1D)
        x_B1K = jnp.exp(self.log_a_K)[None, None] * x_B1K + bu_B1K
        return self._output(x_B1K, u_B1D), x_B1K

    def _input(
        self, u_BND: jax.Array, mask_BN: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """u in `dtype`, zero where invalid, and B u, complex64 [B, N, K]."""
        probe(self, "decay", lambda: jnp.exp(self.log_a_K.real))
        if mask_BN is not None:
            u_BND = jnp.where(mask_BN[..., None], u_BND, jnp.zeros((), u_BND.dtype))
        u_BND, b_D2K = u_BND.astype(self.dtype), self.b_D2K.astype(self.dtype)
        bu_BN2K = jnp.einsum("bnd,dck->bnck", u_BND, b_D2K, preferred_element_type=jnp.float32)
        bu_BN2K = constrain(bu_BN2K, "batch", "position", None, "channel")
        return u_BND, jax.lax.complex(bu_BN2K[:, :, 0], bu_BN2K[:, :, 1])

    def _output(
        self, x_BNK: jax.Array, u_BND: jax.Array, reverse_BNK: jax.Array | None = None
    ) -> jax.Array:
        """y from the states and the input; `reverse_BNK` is B u for a scan from the end, if any."""
        y_BND = self._read(self.c_2KD, x_BNK)
        if reverse_BNK is not None:
            x_BNK = diagonal_scan(self.log_a_K, reverse_BNK, reverse=True)
            y_BND += self._read(self.c_reverse_2KD, x_BNK)
        y_BND += self.skip_D.astype(self.dtype)[None, None] * u_BND
        return constrain(y_BND, "batch", "position", "width")

    def _dynamics(self) -> tuple[jax.Array, jax.Array]:
        """`Lambda Delta`, complex64 [K], and the discretised B, float32 [D, 2 (re, im), K]."""
        lambda_K, v_MK = hippo(self.state_dim, self.blocks)

        def init_lambda(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.stack([jnp.float32(lambda_K.real), jnp.float32(lambda_K.imag)])

        def init_b(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            """B in the coordinates of the eigenvectors."""
            b_DM = nn.initializers.lecun_normal(1, 0)(key, (shape[0], len(v_MK)), jnp.float32)
            b_DK = jnp.dot(b_DM.astype(jnp.complex64), jnp.complex64(v_MK.conj()))
            return jnp.stack([b_DK.real, b_DK.imag], axis=1)

        def init_log_step(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            low, high = np.log((self.dt_min, self.dt_max))
            return jax.random.uniform(key, shape, minval=low, maxval=high)

        K = self.state_dim
        init = parameter(init_lambda, None, "hidden", group="dynamics")
        lambda_2K = self.param("ssm_lambda", init, (2, K))
        init = parameter(init_b, None, None, "hidden", group="dynamics")
        b_D2K = self.param("ssm_b", init, (self.width, 2, K))
        group: Group = "decayed" if self.dt_global else "dynamics"
        init = parameter(init_log_step, "hidden", group=group)
        log_step_K = self.param("ssm_log_step", init, (K,))
        eigenvalue_K = jax.lax.complex(jnp.minimum(lambda_2K[0], _MAX_REAL), lambda_2K[1])
        log_a_K = eigenvalue_K * jnp.exp(log_step_K).astype(jnp.complex64)
        scale_K = jnp.expm1(log_a_K) / eigenvalue_K
        b_DK = scale_K[None] * jax.lax.complex(b_D2K[:, 0], b_D2K[:, 1])
        return log_a_K, jnp.stack([b_DK.real, b_DK.imag], axis=1)

    def _read(self, c_2KD: jax.Array, x_BNK: jax.Array) -> jax.Array:
        """`2 Re(C x)` as one real product, in `dtype`."""
        x_BN2K = jnp.stack([x_BNK.real, -x_BNK.imag], axis=2).astype(self.dtype)
        return 2 * jnp.einsum("bnck,ckd->bnd", x_BN2K, c_2KD.astype(self.dtype))
