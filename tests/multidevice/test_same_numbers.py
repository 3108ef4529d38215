"""Training gives the same numbers on every mesh, and rows of padding give none.

How far two runs are apart is measured by parameter, as norms: single entries may be as close to
zero as they like, and Adam blows up the rounding of a gradient that is next to nothing. Against the
parameter's own norm the bound is 1e-5. A gradient that is wrong could hide behind an initial value
there, so the distance is also held against the way that the parameter has come, at 1e-4: float32
rounds a scale near 1 by up to 1e-5 of the way that it comes in 20 steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.mixers import MIXERS
from spectral_pod.objectives import Classification, NextByte
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD
from spectral_pod.train.state import init_state
from spectral_pod.train.step import jit_train_step
from tests.models.drawn import drawn_state
from tests.multidevice import fake_devices

STEPS, ROWS, SEQ_LEN = 20, 16, 256
MODELS = {
    "spectral_model": {"model.num_layers": 2, "model.memory_interval": 1},
    "spectral_gpt": {"model.name": "spectral_gpt"},
    "spectral_llm": {
        "model.name": "spectral_llm",
        "model.memory_interval": 0,
        # Without the consistency loss, whose logarithms amplify rounding errors of empty bins.
        "model.channel_mixer": "frequency",
    },
    "bytes in both directions": {
        "model.patch.stride": 1, "model.patch.kernel": 4, "model.pattern": ("hyena", "delta"),
        "model.num_layers": 2, "model.bidirectional": True, "model.normalization": "batch",
        "model.channel_mixer": "half_glu1",
    },
    "chunks of documents": {"model.num_layers": 1, "model.memory_interval": 1, "model.chunk": 64},
    "n-grams": {
        "model.patch.ngrams": (3, 9), "model.patch.ngram_rows": 100, "model.num_layers": 1,
        "model.memory_interval": 0,
    },
    "pairs": {
        "data.documents": 2, "data.seq_len": SEQ_LEN // 2, "model.comparison": "normalized",
        "model.num_layers": 1, "model.memory_interval": 0,
    },
    "few frequencies": {  # of three selections the last is in update 15
        "model.pattern": ("spectral", "selective"), "model.num_layers": 2,
        "optimizer.frequencies": 0.3, "optimizer.selection_every_steps": 5,
        "optimizer.warmup_steps": 1, "train.on_bad_step": "skip",
    },
    "chunks of text": {
        "model.name": "spectral_gpt", "model.positions": "none", "model.chunk": 64,
    },
} | {
    name: {"model.pattern": (name,), "model.num_layers": 1, "model.memory_interval": 0}
    for name in MIXERS
}  # fmt: skip
# Meshes, micro-batches a step, and the model if it isn't the default.
QUICK = (("fsdp=2 sequence=2 tensor=2", 2),)
SLOW = (
    ("data=2 fsdp=2 tensor=2", 2),
    ("sequence=4 tensor=2", 2),
    ("data=8", 2),
    ("data=2 fsdp=2 tensor=2", 2, "spectral_gpt"),
    ("sequence=4 tensor=2", 2, "spectral_gpt"),
    ("data=2 fsdp=2 tensor=2", 2, "spectral_llm"),
    ("sequence=4 tensor=2", 2, "spectral_llm"),
    ("data=2", 1),
    ("fsdp=2", 1),
    ("tensor=2", 1),
    ("sequence=2", 1),
    ("data=2 fsdp=2", 1),
    ("fsdp=2 tensor=2", 1),
    ("data=2 fsdp=2 tensor=2", 1),
    ("data=2 sequence=2 tensor=2", 1),
    ("data=8", 1),
    ("sequence=8", 1),
    *(("data=2 fsdp=2 tensor=2", 1, name) for name in sorted(MIXERS)),
    ("data=2 sequence=2", 1, "bytes in both directions"),
    ("fsdp=2 tensor=2", 1, "bytes in both directions"),
    ("data=2 sequence=2", 2, "chunks of documents"),
    ("fsdp=2 sequence=2", 2, "n-grams"),
    ("data=2 sequence=2", 2, "pairs"),
    ("data=2 sequence=2", 2, "chunks of text"),
    ("fsdp=2 tensor=2", 1, "chunks of text"),
    ("data=2 sequence=2 tensor=2", 2, "few frequencies"),
    ("data=2 fsdp=2 tensor=2", 2, "few frequencies"),
)


# ---- in a process with fake devices


def make_batch(seed, by_position=False):
    """Records of all lengths; some rows are padding. Labels are by row, or by position."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (ROWS, SEQ_LEN)).astype(np.int32)
    lengths = rng.integers(1, SEQ_LEN + 1, ROWS)
    valid = rng.random(ROWS) < 0.8
    tokens[np.arange(SEQ_LEN) >= (lengths * valid)[:, None]] = PAD
    labels = rng.integers(0, fake_devices.NUM_CLASSES, ROWS).astype(np.int32)
    if by_position:
        labels, valid = tokens % fake_devices.NUM_CLASSES, tokens != PAD
    return {"tokens": tokens, "labels": labels, "valid": valid}


def initial_state(s):
    """That of step 0 in training."""
    return init_state(s.model, s.optimizer.tx, s.mesh, s.config.seed)


