"""Which frequencies of filters are in use: the schedule, the selections, and what is exported."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from spectral_pod import SpectralModel, models
from spectral_pod.errors import CheckpointError, ConfigError
from spectral_pod.generate import export
from spectral_pod.generate.restore import one_device, restore_for_inference
from spectral_pod.layers.parameter import by_frequency
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.models.model import abstract_params
from spectral_pod.objectives import Classification
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.optim import evaluated, guard_state, make_optimizer
from spectral_pod.train.selection import Schedule, select, unused_after
from spectral_pod.train.state import abstract_state
from spectral_pod.train.step import jit_train_step
from spectral_pod.validation import validate
from tests import tiny_run
from tests.models.drawn import drawn_state
from tests.tiny_run import tiny_config, write_run

# ---- the schedule


@pytest.mark.parametrize("total", [9, 33, 1025])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_the_schedule_ends_at_the_target(share, total):
    """Of Zhu and Gupta: what is left above the target falls with the third power of the time."""
    schedule = Schedule(share, first=7, last=50, every=9, regrowth=0.3)
    due = [n for n in range(1, 80) if schedule.due(jnp.int32(n))]
    assert due == [14, 23, 32, 41, 50]
    target, before = max(1, round(share * total)), total
    for n in due:
        in_use, regrown = (int(x) for x in schedule.counts(jnp.int32(n), total))
        assert abs(in_use - (target + (total - target) * ((50 - n) / 43) ** 3)) <= 0.5001
        cosine = 0.15 * (1 + np.cos(np.pi * (n - 7) / 43)) * in_use
        assert abs(regrown - cosine) <= 0.5001
        assert target <= in_use <= before
        before = in_use
    assert (in_use, regrown) == (target, 0)


def test_one_selection_if_there_is_time_for_no_more():
    schedule = Schedule(0.5, first=2, last=5, every=100, regrowth=0.3)
    assert [n for n in range(1, 300) if schedule.due(jnp.int32(n))] == [5]


def config_of(**fields):
    small = {
        "model.name": "spectral_model", "data.task": "content_type", "data.seq_len": 32,
        "model.patch.stride": 1, "model.memory_interval": 0, "model.hidden_dim": 8,
        "model.dtype": "float32", "model.dropout": 0.1, "model.spectral.method": "real",
        "optimizer.frequencies": 0.3, "optimizer.selection_every_steps": 3,
        "optimizer.warmup_steps": 2, "train.total_steps": 24,
        "optimizer.dynamics_learning_rate": 0.1, "optimizer.average": 0.9,
        "train.on_bad_step": "skip",
    }  # fmt: skip
    return tiny_config(**small | fields)


def test_mistakes_are_said():
    with pytest.raises(ConfigError, match=r"selection_end is 0\.05, update 1 of 24;.* of 2, so"):
        validate(config_of(**{"optimizer.selection_end": 0.05}))
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"optimizer\.frequencies is .*above 0, up to 1"):
            validate(config_of(**{"optimizer.frequencies": share}))
    validate(config_of())


@pytest.mark.parametrize("fields", [
    {}, {"spectral.parametrization": "time"}, {"pattern": ("selective",)},
    {"pattern": ("selective",), "selective.form": "broadcast"}, {"pattern": ("hyena", "s5")},
    {"pattern": ("selective",), "name": "spectral_gpt"},
])  # fmt: skip
def test_models_without_frequencies_are_refused(fields):
    """That is, those that have none among their parameters."""
    small = {"num_layers": 2, "patch.stride": 4} | fields
    config = config_of(**{f"model.{name}": value for name, value in small.items()})
    if config.model.name == "spectral_gpt":
        config.data.task = "lm"
    if by_frequency(abstract_params(models.build(config, num_classes=4), one_device())):
        validate(config)
        return
    with pytest.raises(ConfigError, match=r"frequencies is 0\.3, and no mixer of the model learns"):
        validate(config)


# ---- selections


def test_frequencies_come_back_where_gradients_are_large():
    use, gradient = np.zeros((2, 8), np.float32)
    unused = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
    use[:4], gradient[:] = [4, 1, 3, 2], [0, 9, 5, 0, 1, 7, 8, 2]
    found = {
        regrown: np.flatnonzero(~unused_after(use, gradient, unused, 4 - regrown // 3, regrown))
        for regrown in range(4)
    }
    assert {k: x.tolist() for k, x in found.items()} == {
        0: [0, 1, 2, 3],
        1: [0, 1, 2, 3],  # 1 has the least use and the largest gradient: it remains
        2: [0, 1, 2, 6],
        3: [1, 5, 6],
    }


def selected(use, gradient, before, in_use, regrown):
    """Those in use after a selection, by sorting lists."""
    by_use = sorted(before, key=lambda k: (-use[k], k))
    kept = by_use[: in_use - regrown]
    others = sorted(set(range(len(use))) - set(kept), key=lambda k: (-gradient[k], k))
    return set(kept) | set(others[:regrown])


def test_updates_of_a_filter_against_loops():
    """With momentum, which would go on moving what is out of use; another parameter is moved as
    without selections."""
    rng, F, layers = np.random.default_rng(0), 12, 2
    shape, rate, momentum = (layers, 2, F, 3), 0.1, 0.9
    schedule = Schedule(0.25, first=2, last=17, every=3, regrowth=0.5)
    tx = select(optax.sgd(rate, momentum), {("a", "filter"): (1, 3)}, schedule)
    params = {"a": {"filter": rng.normal(size=shape), "other": rng.normal(size=4)}}
    params = jax.tree.map(jnp.float32, params)
    state, step = tx.init(params), jax.jit(tx.update)
    w, other = (np.float64(params["a"][name]) for name in ("filter", "other"))
    velocity, other_velocity = np.zeros_like(w), np.zeros(4)
    use, gradient = np.zeros((2, layers, F))
    in_use = [set(range(F))] * layers
    came_back = 0
    for n in range(1, 25):
        g, other_g = rng.normal(size=shape) * rng.gamma(1.0, size=(F, 1)), rng.normal(size=4)
        grads = jax.tree.map(jnp.float32, {"a": {"filter": g, "other": other_g}})
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        before = in_use
        for i in range(layers):
            for k in range(F):
                use[i, k] += np.sum(g[i, :, k] * w[i, :, k]) ** 2
                gradient[i, k] += np.sum(g[i, :, k] ** 2)
        if n in (5, 8, 11, 14, 17):
            left = (17 - n) / 15
            count = 3 + round(9 * left**3)
            regrown = round(0.25 * (1 + np.cos(np.pi * (1 - left))) * count)
            in_use = [selected(*x, count, regrown) for x in zip(use, gradient, before)]
            use[:], gradient[:] = 0, 0
        for i in range(layers):
            came_back += len(in_use[i] - before[i])
            for k in range(F):
                velocity[i, :, k] = momentum * velocity[i, :, k] + (k in before[i]) * g[i, :, k]
                if k in before[i] & in_use[i]:
                    w[i, :, k] -= rate * velocity[i, :, k]
                else:
                    w[i, :, k] = 0
        other_velocity = momentum * other_velocity + other_g
        other = other - rate * other_velocity
        np.testing.assert_allclose(params["a"]["filter"], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(params["a"]["filter"] == 0, w == 0)
        np.testing.assert_allclose(params["a"]["other"], other, rtol=1e-4, atol=1e-5)
        unused = [[k not in in_use[i] for k in range(F)] for i in range(layers)]
        np.testing.assert_array_equal(state.unused["a"]["filter"], unused)
    assert came_back >= 3
    assert [len(x) for x in in_use] == [3, 3]


# ---- trained models

IN_USE = 10  # of 33 frequencies: 0.3


def batch_of(seed, rows=4):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, 32), np.int32)
    return {"tokens": tokens, "labels": tokens[:, 0] % 4, "valid": np.ones(rows, bool)}


@pytest.fixture(scope="module")
def run():
    """A model, the state after each of its updates, and what a step and a restart need."""
    config, mesh = config_of(), one_device()
    model = models.build(config, seq_len=32, num_classes=4, vocab_size=260)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    step = jit_train_step(model, optimizer, Classification, config, mesh, abstract)

    def updated(state, batch=None):
        with on_mesh(mesh):
            return step(jax.tree.map(jnp.copy, state), batch or batch_of(int(state.step)))[0]

    with on_mesh(mesh):
        start = drawn_state(abstract, model, mesh)
        # As `init` has it: the average begins at the parameters.
        state = start.replace(opt_state=optimizer.tx.init(start.params))
    states = [state]
    for _ in range(config.train.total_steps):
        states.append(updated(states[-1]))
    return types.SimpleNamespace(config=config, states=states, abstract=abstract, updated=updated)


def used(params):
    """Which frequencies of the filters [layers, 2, F, D] are not zero."""
    return np.any(np.asarray(params["blocks"]["block_0"]["spectral"]["filter"]) != 0, axis=(1, 3))


def test_training_ends_with_the_share_that_was_asked_for(run):
    """So does the average; nothing changes but by the schedule, and nothing after update 18."""
    in_use = [used(state.params) for state in run.states]
    for n in range(25):
        left = max(0, min(16, 18 - n // 3 * 3)) / 16
        unused = jax.tree.leaves(guard_state(run.states[n].opt_state).inner.unused)[0]
        assert (np.sum(~unused, axis=1) == IN_USE + round(23 * left**3)).all()
        # What comes back is zero until it is updated first.
        assert not (in_use[n] & unused).any()
        if n % 3 != 0:
            np.testing.assert_array_equal(in_use[n], ~unused)
    for params in (run.states[-1].params, evaluated(run.states[-1])):
        np.testing.assert_array_equal(used(params).sum(axis=1), IN_USE)
    came_back = sum((~a & b).sum() for a, b in itertools.pairwise(in_use))
    assert came_back > 0
    assert (used(run.states[-1].params)[0] != used(run.states[-1].params)[1]).any()


def test_a_resumed_run_is_the_same_to_the_bit(run, tmp_path):
    """From a checkpoint between two selections, with what is known of the use since the last."""
    state = run.states[11]
    selection = guard_state(state.opt_state).inner
    assert all(np.max(x) > 0 for x in jax.tree.leaves((selection.use, selection.gradient)))
    with Checkpointer(str(tmp_path / "checkpoints"), keep_latest=1, keep_best=0) as checkpointer:
        checkpointer.save(11, state, None)
    with Checkpointer(str(tmp_path / "checkpoints"), keep_latest=1, keep_best=0) as checkpointer:
        state = checkpointer.restore(run.abstract)
    for expected in run.states[12:]:
        state = run.updated(state)
        for got, want in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_bad_step_counts_for_no_selection(run):
    """The next good update is the one at which frequencies are selected."""
    before = run.states[17]
    bad = run.updated(before.replace(params=jax.tree.map(lambda x: x * jnp.nan, before.params)))
    guard, old = guard_state(bad.opt_state), guard_state(before.opt_state)
    assert guard.bad == 1
    jax.tree.map(np.testing.assert_array_equal, guard.inner, old.inner)


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    """(the workdir of the run, an export of it, by how many bytes it is smaller)."""
    workdir, folder = (tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "drawn_state", lambda *_: run.states[-1])
        write_run(workdir, run.config, steps=(24,), num_classes=4)
    return workdir, folder, export.save(restore_for_inference(str(workdir)), str(folder))


def test_an_export_has_the_used_frequencies_only_and_is_the_same_model(run, folders):
    workdir, folder, saved = folders
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    want = used(evaluated(run.states[-1]))
    for i in range(3):
        assert arrays[f"layer_{i}.spectral.filter"].shape == (2, IN_USE, 8)
        numbers = arrays[f"layer_{i}.spectral.filter.frequencies"]
        np.testing.assert_array_equal(numbers, np.flatnonzero(want[i]))
    assert saved == 3 * (4 * 2 * (33 - IN_USE) * 8 - 4 * IN_USE)
    again, trained = export.load(str(folder)), restore_for_inference(str(workdir))
    for got, want in zip(*map(jax.tree.leaves, (again.params, trained.params)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    tokens = batch_of(99)["tokens"]
    logits = [model(tokens) for model in (SpectralModel.from_export(str(folder)),
                                          SpectralModel.from_checkpoint(str(workdir)))]  # fmt: skip
    np.testing.assert_array_equal(*logits)


def test_the_used_frequencies_are_all_that_a_filter_needs(folders):
    """By a transform of these frequencies alone, in float64: two products with matrices [N, K]."""
    arrays = safetensors.numpy.load_file(folders[1] / "model.safetensors")
    params = export.load(str(folders[1])).params["layer_1"]["spectral"]
    filter_2KD = arrays["layer_1.spectral.filter"].astype(np.float64)
    k = arrays["layer_1.spectral.filter.frequencies"]
    x_BND = np.random.default_rng(0).normal(size=(2, 32, 8))
    wave_NK = np.exp(2j * np.pi * np.outer(np.arange(32), k) / 64)
    spectrum_BKD = np.einsum("nk,bnd->bkd", wave_NK.conj(), x_BND)
    spectrum_BKD = spectrum_BKD * (filter_2KD[0] + 1j * filter_2KD[1])
    weight_K = np.where((k == 0) | (k == 32), 1, 2) / 64  # for the negative frequencies, too
    want = np.einsum("nk,bkd->bnd", wave_NK * weight_K, spectrum_BKD).real
    layer = SpectralLayer(8, max_positions=32, causal=False, energy_gate="none")
    got = layer.apply({"params": params}, jnp.float32(x_BND), jnp.ones((2, 32), bool))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("change", ["others", "twice", "none", "unknown"])
def test_numbers_of_frequencies_that_do_not_fit_are_refused(folders, change, tmp_path):
    name = "layer_0.spectral.filter"
    arrays = safetensors.numpy.load_file(folders[1] / "model.safetensors")
    numbers = arrays[f"{name}.frequencies"]
    if change == "others":
        numbers[-1] = 33
    elif change == "twice":
        numbers[1] = numbers[0]
    elif change == "none":
        del arrays[f"{name}.frequencies"]
    else:
        arrays["head.kernel.frequencies"] = numbers
    trained = restore_for_inference(str(folders[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_smaller", lambda *_: arrays)
        export.save(trained, str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="is of another model"):
        export.load(str(tmp_path / "model"))
