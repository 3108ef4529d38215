"""A trained model is restored from its workdir alone, bit by bit, and nothing there changes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from spectral_pod import models
from spectral_pod.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.text import UntilStop, continuations, decoded
from spectral_pod.layers.block import unstack
from spectral_pod.objectives import Classification, NextByte
from spectral_pod.shapes import PAD
from spectral_pod.train.sources import open_sources
from tests import tiny_run, trainer
from tests.models.drawn import drawn_state
from tests.tiny_run import DIGEST, tiny_config, write_run

pytestmark = pytest.mark.slow  # trains and saves small models first


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a workdir with steps 1 and 2, the parameters of step 2, stacked)."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, write_run(workdir, steps=(1, 2))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The same for a classifier whose data have fewer classes than its task can have."""
    workdir = tmp_path_factory.mktemp("classifier")
    config = tiny_config(**{"model.name": "spectral_model", "data.task": "content_type"})
    return workdir, write_run(workdir, config, num_classes=4)


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def test_parameters_are_those_of_the_run(run):
    workdir, params = run
    before = trainer.contents(workdir)
    trained = restore_for_inference(str(workdir))
    assert trainer.contents(workdir) == before
    jax.tree.map(np.testing.assert_array_equal, trained.params, unstack(params))
    assert (trained.step, trained.num_classes, trained.vocab_size) == (2, 257, 260)
    assert (trained.objective, trained.data_digest) == (NextByte, DIGEST)
    assert trained.config.to_dict() == json.loads(json.dumps(tiny_config().to_dict()))
    assert restore_for_inference(str(workdir), step=1).step == 1


@pytest.mark.parametrize("fixture", ["run", "classifier"])
def test_logits_are_those_of_the_trained_model(request, fixture):
    """Unstacked layers compute the same as the scanned stack."""
    workdir, params = request.getfixturevalue(fixture)
    trained = restore_for_inference(str(workdir))
    config = trained.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    stacked = models.build(config, seq_len=96, num_classes=trained.num_classes)
    tokens = np.random.default_rng(0).integers(0, 256, (3, 64))
    tokens[1, 40:] = PAD
    logits = [
        jax.jit(module.apply)({"params": p}, jnp.asarray(tokens), jnp.asarray(tokens != PAD))
        for module, p in ((stacked, params), (trained.module, trained.params))
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_an_average_of_parameters_is_what_is_used(tmp_path):
    """By inference and by evaluations; the run itself goes on with the parameters."""
    averaged = ["optimizer.average=0.9", "train.total_steps=10", "train.eval_every_steps=10"]
    trainer.run(trainer.command(tmp_path, *averaged))
    folder = tmp_path / "checkpoints/10/default"
    state = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder))
    trained = restore_for_inference(str(tmp_path))
    average = unstack(state["opt_state"]["average"])
    jax.tree.map(np.testing.assert_array_equal, trained.params, average)
    raw = np.concatenate([x.ravel() for x in jax.tree.leaves(unstack(state["params"]))])
    used = np.concatenate([x.ravel() for x in jax.tree.leaves(trained.params)])
    assert np.abs(raw - used).max() > 1e-4
    source = open_sources(trainer.config()).evaluation("test")["listops"]
    batch = source.rows(0, np.arange(16))
    tokens = jnp.asarray(batch["tokens"])
    logits = trained.module.apply({"params": trained.params}, tokens, tokens != PAD)
    loss = Classification.outputs(logits, jnp.asarray(batch["labels"]), batch["valid"])["loss"]
    result = json.loads((tmp_path / "result.json").read_text())
    np.testing.assert_allclose(np.mean(loss), result["eval"]["loss"], rtol=1e-4)


def test_bfloat16_when_asked(run):
    trained = restore_for_inference(str(run[0]), dtype="bfloat16")
    assert trained.module.config.dtype == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(trained.params)} == {jnp.dtype("float32")}


# ---- errors


