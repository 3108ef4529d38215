"""Our delta rule in flash-linear-attention's own tests."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.ops.delta_rule import delta_rule
from tools import shell
from tools.peers.agreement.rows import Row, load

# The tests in these files that compare results. The others are about kernels, memory layouts, and
# gates that a kernel computes.
DELTA_TESTS = {
    "test_delta.py": ("test_chunk", "test_chunk_with_chunk_size", "test_chunk_varlen"),
    "test_gdn.py": (
        "test_fused_recurrent", "test_chunk", "test_chunk_with_chunk_size", "test_chunk_varlen",
        "test_chunk_varlen_prefill",
    ),
}  # fmt: skip


def compare(folder: Path) -> Iterator[Row]:
    """Runs the tests of a checkout, a row each."""
    import torch  # before the stand-ins, which its own imports must not meet

    torch.set_num_threads(1)  # the operations of a step are too small for more
    close = _Close()
    for file, tests in DELTA_TESTS.items():
        module = load(folder / "tests/ops" / file, _modules(folder, close))
        for name in tests:
            test, close.row = getattr(module, name), Row("flash-linear-attention", f"{file} {name}")
            for values in _parameters(test):
                shell.say(f"{file} {name} {values}")
                test(**values)
                close.row.cases += 1
            yield close.row


class _Close:
    """fla's `assert_close`, which notes the difference in a row instead of raising."""

    row: Row

    def __call__(self, name: str, reference: Any, result: Any, ratio: float) -> None:
        reference, result = reference.detach().float(), result.detach().float()
        difference = reference - result
        error = difference.square().mean().sqrt() / (reference.square().mean().sqrt() + 1e-8)
        negligible = difference.abs().max() <= 1e-6
        self.row.add(name, 0.0 if negligible else error.item(), ratio)


def _parameters(test: Callable[..., None]) -> list[dict[str, Any]]:
    """The arguments that pytest would call a parametrized test with."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names, sets = mark.args
    return [dict(zip(names, getattr(values, "values", values))) for values in sets]


def _modules(folder: Path, close: _Close) -> dict[str, Any]:
    """The modules that fla's tests import: the naive recurrences its own, the kernels ours."""
    delta = load(folder / "fla/ops/delta_rule/naive.py")
    gated = load(folder / "fla/ops/gated_delta_rule/naive.py")
    recurrence = _by_row(gated.naive_recurrent_gated_delta_rule)
    chunked = functools.partial(_ours, "chunked")
    return {
        **{name: mock.MagicMock() for name in ("fla", "fla.ops")},
        "fla.utils": mock.MagicMock(assert_close=close, device="cpu", device_platform="cpu"),
        "fla.ops.delta_rule": SimpleNamespace(
            chunk_delta_rule=chunked,
            fused_recurrent_delta_rule=_by_row(
                functools.partial(_naive, delta.delta_rule_recurrence)
            ),
        ),
        "fla.ops.gated_delta_rule": SimpleNamespace(
            chunk_gated_delta_rule=chunked,
            fused_recurrent_gated_delta_rule=functools.partial(_ours, "recurrent"),
        ),
        "fla.ops.gated_delta_rule.naive": SimpleNamespace(
            naive_recurrent_gated_delta_rule=recurrence
        ),
        "fla.ops.gated_delta_rule.gate": mock.MagicMock(),
        "fla.ops.gated_delta_rule.wy_fast": mock.MagicMock(),
    }


