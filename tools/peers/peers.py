"""PyTorch's side of the benchmarks: one repetition of a named peer for every line that comes in.

Runs in an environment of its own (`requirements.txt` beside this file), started by
`python -m tools.bench ops --peers=DIR/bin/python`, which asks for repetitions in turn with its own.

    stdin   {"peer": "torch_fft_conv", "sizes": {"B": 4, "D": 256, "N": 1024}}
    stdout  {"wall_ms": 41.7, "cpu_ms": 41.6}          first of all a line of versions

A peer is set up when it is first asked for and kept as long as its sizes stay in use.
"""

import argparse
import functools
import importlib.machinery
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_KEPT = 4  # peers that stay set up


def fla_delta_chunk32(B: int, N: int, H: int, K: int) -> Callable[[], None]:
    """Forward and backward of flash-linear-attention's own chunked delta rule, in PyTorch."""
    chunkwise = _fla_naive().delta_rule_chunkwise
    q, k, v = torch.randn(3, B, H, N, K)
    q, k, v = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 0.3 * v
    inputs = [x.requires_grad_() for x in (q, k, v, torch.rand(B, H, N))]
    weights = torch.randn(B, H, N, K), torch.randn(B, H, K, K)
    return _forward_backward(lambda: chunkwise(*inputs, chunk_size=32), inputs, weights)


def fla_delta_chunk(B: int, N: int, H: int, K: int) -> Callable[[], None]:
    """Forward and backward of flash-linear-attention's Triton kernels, in bfloat16; on a GPU."""
    _bound_autotuning()
    from fla.ops.delta_rule import chunk_delta_rule

    q, k, v = torch.randn(3, B, N, H, K)
    arrays = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 0.3 * v, torch.rand(B, N, H)
    inputs = [x.bfloat16().requires_grad_() for x in arrays]
    weights = (torch.randn(B, N, H, K).bfloat16(),)
    return _forward_backward(lambda: chunk_delta_rule(*inputs)[:1], inputs, weights)


def torch_fft_conv(B: int, D: int, N: int, dtype: str = "float32") -> Callable[[], None]:
    """Forward and backward of a causal convolution as in safari's `fftconv`: FFTs in float32."""
    u = torch.randn(B, D, N).to(getattr(torch, dtype)).requires_grad_()
    h = torch.randn(D, N, requires_grad=True)

    def convolve() -> tuple[Tensor]:
        h_f = torch.fft.rfft(h, n=2 * N) / (2 * N)
        u_f = torch.fft.rfft(u.float(), n=2 * N)
        return (torch.fft.irfft(u_f * h_f, n=2 * N, norm="forward")[..., :N].to(u.dtype),)

    return _forward_backward(convolve, [u, h], (torch.randn(B, D, N).to(u.dtype),))


def torch_attention(B: int, N: int, H: int, K: int, causal: bool) -> Callable[[], None]:
    """Forward and backward of PyTorch's attention in bfloat16, a flash kernel on a GPU."""
    inputs = [torch.randn(B, H, N, K).bfloat16().requires_grad_() for _ in range(3)]
    return _forward_backward(
        lambda: (F.scaled_dot_product_attention(*inputs, is_causal=causal),),
        inputs,
        (torch.randn(B, H, N, K).bfloat16(),),
    )


def torch_transformer_patches(
    batch: int, bytes: int, width: int, layers: int, heads: int, mlp: int
) -> Callable[[], None]:
    """A training step of a pre-norm Transformer on patches of four bytes, under bfloat16 autocast.

    The patch encoder, positions, loss, clipping and AdamW are those of the spectral model.
    """
    model = _Transformer(bytes, width, layers, heads, mlp)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.98), fused=True)
    tokens, labels = torch.randint(256, (batch, bytes)), torch.randint(10, (batch,))

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(tokens)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def torch_gpt(batch: int, bytes: int, width: int, layers: int, heads: int) -> Callable[[], None]:
    """A training step of nanoGPT's model on bytes, with dropout 0.2, under bfloat16 autocast."""
    model = _GPT(bytes, width, layers, heads, dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), fused=True)
    tokens = torch.randint(256, (batch, bytes + 1))

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(tokens[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


PEERS = {
    f.__name__: f
    for f in (
        fla_delta_chunk,
        fla_delta_chunk32,
        torch_attention,
        torch_fft_conv,
        torch_gpt,
        torch_transformer_patches,
    )
}


class _Transformer(nn.Module):
    def __init__(self, num_bytes: int, width: int, layers: int, heads: int, mlp: int):
        super().__init__()
        self.embed = nn.Embedding(260, width)
        self.patch = nn.Conv1d(width, width, kernel_size=6, stride=4, padding=2)
        self.project = nn.Linear(width, width)
        self.patch_norm = nn.LayerNorm(width)
        position = torch.arange(num_bytes // 4)[:, None]
        rates = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
        angles = position * rates
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))
        self.blocks = nn.ModuleList(_Block(width, heads, mlp) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.patch(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.patch_norm(F.gelu(self.project(x))) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class _GPT(nn.Module):
    def __init__(self, num_bytes: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=0.02)  # it is the head, too
        self.positions = nn.Parameter(0.02 * torch.randn(num_bytes, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(width, heads, 4 * width, causal=True, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens) + self.positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class _Block(nn.Module):
    def __init__(
        self, width: int, heads: int, mlp: int, causal: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, is_causal=self.causal
        )
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout)


def _forward_backward(
    forward: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], weights: tuple[Tensor, ...]
) -> Callable[[], None]:
    """The gradients of a weighted sum of the results."""

    def run() -> None:
        loss = sum((y * w).sum() for y, w in zip(forward(), weights))
        torch.autograd.grad(loss, inputs)

    return run


@functools.cache
def _bound_autotuning() -> None:
    """Lets Triton try four configurations of a kernel, evenly spaced: all would take minutes."""
    from triton.runtime.autotuner import Autotuner

    init = Autotuner.__init__

    def bounded(self, fn, arg_names, configs, *arguments, **options):  # type: ignore[no-untyped-def]
        few = configs[:: max(1, len(configs) // 4)][:4]
        init(self, fn, arg_names, few, *arguments, **options)

    Autotuner.__init__ = bounded


def _fla_naive() -> ModuleType:
    """The module `fla.ops.delta_rule.naive` as installed; `import fla` itself wants Triton."""
    name = "fla/ops/delta_rule/naive.py"
    files = importlib.metadata.files("fla-core") or []
    (path,) = [str(f.locate()) for f in files if str(f) == name]
    loader = importlib.machinery.SourceFileLoader("fla_delta_rule_naive", path)
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


@functools.lru_cache(_KEPT)
def _set_up(peer: str, sizes: str) -> Callable[[], None]:
    torch.manual_seed(0)
    return PEERS[peer](**json.loads(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    torch.set_num_threads(parser.parse_args().threads)
    torch.set_default_device(DEVICE)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "fla-core")}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        run = _set_up(request["peer"], json.dumps(request["sizes"], sort_keys=True))
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}), flush=True)


if __name__ == "__main__":
    main()