def test_no_workdir(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        restore_for_inference(str(tmp_path / "none"))


def test_no_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        restore_for_inference(str(copied))
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        restore_for_inference(str(copied))
    assert not (copied / "checkpoints").exists()


def test_no_such_step(copied):
    with pytest.raises(CheckpointError, match="no sealed checkpoint of step 7; there are: 2, 1"):
        restore_for_inference(str(copied), step=7)


def test_a_damaged_step_is_passed_over_and_left_where_it_is(copied):
    largest = max((copied / "checkpoints/2").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    before = trainer.contents(copied)
    assert restore_for_inference(str(copied)).step == 1
    with pytest.raises(CheckpointError, match=r"step 2 is not sound: .* is altered"):
        restore_for_inference(str(copied), step=2)
    assert trainer.contents(copied) == before


def test_a_step_that_is_being_written_is_none(copied):
    (copied / "seals/2.json").unlink()
    shutil.copytree(copied / "checkpoints/1", copied / "checkpoints/3.orbax-checkpoint-tmp")
    before = trainer.contents(copied)
    assert restore_for_inference(str(copied)).step == 1
    assert trainer.contents(copied) == before


def test_parameters_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    def of_logs(*arguments):
        state = drawn_state(*arguments)
        return state.replace(params=jax.tree.map(jnp.log, state.params))

    monkeypatch.setattr(tiny_run, "drawn_state", of_logs)
    write_run(tmp_path)
    with pytest.raises(NonFiniteError, match=r"checkpoints/1 holds parameters that are NaN"):
        restore_for_inference(str(tmp_path))


def test_a_checkpoint_of_another_run_is_refused(copied, tmp_path):
    """Also where it is of the same model, and all its files are as they were written."""
    write_run(tmp_path / "other", tiny_config(**{"seed": 1}), steps=(1, 2))
    for name in ("checkpoints/1", "seals/1.json"):
        shutil.rmtree(copied / name) if (copied / name).is_dir() else (copied / name).unlink()
        (tmp_path / "other" / name).rename(copied / name)
    with pytest.raises(CheckpointError, match=r"step 1 is not sound: it is of another run"):
        restore_for_inference(str(copied), step=1)


@pytest.mark.parametrize("with_seal", [True, False])
def test_a_step_that_was_renamed_is_refused(copied, with_seal):
    shutil.copytree(copied / "checkpoints/1", copied / "checkpoints/1000")
    if with_seal:
        shutil.copy(copied / "seals/1.json", copied / "seals/1000.json")
    assert restore_for_inference(str(copied)).step == 2
    with pytest.raises(CheckpointError, match=r"its seal is of step 1;|has no sealed .* step 1000"):
        restore_for_inference(str(copied), step=1000)


def test_a_step_whose_seal_was_edited_too_is_refused(copied):
    """As older versions wrote it, the seal has no checksum."""
    shutil.move(copied / "checkpoints/1", copied / "checkpoints/1000")
    seal = shutil.move(copied / "seals/1.json", copied / "seals/1000.json")
    trainer.edit(seal, lambda seal: seal.update(step=1000))
    for step in (None, 1000):
        with pytest.raises(CheckpointError, match=r"checkpoints/1000 holds the state of step 1;"):
            restore_for_inference(str(copied), step=step)


def change_model(workdir, change):
    """Changes the configuration, as if an older version had written the run."""
    trainer.edit(workdir / "config.json", lambda run: change(run["config"]["model"]))
    for seal in (workdir / "seals").iterdir():
        trainer.edit(seal, lambda seal: seal.pop("run"))


def test_fields_of_another_version(copied):
    change_model(copied, lambda model: model.update(num_experts=2))
    with pytest.raises(ConfigError, match=r"another version.*config\.model\.num_experts"):
        restore_for_inference(str(copied))


def test_a_mixer_of_a_config_file(copied):
    """Another program does not know it, unless it is registered."""
    change_model(copied, lambda model: model.update(pattern=["hyena+average"], average={"a": 1}))
    with pytest.raises(ConfigError, match=r"pattern has 'average', and there is no such mixer in"):
        restore_for_inference(str(copied))


def test_fields_that_came_later_have_their_defaults(run, copied, caplog):
    change_model(copied, lambda model: (model.pop("norm"), model.pop("selective")))
    assert restore_for_inference(str(copied)).config == restore_for_inference(str(run[0])).config
    assert "older than config.model.norm, config.model.selective" in caplog.text


def test_parameters_of_another_model(copied):
    change_model(copied, lambda model: model.update(mlp_expansion=2.0))
    with pytest.raises(CheckpointError, match=r"feed_forward.*checkpoint float32\[.*model float32"):
        restore_for_inference(str(copied))


def test_a_classifier_writes_no_text(classifier):
    trained = restore_for_inference(str(classifier[0]))
    assert (trained.num_classes, trained.objective) == (4, Classification)
    with pytest.raises(ConfigError, match=r"spectral_model trained on 'content_type'"):
        next(continuations(trained, [b"x"], num_bytes=1))


# ---- text


def cuts(data, rng):
    """Cuts `data` into pieces, of which some are empty."""
    places = sorted(rng.integers(0, len(data) + 1, rng.integers(0, 6)).tolist())
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]


def test_nothing_of_a_stop_string_is_shown():
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(3000):
        data = bytes(rng.choice(list(b"ab"), rng.integers(0, 12)).tolist())
        stop = bytes(rng.choice(list(b"ab"), rng.integers(0, 5)).tolist())
        text, shown = UntilStop(stop), b""
        for piece in cuts(data, rng):
            shown += text.add(piece)
            assert not stop or stop not in shown
        found = bool(stop) and stop in data
        shown += text.end()
        assert shown == (data[: data.index(stop)] if found else data)
        assert text.stopped == found
        stopped += found
    assert 500 < stopped < 2500


def test_what_cannot_begin_a_stop_string_is_not_held_back():
    text = UntilStop(b"\n\n")
    assert (text.add(b"one\n"), text.add(b"two"), text.end()) == (b"one", b"\ntwo", b"")


def test_characters_come_whole():
    rng = np.random.default_rng(0)
    text = "aé€😀"
    data = text.encode()
    for _ in range(100):
        pieces = list(decoded(iter(cuts(data, rng))))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
    assert "".join(decoded(iter([b"a\xff", "é".encode()[:1]]))) == "a\ufffd\ufffd"


def test_a_stop_string_ends_a_continuation(run):
    trained = restore_for_inference(str(run[0]))
    prompts = [b"ab", b"a longer prompt"]

    def texts(**options):
        with jax.set_mesh(trained.mesh):
            rows = continuations(trained, prompts, num_bytes=90, seed=5, **options)
            return [b"".join(pieces) for pieces in zip(*rows)]

    whole = texts()
    assert max(map(len, whole)) > 40
    stop = max(whole, key=len)[33:35]  # in the second piece
    assert texts(stop=stop) == [text.partition(stop)[0] for text in whole]