def _by_row(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Applies a rule to each row or sequence alone, again for its gradient: to save memory."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def apply(cu_seqlens: Any = None, **given: Any) -> tuple[Any, Any]:
        arrays = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        options = {name: x for name, x in given.items() if name not in arrays}
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            cuts = [(slice(0, 1), slice(*cut)) for cut in itertools.pairwise(ends)]
        else:
            cuts = [(slice(b, b + 1), slice(None)) for b in range(len(given["q"]))]
        found = []
        for i, cut in enumerate(cuts):
            state = arrays["initial_state"]
            row = {name: x[cut] for name, x in arrays.items()}
            row["initial_state"] = state if state.ndim == 3 else state[i : i + 1]
            found.append(checkpoint(rule, use_reentrant=False, **row, **options))
        outputs, states = zip(*found)
        return torch.cat(outputs, int(cu_seqlens is not None)), torch.cat(states)

    return apply


def _naive(
    recurrence: Callable[..., Any], q: Any, k: Any, v: Any, beta: Any, initial_state: Any,
    scale: float | None = None, use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """fla's naive recurrence, which is for [B, H, T, D] and scales q itself."""
    from torch.nn.functional import normalize

    q, k, v, beta = (x.transpose(1, 2).float() for x in (q, k, v, beta))
    if use_qk_l2norm_in_kernel:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    o, state = recurrence(q, k, v, beta, initial_state)
    return o.transpose(1, 2), state


def _ours(
    method: str, q: Any, k: Any, v: Any, beta: Any, initial_state: Any, g: Any = None,
    scale: float | None = None, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None,
    **_: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Our delta rule as a function of PyTorch, with the arguments of fla's kernels."""
    _reset_gradients((q, k, v, beta, initial_state, g))
    ends = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    unit = use_qk_l2norm_in_kernel or method == "recurrent"
    rule = functools.partial(_rule, method=method, scale=scale, unit=unit, ends=ends)
    return _torch_function()(rule, q, k, v, beta, initial_state, g)


def _reset_gradients(tensors: tuple[Any, ...]) -> None:
    """Forgets the gradients so far of the leaves of tensors.

    `test_chunk_varlen` of fla's test_delta.py does not: it adds the second gradients to the first
    ones, in place, and compares the sum with itself.
    """
    for node in [x.grad_fn for x in tensors if x is not None and x.grad_fn is not None]:
        while not hasattr(node, "variable"):
            node = node.next_functions[0][0]
        node.variable.grad = None


@functools.partial(jax.jit, static_argnames=("method", "scale", "unit", "ends"))
def _rule(
    q: Any, k: Any, v: Any, beta: Any, state: Any, g: Any = None, *,
    method: Any, scale: float, unit: bool, ends: tuple[int, ...] | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """[B, T, H, D] and a state [B, H, K, V]; heads of v may share those of q and k."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    if unit:
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (scale * q, k))
    inputs, mask, place = (q, k, v, beta, g), None, None
    if ends is not None:  # sequences one after the other: a row each
        lengths = np.diff(ends)
        offset = np.arange(lengths.max())
        mask = offset < lengths[:, None]
        place = np.where(mask, np.add.outer(ends[:-1], offset), 0)
        inputs = tuple(None if x is None else x[0, place] for x in inputs)
    q, k, v, beta, g = inputs
    o, state, _ = delta_rule(
        q, k, v, beta, log_gate_BNH=g, state_BHVK=jnp.swapaxes(state, 2, 3), mask_BN=mask,
        method=method, clip=None,
    )  # fmt: skip
    return (o if mask is None else o[mask][None]), jnp.swapaxes(state, 2, 3)


@functools.cache
def _torch_function() -> Callable[..., Any]:
    """`apply(function of JAX, *tensors)` in PyTorch, with its gradient."""
    import torch

    def to_jax(x: Any) -> jax.Array:
        return jnp.from_dlpack(x.detach().contiguous())

    def to_torch(x: jax.Array) -> Any:
        return torch.from_dlpack(x).clone()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, function: Any, *tensors: Any) -> Any:
            arrays = [to_jax(x) for x in tensors if x is not None]
            if not any(ctx.needs_input_grad):
                return tuple(map(to_torch, function(*arrays)))
            results, ctx.vjp = jax.vjp(function, *arrays)
            ctx.dtypes = [x.dtype for x in results]
            return tuple(map(to_torch, results))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = tuple(to_jax(x).astype(dtype) for x, dtype in zip(gradients, ctx.dtypes))
            found = [to_torch(x) for x in ctx.vjp(given)]
            return None, *found, *[None] * (len(ctx.needs_input_grad) - 1 - len(found))

    return Function.apply
