"""What a GPU has to show: its kernels are right, and how fast they and whole steps are.

Groups: errors of the kernels against float64; causal_N, delta_NxH, spectral_N and attention_N,
forward and backward, every method in turn with those of --peers; and training steps: of shipped
configs, with kernels and without, beside a Transformer and a model of nanoGPT's size in PyTorch,
and of a SpectralGPT of 350M parameters. With --quick it runs on any platform, where kernels are
interpreted and steps are tiny.
"""

import functools
import runpy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod import command_line
from spectral_pod import config as config_lib
from spectral_pod.analysis import flops
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError
from spectral_pod.ops import attention, reference
from spectral_pod.ops.delta_recurrence import DeltaInputs
from spectral_pod.ops.delta_rule import delta_rule, resolve
from spectral_pod.ops.fft import spectral_filter
from spectral_pod.ops.kernels import delta_gpu, delta_gpu_chunks, toeplitz_gpu
from spectral_pod.ops.long_conv import causal_conv

from .settings import Settings
from .step import training
from .timing import Case, Comparison, Group, Ratio, compiled, forward_backward, times_faster

CLOCK = "wall"
COMPILERS = 16  # most of the time is XLA's and its autotuning

# Sequences, channels, positions, and how many times as fast as PyTorch's FFTs the kernel is to be.
_CAUSAL = [(16, 768, 1024, 3), (16, 768, 2048, 3), (16, 768, 4096, 1.5), (8, 768, 8192, 1)]
_DELTA = [(8, 2048, 4), (8, 2048, 16), (4, 8192, 8)]  # sequences, tokens, heads
_SPECTRAL = [(64, 512, 256), (32, 1024, 256), (16, 2048, 256)]  # sequences, positions, channels
_ATTENTION = [(16, 2048, 12), (4, 8192, 12)]  # sequences, positions, heads
_PLAIN = {
    "model.long_conv": "real", "model.spectral.method": "real", "model.memory.method": "batched",
}  # fmt: skip


