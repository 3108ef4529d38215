"""Workdirs and stores of an earlier version still resume, evaluate, generate and export."""

import hashlib
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.generate import export
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.text import continuations
from tests import trainer

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "workdirs_24bfa95.tar.xz"
RUNS = ("classifier", "gpt", "llm")
QUICK = [name if name == "gpt" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder with the workdirs by name, their stores in `data`, and `facts.json`."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        # Python has extractall(filter="data") since 3.11.4, and this attribute is safe before.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def facts(old):
    return json.loads((old / "facts.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_it_is_used(name, old, facts, tmp_path):
    """Its parameters bit by bit, its logits, and the text of a language model."""
    trained, want = restore_for_inference(str(old / name), step=4), facts[name]
    export.save(trained, str(tmp_path / "export"))
    exported = (tmp_path / "export" / "model.safetensors").read_bytes()
    assert hashlib.sha256(exported).hexdigest() == want["export_sha256"]
    length = trained.config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, 256, (2, length))
    with jax.set_mesh(trained.mesh):
        logits = jax.jit(trained.module.apply)(
            {"params": trained.params}, jnp.asarray(tokens, jnp.int32), jnp.ones((2, length), bool)
        )
        last = logits[:, -1] if logits.ndim == 3 else logits
        np.testing.assert_allclose(last, want["logits"], atol=1e-4)
        if name != "classifier":
            pieces = continuations(
                trained, [b"To be"], num_bytes=40, sampling=Sampling(temperature=0)
            )
            assert 0 < len(b"".join(piece for (piece,) in pieces)) <= 40


def command(old, name, *overrides):
    overrides = f"data.dir={old / 'data'}", *overrides
    return trainer.command(old / name, *overrides, config=f"tests/old_runs.py:{name}")


@pytest.mark.parametrize("name", QUICK)
def test_it_is_evaluated(name, old):
    """Also with an option written out that it left at its default."""
    done = trainer.run([*command(old, name, "data.options.seed=0"), "--eval_only"])
    assert "step 4 " in done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_it_is_resumed(name, old, facts):
    """It uses its own store, which has an older name, and ends as it would have then."""
    stores = sorted(path.name for path in (old / "data").iterdir())
    assert "starting at step 4" in trainer.run(command(old, name)).stdout
    result, want = trainer.result(old / name), facts[name]
    assert result["step"] == 8
    assert result["eval"]["loss"] == pytest.approx(want["loss_at_8"], rel=1e-4)
    assert result["eval"]["accuracy"] == pytest.approx(want["accuracy_at_8"], abs=0.01)
    assert sorted(path.name for path in (old / "data").iterdir()) == stores
    # Its curves are those of all lines, also of the ones that it had written.
    points = trainer.event_points(old / name)
    for split in ("train", "validation"):
        tag = f"{split}/loss"
        losses = {p["step"]: p[tag] for p in trainer.metrics(old / name) if tag in p}
        assert min(losses) <= 4 < max(losses)
        assert points[split, "metrics/loss"] == pytest.approx(losses, rel=1e-6)


def test_other_options_do_not_continue_it(old):
    done = trainer.run(command(old, "classifier", "data.options.test=17"), code=2)
    assert "config.data.options.test: 16 there, 17 now" in done.stderr
