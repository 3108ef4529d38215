"""The whole training step of SpectralModel: forward, backward, clipping and AdamW.

Groups: step_2048 (batch 8), compared with a naive implementation of the original design and, with
--peers, a Transformer in PyTorch; lengths (batch 4, rematerialized), from 1,024 to 8,192 bytes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.analysis import flops
from spectral_pod.objectives import Classification, Objective
from spectral_pod.parallel.mesh import make_mesh, on_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state, init_state
from spectral_pod.train.step import abstract_batch, jit_train_step
from spectral_pod.validation import validate_mesh

from . import machine
from .seed_naive import SeedNaive, train_step
from .settings import Settings
from .timing import (
    Case,
    Comparison,
    Group,
    Ratio,
    Seconds,
    temporaries,
    timed,
    times_faster,
)

NUM_CLASSES = 10


class _Size(NamedTuple):
    width: int
    layers: int
    memory: int  # width of a key


def groups(settings: Settings) -> list[Group]:
    size = _Size(16, 2, 8) if settings.quick else _Size(256, 6, 64)
    lengths = (32, 64) if settings.quick else (1024, 2048, 4096, 8192)
    length = 64 if settings.quick else 2048
    return [
        Group("step_2048", 8, functools.partial(_step, settings, size, length)),
        Group("lengths", 8, functools.partial(_lengths, size, lengths)),
    ]


def _step(settings: Settings, size: _Size, length: int) -> Comparison:
    batch = 8
    cases = [
        _ours("ours", size, length, batch, "none", baseline="seed_naive"),
        _seed_naive(size, length, batch),
    ]
    ratios = [times_faster("step_vs_seed_naive_2048", "ours", "seed_naive", ">= 2")]
    if settings.peers:
        # Its channel mixers have as many parameters as ours, fewer than usual.
        peer, mlp = "torch_transformer_patches", 3 * size.width // 2
        sizes = {"batch": batch, "bytes": length, "width": size.width, "layers": size.layers}
        sizes |= {"heads": max(1, size.width // 64), "mlp": mlp}
        what = "pre-norm Transformer of PyTorch on the same patches, SDPA, bfloat16, AdamW"
        work = {"bytes": batch * length}
        cases.append(settings.peers.case(peer, what, sizes, baseline="seed_naive", work=work))
        ratios.append(times_faster("step_vs_torch_transformer_2048", "ours", peer, ">= 1.15"))
    return Comparison(cases, ratios)


def _lengths(size: _Size, lengths: tuple[int, ...]) -> Comparison:
    cases = [_ours(f"bytes_{n}", size, n, 4, "full") for n in lengths]
    first, last = cases[0].name, cases[-1].name
    ratio = Ratio("t8192_over_t1024", lambda rows: rows[last].ms / rows[first].ms, "<= 10")
    return Comparison(cases, [ratio])


def _ours(name: str, size: _Size, length: int, batch: int, remat: str, baseline: str = "") -> Case:
    config: Any = config_lib.default()
    config.data.seq_len, config.train.global_batch_size = length, batch
    config.model.hidden_dim = config.model.embed_dim = size.width
    config.model.num_layers, config.model.memory.head_dim = size.layers, size.memory
    config.model.remat = remat
    # The fastest on CPUs; in unrolled layers the compiler would undo rematerialization.
    config.model.unroll = size.layers if remat == "none" else 1
    if jax.default_backend() == "cpu" and not machine.has_amx():
        config.model.dtype = "float32"  # which is faster there
    return training(name, config, Classification, NUM_CLASSES, baseline)


class Built(NamedTuple):
    """A training step on random bytes and labels.

    Attributes:
      program: the compiled step.
      run: takes one step.
      parameters: their number.
      work: bytes that are read and FLOPs, of a step.
    """

    program: jax.stages.Compiled
    run: Callable[[], Seconds]
    parameters: int
    work: dict[str, float]

    @property
    def memory(self) -> int:
        """Bytes that the compiler planned: state, batch, results and temporaries."""
        found = self.program.memory_analysis()
        assert found is not None
        kept = found.argument_size_in_bytes + found.output_size_in_bytes
        return int(kept - found.alias_size_in_bytes + found.temp_size_in_bytes)


def training(
    name: str, config: Any, objective: type[Objective], num_classes: int, baseline: str = ""
) -> Case:
    """The training step of a configuration as a case."""
    built, of = build(config, objective, num_classes), config.model
    return Case(
        name,
        f"{of.name}, {built.parameters:,} parameters, {of.dtype}, remat {of.remat}",
        f"B={config.train.global_batch_size} L={config_lib.row_len(config)} D={of.hidden_dim} "
        f"layers={of.num_layers}",
        built.run,
        baseline,
        temporaries(built.program),
        built.work,
    )


def build(config: Any, objective: type[Objective], num_classes: int) -> Built:
    """Compiles the training step of a configuration, and draws its inputs."""
    batch, length = config.train.global_batch_size, config_lib.row_len(config)
    mesh = make_mesh(validate_mesh(config, jax.device_count()))
    model = models.build(config, num_classes=num_classes)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    state = init_state(model, optimizer.tx, mesh, seed=0)
    shapes = abstract_batch(batch, length, mesh, by_position=objective.by_position)
    with on_mesh(mesh):
        jitted: Any = jit_train_step(model, optimizer, objective, config, mesh, abstract)
        program = jitted.lower(abstract, shapes).compile()
    rng = np.random.default_rng(0)
    values = {
        "tokens": rng.integers(0, 256, shapes["tokens"].shape).astype(np.int32),
        "labels": rng.integers(0, num_classes, shapes["labels"].shape).astype(np.int32),
        "valid": np.ones(shapes["valid"].shape, bool),
    }
    data = jax.device_put(values, batch_sharding(mesh))

    def step(state: Any) -> tuple[Any, ...]:
        return program(state, data)

    work = {
        "bytes": float(batch * length),
        "FLOP": flops.train_flops(config, abstract.params, num_classes),
    }
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    return Built(program, _Chain(step, state), parameters, work)


def _seed_naive(size: _Size, length: int, batch: int) -> Case:
    model = SeedNaive(size.width, size.layers, size.memory, size.width, NUM_CLASSES)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.98))
    tokens, labels = (jnp.asarray(x) for x in _data(batch, length))
    params = model.init(jax.random.key(0), tokens)["params"]
    arguments = params, tx.init(params), tokens, labels
    jitted = jax.jit(train_step(model, tx), donate_argnums=(0, 1))
    program = jitted.lower(*arguments).compile()

    def step(params: Any, opt_state: Any) -> tuple[Any, ...]:
        return program(params, opt_state, tokens, labels)

    parameters = sum(x.size for x in jax.tree.leaves(params))
    return Case(
        "seed_naive",
        f"the original design, naive: {parameters:,} parameters, float32",
        f"B={batch} L={length} D={size.width} layers={size.layers}",
        _Chain(step, *arguments[:2]),
        temporaries=temporaries(program),
        work={"bytes": batch * length},
    )


class _Chain:
    """Repetitions of a step that consumes its state: each continues from the one before."""

    def __init__(self, step: Callable[..., tuple[Any, ...]], *state: Any):
        """`step(*state)` gives the new state, followed by a metric."""
        self._step, self._state = step, state

    def __call__(self) -> Seconds:
        return timed(self._once)

    def _once(self) -> Any:
        result = self._step(*self._state)
        self._state = result[:-1]
        return result


def _data(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (batch, length)).astype(np.int32)
    return tokens, rng.integers(0, NUM_CLASSES, batch).astype(np.int32)