def groups(settings: Settings) -> list[Group]:
    if jax.default_backend() != "gpu" and not settings.quick:
        raise ConfigError(f"the benchmark gpu needs a GPU, and this is a {jax.default_backend()}")
    part = 32 if settings.quick else 1  # of every size
    made = [Group("errors", 1, _errors)]
    for B, D, N, target in _CAUSAL:
        build = functools.partial(_causal, settings, B, D, N, target, part)
        made.append(Group(f"causal_{N}", 1, build))
    for B, N, H in _DELTA:
        made.append(Group(f"delta_{N}x{H}", 2, functools.partial(_delta, settings, B, N, H, part)))
    for B, N, D in _SPECTRAL:
        made.append(Group(f"spectral_{N}", 1, functools.partial(_spectral, B, N, D, part)))
    for B, N, H in _ATTENTION:
        build = functools.partial(_attention, settings, B, N, H, part)
        made.append(Group(f"attention_{N}", 1, build))
    # Steps take longest to compile, so kernels are measured before.
    made += [
        Group("step_listops", 2, functools.partial(_listops, settings), phase=1),
        Group("step_shakespeare", 2, functools.partial(_shakespeare, settings), phase=1),
    ]
    if not settings.quick:
        made.append(Group("step_350M", 2, _large, phase=1))
    return made


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _errors() -> Comparison:
    """Largest differences from float64 over largest values; no times."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(3, 500))
    u, dy = (
        np.asarray(jnp.bfloat16(x)).astype(np.float64) for x in rng.normal(size=(2, 2, 3, 500))
    )

    def spectrum(x: np.ndarray) -> np.ndarray:
        return np.fft.rfft(x, 1024)

    def first(x: np.ndarray) -> np.ndarray:
        return np.fft.irfft(x, 1024)[..., :500]

    exact = (
        first(spectrum(u) * spectrum(h)),
        first(spectrum(dy) * np.conj(spectrum(h))),
        first((spectrum(dy) * np.conj(spectrum(u))).sum(0)),
    )
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):

        @jax.jit
        def convolved(u: jax.Array, h: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
            run = functools.partial(toeplitz_gpu.causal_conv, interpret=not _on_gpu())
            y, pullback = jax.vjp(run, u, h)
            return y, *pullback(dy)

        results = convolved(jnp.asarray(u, dtype), jnp.float32(h), jnp.asarray(dy, dtype))
        found[f"causal_error_{jnp.dtype(dtype).name}"] = _largest(results, exact)
    q, k, v = rng.normal(size=(3, 2, 100, 2, 64))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    inputs = q, k, 0.3 * v, rng.uniform(size=(2, 100, 2))
    targets = {"causal_error_bfloat16": "<= 4e-3", "causal_error_float32": "<= 2e-5"}
    for module, name, target in (
        (delta_gpu, "delta", "<= 1e-6"),
        (delta_gpu_chunks, "delta_chunks", "<= 2e-5"),
    ):
        for clip in (None, 2.0):
            run = functools.partial(module.delta_rule, clip=clip, interpret=not _on_gpu())
            state = jnp.zeros((2, 2, 64, 64))
            results = jax.jit(run)(DeltaInputs(*map(jnp.float32, inputs)), state)
            loop = reference.delta_rule(*inputs, clip=clip)
            ratio = f"{name}_error" + ("_clipped" if clip else "")
            found[ratio], targets[ratio] = _largest(results[:2], loop), target
    return Comparison(
        [],
        [
            Ratio(name, functools.partial(_constant, error), targets[name])
            for name, error in found.items()
        ],
    )


def _constant(value: float, rows: object) -> float:
    return value


def _largest(results: Any, exact: Any) -> float:
    pairs = zip(results, exact)
    return max(float(np.abs(np.float64(x) - y).max() / np.abs(y).max()) for x, y in pairs)


def _causal(settings: Settings, B: int, D: int, N: int, target: float, part: int) -> Comparison:
    named, D, N = N, max(D // part, 1), N // part
    rng = np.random.default_rng(0)
    u_BDN, weights = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(2, B, D, N)))
    h_DN = jnp.float32(rng.normal(size=(D, N)) / N**0.5)

    def plain(u_BDN: jax.Array, h_DN: jax.Array) -> jax.Array:
        u_BDF = jnp.fft.rfft(u_BDN.astype(jnp.float32), 2 * N)
        y_BDN = jnp.fft.irfft(u_BDF * jnp.fft.rfft(h_DN, 2 * N)[None], 2 * N)[..., :N]
        return y_BDN.astype(u_BDN.dtype)

    methods: dict[str, Callable[..., jax.Array]] = {
        "plain": plain,
        "real": functools.partial(causal_conv, method="real"),
        "toeplitz": functools.partial(toeplitz_gpu.causal_conv, interpret=not _on_gpu()),
    }
    shape = f"B={B} D={D} N={N}"
    cases = [_case(name, shape, fn, weights, u_BDN, h_DN) for name, fn in methods.items()]
    ratios = [times_faster(f"causal_vs_plain_{named}", "toeplitz", "plain")]
    if settings.peers:
        peer, sizes = "torch_fft_conv", {"B": B, "D": D, "N": N, "dtype": "bfloat16"}
        cases.append(settings.peers.case(peer, "PyTorch, as safari's fftconv", sizes))
        ratios.append(times_faster(f"causal_vs_torch_{named}", "toeplitz", peer, f">= {target}"))
    return Comparison(cases, ratios)


def _delta(settings: Settings, B: int, N: int, H: int, part: int) -> Comparison:
    name, N, K = f"{N}x{H}", N // part, 64
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.normal(size=(4, B, N, H, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    inputs = tuple(map(jnp.float32, (q, k, 0.3 * v, rng.uniform(size=(B, N, H)))))

    def kernel(
        *inputs: jax.Array, module: ModuleType = delta_gpu, clip: float | None = None
    ) -> jax.Array:
        state = jnp.zeros((B, H, K, K))
        rule = functools.partial(module.delta_rule, interpret=not _on_gpu())
        return rule(DeltaInputs(*inputs), state, clip).o_BNHV

    def by(method: str) -> Callable[..., jax.Array]:
        return lambda *inputs: delta_rule(*inputs, method=method).o_BNHV

    methods: dict[str, Callable[..., jax.Array]] = {
        "fused": kernel,
        "fused_clip": functools.partial(kernel, clip=10.0),
        "fused_chunks": functools.partial(kernel, module=delta_gpu_chunks),
        "fused_chunks_clip": functools.partial(kernel, module=delta_gpu_chunks, clip=10.0),
        "batched": by("batched"),
        "chunked": by("chunked"),  # the method before there were kernels
    }
    shape = f"B={B} N={N} H={H} K={K}"
    cases = [
        _case(method, shape, fn, jnp.float32(weights), *inputs) for method, fn in methods.items()
    ]
    ours = resolve("auto", K, K, B * H).method if _on_gpu() else "fused"
    ratios = [
        times_faster(f"delta_vs_chunked_{name}", ours, "chunked", ">= 4"),
        times_faster(f"delta_fused_vs_batched_{name}", "fused", "batched"),
        times_faster(f"delta_chunks_vs_fused_{name}", "fused_chunks", "fused"),
    ]
    if settings.peers and not (settings.quick and not _on_gpu()):
        peer, sizes = "fla_delta_chunk", {"B": B, "N": N, "H": H, "K": K}
        cases.append(settings.peers.case(peer, "flash-linear-attention's Triton kernels", sizes))
        ratios.append(times_faster(f"delta_vs_fla_{name}", ours, peer, ">= 0.5"))
    return Comparison(cases, ratios)


def _spectral(B: int, N: int, D: int, part: int) -> Comparison:
    named, N, D = N, N // part, max(D // part, 1)
    rng = np.random.default_rng(0)
    x_BND, weights = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(2, B, N, D)))
    w_FD = jnp.asarray(rng.normal(size=(N + 1, D)) + 1j, jnp.complex64)
    kernel = "toeplitz" if _on_gpu() else "toeplitz_interpreted"
    cases = [
        _case(
            method, f"B={B} N={N} D={D}",
            functools.partial(spectral_filter, fft_length=2 * N, method=method),
            weights, x_BND, w_FD,
        )
        for method in ("real", "matmul", kernel)
    ]  # fmt: skip
    return Comparison(cases, [times_faster(f"spectral_vs_real_{named}", kernel, "real")])


def _attention(settings: Settings, B: int, N: int, H: int, part: int) -> Comparison:
    named, N, K = N, N // part, 64
    rng = np.random.default_rng(0)
    *inputs, weights = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(4, B, N, H, K)))
    mask_BN = jnp.ones((B, N), bool)
    cases, ratios = [], []
    for name, causal in (("causal", True), ("full", False)):
        run = functools.partial(attention.attention, mask_BN=mask_BN, causal=causal)
        cases.append(_case(name, f"B={B} N={N} H={H} K={K}", run, weights, *inputs))
    if settings.peers:
        peer, sizes = "torch_attention", {"B": B, "N": N, "H": H, "K": K, "causal": True}
        cases.append(settings.peers.case(peer, "PyTorch's flash attention", sizes))
        ratios.append(times_faster(f"attention_vs_torch_{named}", "causal", peer))
    return Comparison(cases, ratios)


def _listops(settings: Settings) -> Comparison:
    config = _config("lra_listops", settings.quick)
    model = config.model
    config.train.global_batch_size = 4 if settings.quick else 256
    peer = _torch_step(
        settings, config, "torch_transformer_patches",
        "pre-norm Transformer of PyTorch on the same patches, SDPA, bfloat16, not compiled",
        {
            "bytes": config.data.seq_len, "width": model.hidden_dim, "layers": model.num_layers,
            "heads": max(1, model.hidden_dim // 64), "mlp": 3 * model.hidden_dim // 2,
        },
    )  # fmt: skip
    return _steps("listops", config, {"ms": "<= 45"}, peer)


def _shakespeare(settings: Settings) -> Comparison:
    config = _config("lm_shakespeare:gpu", settings.quick)
    config.train.global_batch_size = 4 if settings.quick else 64
    peer = _torch_step(
        settings, config, "torch_gpt", "nanoGPT's size in PyTorch, SDPA, bfloat16, not compiled",
        {"bytes": 32, "width": 32, "layers": 2, "heads": 2} if settings.quick
        else {"bytes": 256, "width": 384, "layers": 6, "heads": 6},
    )  # fmt: skip
    return _steps("shakespeare", config, {"kB_per_s": ">= 600"}, peer)


def _large() -> Comparison:
    """SpectralGPT with 24 layers of width 1,024 on 2,048 bytes."""
    config = _config("lm_shakespeare:gpu")
    config.train.global_batch_size = 16
    config.data.seq_len = 2048
    model = config.model
    model.num_layers, model.hidden_dim, model.embed_dim, model.dropout = 24, 1024, 1024, 0.0
    model.memory.num_heads, model.unroll = 16, 12
    return _steps("350M", config, {"mfu": ">= 0.25"}, plain=False)


def _torch_step(
    settings: Settings, config: Any, peer: str, what: str, sizes: dict[str, int]
) -> Case | None:
    """A training step of PyTorch on as many rows as a configuration has, if there are peers."""
    if settings.peers is None:
        return None
    batch = config.train.global_batch_size
    work = {"bytes": float(batch * sizes["bytes"])}
    return settings.peers.case(peer, what, {"batch": batch, **sizes}, work=work)


def _steps(
    name: str, config: Any, targets: dict[str, str], peer: Case | None = None, plain: bool = True
) -> Comparison:
    """A training step with kernels, if `plain` without them, and that of a peer."""
    task = tasks.make(config.data.task, config.data.options)
    cases = [training("kernels", config, task.objective, task.num_classes)]
    figures: dict[str, Callable[[Any], float]] = {
        "ms": lambda rows: rows["kernels"].ms,
        "kB_per_s": lambda rows: rows["kernels"].rates["bytes"] / 1e3,
    }
    if peak := flops.peak_flops(jax.devices()[0]):
        figures["mfu"] = lambda rows: rows["kernels"].rates["FLOP"] / peak
    if peer:
        cases.append(peer)
        figures["bytes_vs_torch"] = lambda rows: (
            rows["kernels"].rates["bytes"] / rows[peer.name].rates["bytes"]
        )
    ratios = [
        Ratio(f"step_{figure}_{name}", of, targets.get(figure, ""))
        for figure, of in figures.items()
    ]
    if plain:
        config = config_lib.copy(config)
        config.update_from_flattened_dict(_PLAIN)
        cases.append(training("plain", config, task.objective, task.num_classes))
        ratios.append(times_faster(f"step_kernels_vs_plain_{name}", "kernels", "plain"))
    return Comparison(cases, ratios)


def _config(name: str, quick: bool = False) -> Any:
    """A shipped configuration, FILE or FILE:PRESET; with `quick` its model is tiny."""
    file, _, preset = name.partition(":")
    path = command_line.find_config(f"configs/{file}.py")
    config = runpy.run_path(path)["get_config"](*filter(None, [preset]))
    if quick:
        config.data.seq_len = 64
        config.model.num_layers, config.model.unroll = 2, 1
        config.model.hidden_dim = config.model.embed_dim = 32
        config.model.memory.num_heads, config.model.memory.head_dim = 2, 16
    return config


def _case(name: str, shape: str, fn: Callable[..., Any], weights: Any, *arguments: Any) -> Case:
    run, temporary = compiled(forward_backward(fn), weights, *arguments)
    return Case(name, "forward and backward", shape, run, temporaries=temporary)
