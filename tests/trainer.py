"""Runs the trainer as a user does: `python -m spectral_pod.main` in processes of its own.

This file is also the config of those runs, `--config=tests/trainer.py`: a complete run, as small as
one can be.
"""

import json
import os
import pathlib
import subprocess
import sys

from ml_collections import ConfigDict

from spectral_pod.config import default

ROOT = pathlib.Path(__file__).parents[1]


def get_config() -> ConfigDict:
    c = default()
    c.data.task = "listops"
    c.data.options = ConfigDict({"train": 64, "validation": 16, "test": 16, "num_workers": 1})
    c.data.seq_len = 256
    c.data.truncate = True  # the records have 500 to 2,000 bytes
    c.model.dtype = "float32"
    c.model.num_layers = 2
    c.model.hidden_dim = 16
    c.model.embed_dim = 8
    c.model.memory.head_dim = 8
    c.model.dropout = 0.1  # so that a step depends on its random numbers
    c.train.total_steps = 40
    c.train.global_batch_size = 8
    c.train.grad_accumulation = 2
    c.train.eval_batch_size = 16
    c.train.eval_every_steps = 20
    c.train.log_every_steps = 1
    c.checkpoint.every_steps = 5
    c.optimizer.warmup_steps = 5
    return c
