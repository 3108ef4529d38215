"""A run from its configuration to its result, in order."""

import time
from typing import Any

import jax
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.data import tasks
from spectral_pod.errors import DataError, Preempted
from spectral_pod.layers.mixers import can_be_causal
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.train import starts
from spectral_pod.train.sources import open_sources
from spectral_pod.train.trainer import Trainer


def run(config: ConfigDict, workdir: str, *, eval_only: bool = False) -> dict[str, Any]:
    """Trains to `config.train.total_steps`, continuing what is in `workdir`; returns the result.

    With `eval_only` evaluates the newest sound checkpoint and writes nothing.

    Raises:
      UserError: see `errors.py`; whatever was checkpointed before stays.
    """
    started = time.time()
    config_lib.validate(config, tasks=tasks.TASKS, models=models.MODELS, mixers=can_be_causal())
    runtime.preemption.seconds = config.checkpoint.preemption_seconds
    runtime.compare("configuration and code", starts.facts(config))

    # ---- mesh
    runtime.check_platform()
    mesh = make_mesh(config_lib.validate_mesh(config, jax.device_count(), models=models.MODELS))
    device = jax.devices()[0].device_kind
    runtime.print_once(f"mesh {dict(mesh.shape)} of {mesh.size} {device} device(s)")

    # ---- data
    sources = open_sources(config)
    train_source = sources.training()
    splits = ("validation", config.train.eval_split)
    eval_sources = {split: sources.evaluation(split) for split in splits}
    if runtime.is_leader() and not eval_only:
        config_lib.claim_workdir(workdir, config, sources.digest, sources.classes)

    # ---- model, optimizer, state
    trainer = Trainer(config, workdir, mesh, sources, train_source, eval_sources)
    is_restored = trainer.restore()
    if eval_only:
        if not is_restored:
            raise DataError(f"{workdir} holds no sound checkpoint to evaluate; train first")
        return trainer.evaluate_only()
    if not is_restored:
        trainer.initialize()
    trainer.report_start()

    # ---- steps, result
    with trainer.running():
        trainer.compile()
        try:
            trainer.train()
            result = trainer.finish(started)
        except Preempted:
            trainer.save_and_exit()
    runtime.barrier("the end")  # what the leader still writes may take longer than disconnecting
    return result
