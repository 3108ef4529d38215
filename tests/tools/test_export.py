"""Export: the same model is loaded, bit by bit, or one message says why not."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalTokenNotFoundError

from spectral_pod import SpectralGPT, SpectralLLM
from spectral_pod import config as config_lib
from spectral_pod.errors import CheckpointError, ConfigError, DataError
from spectral_pod.generate import export, hub, model_card
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.run_records import RunRecords
from tests import trainer
from tests.tiny_run import DIGEST, write_run

RESULT = {"step": 1, "eval": {"split": "validation", "loss": 1.25, "confusion": [[1]]}}


def run_tool(home, *arguments, code=0):
    """Runs the tool without a login; returns its stderr."""
    without_login = ["env", f"HF_HOME={home}", "HF_TOKEN="]
    done = trainer.run([*without_login, sys.executable, "-m", "tools.export", *arguments], code)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir)
    (workdir / "result.json").write_text(json.dumps(RESULT))
    return workdir


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "model"
    run_tool(folder.parent, f"--workdir={workdir}", f"--output={folder}", "--license=mit")
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def test_parameters_and_logits_to_the_bit(workdir, exported):
    model, original = (
        SpectralGPT.from_export(str(exported)),
        SpectralGPT.from_checkpoint(str(workdir)),
    )
    jax.tree.map(np.testing.assert_array_equal, model.params, original.params)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 64))
    np.testing.assert_array_equal(model(tokens), original(tokens))
    again, trained = export.load(str(exported)), restore_for_inference(str(workdir))
    assert again.config.to_dict() == trained.config.to_dict()
    assert again._replace(params=0, config=0) == trained._replace(params=0, config=0)


def test_names_and_dtypes(exported):
    params = safetensors.numpy.load_file(exported / "model.safetensors")
    assert {"layer_0.hyena_norm.scale", "layer_2.feed_forward_norm.bias", "head.bias"} <= set(
        params
    )
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}


def test_the_model_card(exported, workdir):
    text = (exported / "README.md").read_text()
    _, fields, body = text.split("---\n", 2)
    assert "license: mit" in fields.splitlines()
    size = sum(x.size for x in jax.tree.leaves(export.load(str(exported)).params))
    for part in (f"{size:,} float32 parameters", DIGEST, "| loss | 1.25 |", "SpectralGPT.from_exp"):
        assert part in body
    assert "confusion" not in body
    trained = restore_for_inference(str(workdir))
    unlicensed = model_card.card(trained, RunRecords(RESULT | {"step": 9}))
    assert "None are recorded of this step" in unlicensed
    assert "license:" not in unlicensed


def test_names_from_data_are_only_text_in_a_card(workdir):
    """Neither HTML, headings, tables nor links; and each stays on its line."""
    trained = restore_for_inference(str(workdir))
    config = config_lib.copy(trained.config)
    config.data.task = "listops"
    nasty = [
        "<script>alert(1)</script>",
        "a\n# Heading\n---\nlicense: x",
        "| a | b |",
        "[x](y) `z`",
    ]
    confusion = np.eye(len(nasty), dtype=int).tolist()
    result = {"step": 1, "eval": {"split": "validation", "confusion": confusion}}
    trained = trained._replace(config=config, classes=nasty)
    text = model_card.card(trained, RunRecords(result, no_stores="<b>lost</b>"))
    assert "<b>" not in text
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "# Heading" not in [line.strip() for line in body.splitlines()]
    assert len([line for line in body.splitlines() if "Heading" in line]) == 2  # and in a table
    assert r"\| a \| b \|" in body
    assert r"\[x\]\(y\) \`z\`" in body


def test_a_folder_in_use_is_left_alone(workdir, copied):
    before = {path: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(DataError, match="holds something already"):
        export.save(restore_for_inference(str(workdir)), str(copied))
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_damaged_parameters(copied):
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        export.load(str(copied))


def test_another_model(copied):
    wider = {"mlp_expansion": 2.0}
    trainer.edit(copied / "config.json", lambda facts: facts["config"]["model"].update(wider))
    with pytest.raises(CheckpointError, match=r"layer_0/feed_forward"):
        export.load(str(copied))


@pytest.mark.parametrize("field", ["vocab_size", "num_classes"])
def test_sizes_that_no_model_has(copied, field):
    for size, error in ((0, DataError), (2**31, DataError), (1, CheckpointError)):
        trainer.edit(copied / "config.json", lambda facts, size=size: facts.update({field: size}))
        with pytest.raises(error, match=rf"config\.json cannot be used: {field}: |another model"):
            export.load(str(copied))


def test_no_exported_model(exported, tmp_path):
    with pytest.raises(DataError, match=r"no file config\.json"):
        export.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"spectral_pod\.SpectralGPT"):
        SpectralLLM.from_export(str(exported))


# ---- the Hub


class FakeHub:
    """Records the calls of its methods; some fail on request."""

    def __init__(self, failing="", error=None):
        self.failing, self.error, self.calls = failing, error, []

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            if name == self.failing:
                raise self.error

        return call


def test_upload(exported):
    fake = FakeHub()
    hub.check_access(fake, "me/model")
    hub.upload(fake, "me/model", str(exported))
    assert fake.calls == [
        ("whoami", (), {}),
        ("create_repo", ("me/model",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/model", "folder_path": str(exported)}),
    ]


@pytest.mark.parametrize("failing", ["create_repo", "upload_folder"])
def test_an_upload_that_fails(failing):
    with pytest.raises(DataError, match=r"hf upload me/model folder.*no space there"):
        hub.upload(FakeHub(failing, OSError("no space there")), "me/model", "folder")


def test_no_login():
    with pytest.raises(ConfigError, match="hf auth login"):
        hub.check_access(FakeHub("whoami", LocalTokenNotFoundError("no token")), "me/model")
    fake = FakeHub()
    with pytest.raises(ConfigError, match="not USER/REPO"):
        hub.check_access(fake, "model")
    assert fake.calls == []


def test_without_a_login_nothing_is_written(workdir, tmp_path):
    stderr = run_tool(
        tmp_path, f"--workdir={workdir}", f"--output={tmp_path / 'new'}", "--upload=me/model",
        code=2,
    )  # fmt: skip
    assert "hf auth login" in stderr
    assert not (tmp_path / "new").exists()