def any_state(s):
    """One that takes no time to compile."""
    return drawn_state(s.abstract, s.model, s.mesh)


def make_step(sizes, start=initial_state, **overrides):
    """(a new state, of `start`, and the jitted step on numpy batches) on a mesh."""
    s = fake_devices.setup(sizes, **overrides)
    objective = NextByte if s.model.causal else Classification
    step = jit_train_step(s.model, s.optimizer, objective, s.config, s.mesh, s.abstract)

    def on_mesh(state, batch):
        with jax.set_mesh(s.mesh):
            state, (averages, _) = step(state, jax.device_put(batch, batch_sharding(s.mesh)))
        return state, float(jax.device_get(averages).compute()["loss"])

    return start(s), on_mesh


def train(sizes, num_micro, model="spectral_model"):
    """The parameters before and after training, by name, and the loss of every step."""
    state, step = make_step(sizes, **MODELS[model], **{"train.grad_accumulation": num_micro})
    before, losses = fake_devices.leaves(state.params), []
    for seed in range(STEPS):
        state, loss = step(state, make_batch(seed, by_position="model.name" in MODELS[model]))
        losses.append(loss)
    return before, fake_devices.leaves(state.params), losses


def compare(cases):
    """For each mesh: the losses there and on one device, and by parameter the norms of values,
    ways and differences."""
    on_one, found = functools.cache(lambda *case: train("", *case)), []
    for sizes, *case in cases:
        before, after, losses = train(sizes, *case)
        before_1, after_1, losses_1 = on_one(*case)
        norms = {
            name: {
                "initial": norm(before_1[name]),
                "initial difference": norm(before[name] - before_1[name]),
                "final": norm(after_1[name]),
                "way": norm(after_1[name] - before_1[name]),
                "difference": norm(after[name] - after_1[name]),
            }
            for name in after_1
        }
        found.append({"losses": losses, "losses on one": losses_1, "parameters": norms})
    return found


def norm(x):
    return float(np.linalg.norm(x.astype(np.float64)))


def padding():
    """Losses, and first moments of the optimizer by name, after a step on three batches.

    Eight records in a batch with eight rows of padding, three of them in even rows and five in odd
    ones; the same with other contents in the rows of padding; and every record twice.
    """
    overrides = {"model.num_layers": 1, "model.memory_interval": 1, "model.dropout": 0.0}
    overrides |= {"train.grad_accumulation": 2, "optimizer.clip_norm": 1e9}
    rng, batch = np.random.default_rng(0), make_batch(0)
    batch["tokens"] = rng.integers(0, 256, (ROWS, SEQ_LEN)).astype(np.int32)
    rows = [0, 1, 2, 3, 4, 5, 7, 15]  # the third device of four has padding only
    batch["valid"] = np.isin(np.arange(ROWS), rows)
    other = {k: v.copy() for k, v in batch.items()}
    other["tokens"][~batch["valid"]] = PAD
    other["labels"][~batch["valid"]] = 0
    twice = {k: np.concatenate([v[rows], v[rows]]) for k, v in batch.items()}
    start, step = make_step("data=2 fsdp=2", any_state, **overrides)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))  # a step consumes its state
    found = []
    for each in (batch, other, twice):
        state, loss = step(copy(start), each)
        moments = fake_devices.leaves(state.opt_state[1].mu)
        found.append({"loss": loss, "moments": {k: v.tolist() for k, v in moments.items()}})
    return found


# ---- under pytest


def process_of(case):
    """The cases that one process runs: a few, of one model, which it trains on one device once."""
    cases = QUICK if case in QUICK else SLOW
    alike = [other for other in cases if other[1:] == case[1:]]
    start = alike.index(case) // 3 * 3
    return tuple(alike[start : start + 3])


@functools.cache
def compared(cases):
    return dict(zip(cases, fake_devices.run(__file__, "compare", cases)))


@pytest.fixture(
    params=[*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: ", ".join([case[0], f"{case[1]} micro-batches", *case[2:]]),
)
def found(request):
    return compared(process_of(request.param))[request.param]


def test_parameters_start_equal(found):
    """The random draws are the same bits; a filter is the FFT of such draws, but for rounding."""
    for name, norms in found["parameters"].items():
        bound = 1e-6 if name.endswith("filter") else 0
        assert norms["initial difference"] <= bound * norms["initial"], name


def test_losses_agree(found):
    assert np.all(np.isfinite(found["losses"]))
    np.testing.assert_allclose(found["losses"], found["losses on one"], rtol=1e-5)


def test_parameters_agree(found):
    for name, norms in found["parameters"].items():
        assert norms["difference"] <= 1e-5 * norms["final"], name
        assert norms["difference"] <= 1e-4 * norms["way"], name


def test_rows_of_padding_have_no_influence():
    one, other, twice = fake_devices.run(__file__, "padding")
    assert one == other
    assert one["loss"] == pytest.approx(twice["loss"], rel=1e-6)
    for name, moment in one["moments"].items():
        assert np.abs(moment).max() > 0, name
        difference = np.linalg.norm(np.subtract(moment, twice["moments"][name]))
        assert difference <= 1e-5 * np.linalg.norm(moment), name


if __name__ == "__main__":
    fake_devices.main(compare, padding)
