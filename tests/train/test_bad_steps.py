"""Steps with a bad loss or bad gradients: skipped, or rolled back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectral_pod.train import optim
from tests import trainer


def run_guard(losses, gradients, spike_factor=0.0):
    """The parameters after every step, and the guard's last state."""
    tx = optim.guard(optax.adam(0.1), spike_factor)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    history = []
    for loss, gradient in zip(losses, gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(
                {"w": jnp.full(3, gradient)}, state, params, loss=jnp.float32(loss)
            )
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params["w"]))
    return history, state


@pytest.mark.parametrize("loss", [np.nan, np.inf, 2.0])
def test_a_bad_step_leaves_everything_as_it_was(loss):
    gradient = np.nan if loss == 2.0 else 1.0
    with_bad, state = run_guard([2.0, 2.0, loss, 2.0], [1.0, 0.5, gradient, 0.25])
    without, expected = run_guard([2.0, 2.0, 2.0], [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(with_bad[1], with_bad[2])
    np.testing.assert_array_equal(with_bad[3], without[2])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, expected))


def test_a_spike_is_not_a_slope():
    sound = list(np.linspace(2.0, 2.8, 20))  # rising, but slowly
    _, state = run_guard([*sound, 9.0, 9.0], [0.1] * 22, spike_factor=3.0)
    assert int(state.bad) == 2
    _, state = run_guard([*sound, 6.0], [0.1] * 21, spike_factor=3.0)
    assert int(state.bad) == 0
    _, state = run_guard([*sound, 9.0], [0.1] * 21)
    assert int(state.bad) == 0  # without a factor any finite loss is accepted


CONFIG = "tests/train/bad_steps.py"
SHORT = ("train.total_steps=14", "train.eval_every_steps=7")


def points(workdir, tag):
    return [(p["step"], p[tag]) for p in trainer.curves(workdir) if p.get(tag)]


def test_bad_batches_are_skipped_up_to_a_limit(tmp_path):
    options = (*SHORT, "train.on_bad_step=skip", "train.max_bad_steps=2", "seed=1")
    done = trainer.run(trainer.command(tmp_path, *options, config=CONFIG), code=3)
    for step in (8, 9):
        assert f"step {step}: its loss is nan" in done.stdout
    assert done.stdout.count("its update is skipped") == 2
    assert points(tmp_path, "bad_steps") == [(8, 1.0), (9, 2.0)]
    assert "step 10" in done.stderr
    assert "config.train.max_bad_steps is 2" in done.stderr


def test_the_run_rolls_back_and_skips_a_bad_batch(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = (*SHORT, "train.on_bad_step=rollback", "checkpoint.keep_latest=9")
    printed = trainer.run(trainer.command(one, *options, config=CONFIG)).stdout
    assert "step 8: its loss is nan" in printed
    assert "continuing behind it with the state of step 5" in printed
    assert points(one, "rollback_to") == [(8, 5.0)]
    assert [step for step, _ in points(one, "train/loss")] == [*range(1, 8), *range(9, 15)]
    # Killed between the bad step and the next checkpoint, the run has the same result.
    shutil.copytree(one, two)
    (two / "result.json").unlink()
    for step in ("10", "14"):
        (two / "seals" / f"{step}.json").unlink()
    assert "starting at step 5" in trainer.run(trainer.command(two, *options, config=CONFIG)).stdout
    trainer.assert_same_run(two, one)
