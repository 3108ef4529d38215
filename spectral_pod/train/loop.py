"""A run, told in order: mesh, data, model, state, steps, result."""

import collections
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.analysis import flops
from spectral_pod.data import byte_store, pipeline, tasks
from spectral_pod.errors import DataError, NonFiniteError
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.evaluate import confusion_table, evaluate
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import TrainState, abstract_state, init_state
from spectral_pod.train.step import jit_eval_step, jit_train_step
from spectral_pod.train.writers import MetricWriter


def run(config: ConfigDict, workdir: str, *, eval_only: bool = False) -> dict[str, Any]:
    """Trains to `config.train.total_steps`, continuing what is in `workdir`; returns the result.

    With `eval_only` evaluates the newest sound checkpoint and writes nothing.

    Raises:
      UserError: see `errors.py`; whatever was checkpointed before stays.
    """
    started = time.time()
    config_lib.validate(config, tasks=tasks.TASKS, models=models.MODELS)

    # ---- mesh
    mesh = make_mesh(config_lib.validate_mesh(config, jax.device_count()))
    say(f"mesh {dict(mesh.shape)} of {mesh.size} {jax.devices()[0].device_kind} device(s)")

    # ---- data
    store = open_store(config)
    train_batches = open_batches(config, store, "train", shuffle=True)
    eval_batches = {
        split: open_batches(config, store, split)
        for split in ("validation", config.train.eval_split)
    }
    if not eval_only:
        config_lib.claim_workdir(workdir, config, store.digest)

    # ---- model, optimizer, state
    model = models.build(config, seq_len=config.data.seq_len, num_classes=len(store.classes))
    tx = make_optimizer(config)
    abstract = abstract_state(model, tx, mesh, config.data.seq_len)
    num_params = sum(x.size for x in jax.tree.leaves(abstract.params))
    checkpointer = Checkpointer(
        f"{workdir}/checkpoints",
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
    )
    state: Any = checkpointer.restore(abstract)
    if eval_only:
        if state is None:
            raise DataError(f"{workdir} holds no sound checkpoint to evaluate; train first")
        held_out = eval_batches[config.train.eval_split]
        return _evaluate_only(state, abstract, model, mesh, config, held_out, store.classes)
    if state is None:
        state = init_state(model, tx, mesh, config.data.seq_len, config.seed)
    first_step = int(state.step)
    overview = parameter_overview.get_parameter_overview(abstract.params, include_stats=False)
    logging.info("Parameters:\n%s", overview)
    with jax.set_mesh(mesh):
        operations = models.operations(config, seq_len=config.data.seq_len)
    say(f"{config.model.name}: {num_params:,} parameters, starting at step {first_step}")
    say(f"operations: {', '.join(f'{name} by {how}' for name, how in operations.items())}")

    # ---- steps
    with (
        jax.set_mesh(mesh),
        runtime.Interrupt() as interrupt,
        checkpointer,
        contextlib.closing(
            MetricWriter(workdir, is_leader=runtime.is_leader(), resume_step=first_step)
        ) as writer,
    ):
        if first_step == 0:
            writer.texts(
                0, {"config": f"```\n{config}\n```", "parameters": f"```\n{overview}\n```"}
            )
        eval_step = jit_eval_step(model, mesh, abstract)
        progress = _Progress(config, mesh, abstract, len(store.classes), writer, first_step)

        def run_eval(split: str) -> dict[str, Any]:
            with progress.time("eval"):
                return evaluate(
                    eval_step,
                    state.params,
                    eval_batches[split],
                    mesh,
                    threads=config.data.threads,
                    prefetch=config.data.prefetch,
                )

        train_step = jit_train_step(model, tx, config, mesh, abstract)
        batches = pipeline.load(
            train_batches,
            batch_sharding(mesh),
            first_step,
            config.train.total_steps,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
        for step in range(first_step + 1, config.train.total_steps + 1):
            interrupt.check()
            with progress.time("data"):
                batch = next(batches)
            checkpointer.check()  # a save that failed in the background ends the run now
            with progress.time("step"):
                state, metrics = train_step(state, batch)
                progress.add(step, metrics)
            last = step == config.train.total_steps
            validation = None
            if step % config.train.eval_every_steps == 0 or last:
                progress.settle()
                validation = run_eval("validation")
                progress.report_eval("validation", step, validation)
            if step % config.checkpoint.every_steps == 0 or last:
                progress.settle()  # a state is saved only after its step is known to be finite
                writer.flush()
                with progress.time("checkpoint"):
                    scores = validation and {k: validation[k] for k in ("loss", "accuracy")}
                    checkpointer.save(step, state, scores)
        progress.settle()

        # ---- result
        result = run_eval(config.train.eval_split)
        progress.report_eval(config.train.eval_split, int(state.step), result)
        checkpointer.wait_until_finished()
        run_facts = {"num_params": num_params, "operations": operations}
        return _finish(workdir, config, store, state, result, progress, run_facts, started)


def open_store(config: ConfigDict) -> byte_store.ByteStore:
    """The byte store of the configured task, written first (by the leader) where it isn't there."""
    options = config.data.options.to_dict()
    path = tasks.store_path(config.data.dir, config.data.task, options)
    if runtime.is_leader() and not byte_store.exists(path):
        say(f"writing the {config.data.task} data to {path}")
        tasks.TASKS[config.data.task].build(path, **options)
    runtime.barrier("data store")
    if not byte_store.exists(path):
        raise DataError(
            f"process {jax.process_index()} does not see the store {path} that process 0 wrote; "
            "set config.data.dir to a folder or gs:// URL that all hosts share"
        )
    return byte_store.ByteStore(path)


def open_batches(
    config: ConfigDict, store: byte_store.ByteStore, split: str, *, shuffle: bool = False
) -> pipeline.Batches:
    """Shuffled batches without end for training, or ordered ones that cover a split once."""
    return pipeline.Batches(
        store.split(split),
        batch_size=config.train.global_batch_size if shuffle else config.train.eval_batch_size,
        seq_len=config.data.seq_len,
        truncate=config.data.truncate,
        num_records=config.data.train_records if split == "train" else 0,
        shuffle_seed=config.seed if shuffle else None,
    )


def params_digest(params: Any) -> str:
    """sha256 over the bytes of every parameter, in the order of their names."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        whole = multihost_utils.process_allgather(leaves[name], tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


def say(line: str) -> None:
    """One line to the user, from the leader only."""
    if runtime.is_leader():
        print(line, flush=True)


def _evaluate_only(
    state: TrainState,
    abstract: TrainState,
    model: Any,
    mesh: Mesh,
    config: ConfigDict,
    batches: pipeline.Batches,
    classes: list[str],
) -> dict[str, Any]:
    with jax.set_mesh(mesh):
        result = evaluate(
            jit_eval_step(model, mesh, abstract),
            state.params,
            batches,
            mesh,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
    say(f"step {int(state.step)} {_eval_line(config.train.eval_split, result)}")
    say(confusion_table(result["confusion"], classes))
    return {"step": int(state.step), "eval": result}


def _finish(
    workdir: str,
    config: ConfigDict,
    store: byte_store.ByteStore,
    state: TrainState,
    evaluation: dict[str, Any],
    progress: "_Progress",
    run_facts: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    """Writes `result.json` and prints the closing report."""
    result = {
        "step": int(state.step),
        "eval": {"split": config.train.eval_split} | evaluation,
        "params_digest": params_digest(state.params),
        "bytes_per_second": progress.bytes_per_second(),
        "wall_seconds": time.time() - started,
    } | dict(run_facts)
    say(confusion_table(evaluation["confusion"], store.classes))
    ladder = store.manifest["provenance"].get("ladder")
    if ladder:
        result["ladder"] = ladder
        say(tasks.listops.ladder_rung(evaluation["accuracy"], ladder))
    file = epath.Path(workdir) / "result.json"
    if runtime.is_leader():
        file.write_text(json.dumps(result, indent=1))
    say(f"{config.train.eval_split} accuracy {evaluation['accuracy']:.2%}; see {file}")
    say(f"curves: .venv/bin/tensorboard --logdir={workdir}")
    return result


def _eval_line(split: str, result: Mapping[str, Any]) -> str:
    return f"{split}: loss {result['loss']:.4f}  accuracy {result['accuracy']:.2%}"


class _Progress:
    """Reads each step's metrics one step late, checks and writes them, and tells how far we are."""

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        abstract: TrainState,
        num_classes: int,
        writer: MetricWriter,
        first_step: int,
    ):
        self._config, self._writer = config, writer
        self._pending: tuple[int, Any] | None = None
        self._averages: Any = None
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._window_start, self._window_first = time.time(), first_step
        self._first_step, self._num_timed, self._seconds_timed = first_step, 0, 0.0
        self._bytes_a_step = config.train.global_batch_size * config.data.seq_len
        peak = flops.peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.size if peak else None
        self._model_flops = (
            flops.train_flops(config, abstract.params, num_classes) if self._peak else 0.0
        )

    @contextlib.contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Counts the time spent in `phase` towards the split of the current window."""
        start = time.time()
        yield
        self._spent[phase] += time.time() - start

    def add(self, step: int, metrics: Any) -> None:
        """Hands over a step's metrics, still being computed, and reads those of the step before."""
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._read(*before)

    def settle(self) -> None:
        """Reads what is pending."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            with self.time("step"):
                self._read(*before)

    def bytes_per_second(self) -> float:
        """Bytes trained on per second of data wait and step, compilation left out."""
        return self._num_timed * self._bytes_a_step / max(self._seconds_timed, 1e-9)

    def report_eval(self, split: str, step: int, result: Mapping[str, Any]) -> None:
        values = {f"{split}/{name}": result[name] for name in ("loss", "accuracy")}
        self._writer.scalars(step, values)
        say(f"step {step} {_eval_line(split, result)} on {result['records']} records")

    def _read(self, step: int, metrics: Any) -> None:
        averages, scalars = jax.device_get(metrics)
        _check_finite(step, averages, scalars)
        self._averages = averages if self._averages is None else self._averages.merge(averages)
        first = step == self._first_step + 1
        # A window ends at every checkpoint too: a run that resumes there writes the same windows.
        every = (self._config.train.log_every_steps, self._config.checkpoint.every_steps)
        ends = step == 1 or any(step % n == 0 for n in every)
        if first or ends:
            self._report(step, scalars, first, ends)

    def _report(self, step: int, scalars: dict[str, Any], first: bool, ends: bool) -> None:
        now = time.time()
        elapsed, num_steps = now - self._window_start, step - self._window_first
        means = {k: float(v) for k, v in self._averages.compute().items()}
        busy = max(self._spent["data"] + self._spent["step"], 1e-9)
        if not first:  # the first step compiles
            self._num_timed += num_steps
            self._seconds_timed += busy
        rate = self._bytes_a_step * num_steps / busy
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {name: float(value) for name, value in scalars.items()}
        values |= {"speed/steps_per_second": num_steps / busy, "speed/bytes_per_second": rate}
        values |= {f"time/{phase}": spent / elapsed for phase, spent in self._spent.items()}
        if self._peak is not None:
            values["speed/model_flops_utilisation"] = (
                self._model_flops * num_steps / busy / self._peak
            )
        if ends:
            self._writer.scalars(step, values)
            self._averages = None
        left = (self._config.train.total_steps - step) * elapsed / num_steps
        eta = "compiling" if first else f"{int(left // 60)}:{int(left % 60):02d}"
        say(
            f"step {step}/{self._config.train.total_steps}  loss {means['loss']:.4f}  "
            f"accuracy {means['accuracy']:.3f}  {rate / 1e3:.1f} kB/s  ETA {eta}"
        )
        self._spent = collections.defaultdict(float)
        self._window_start, self._window_first = now, step


def _check_finite(step: int, averages: Any, scalars: Mapping[str, Any]) -> None:
    loss = float(averages.compute()["loss"])
    bad = [name for name, value in scalars.items() if not np.isfinite(value)]
    if np.isfinite(loss) and not bad:
        return
    params = [name.split("/")[1] for name in bad if name.startswith("param_norm/")]
    grads = [name.split("/")[1] for name in bad if name.startswith("grad_norm/")]
    raise NonFiniteError(
        f"step {step}: the loss is {loss}; non-finite gradients in {grads or 'no group'}, "
        f"non-finite parameters in {params or 'no group'}. Nothing of this step was saved; the "
        "newest sound checkpoint is kept. Look at the data of this step, or start again in another "
        "--workdir with lower learning rates or a lower config.optimizer.clip_norm"
    )


def enable_compilation_cache(workdir: str) -> None:
    """Keeps compiled programs in the workdir, so that a restart starts at once."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # XLA's own caches would make the path a part of every key: a moved workdir compiled anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
