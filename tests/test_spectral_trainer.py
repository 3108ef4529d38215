"""Training from Python; the model then is the one that its run left."""

import numpy as np
import pytest

from spectral_pod import Config, SpectralGPT, SpectralLLM, SpectralModel, SpectralTrainer
from spectral_pod.errors import ConfigError, DataError

SMALL = {
    "num_layers": 1, "hidden_dim": 16, "dtype": "float32", "memory": {"head_dim": 4},
    "data": {"seq_len": 32}, "train": {"compilation_cache": False, "eval_batch_size": 16},
}  # fmt: skip


def texts():
    return [f"{a} plus {b} is {a + b}." for a in range(24) for b in range(24)]


def records():
    """The class says which letter is more frequent."""
    rng = np.random.default_rng(0)
    letters = rng.choice([b"a", b"b"], (400, 15))
    numbers = (letters == b"b").sum(axis=1)
    return [(b"".join(row), "ab"[int(n > 7)]) for row, n in zip(letters, numbers)]


def test_a_language_model_with_a_consistency_loss(tmp_path, capfd):
    model = SpectralLLM(Config(**SMALL, wavelet_levels=2, num_heads=2))
    before = model(np.full((1, 8), 65))
    trainer = SpectralTrainer(
        model=model, dataset=texts(), learning_rate=1e-2, spectral_loss_weight=0.1,
        workdir=str(tmp_path / "run"), batch_size=16,
    )  # fmt: skip
    assert trainer.config.model.consistency_weight == 0.1
    found = trainer.train(epochs=2)
    losses = {x["step"]: x["validation/loss"] for x in trainer.history if "validation/loss" in x}
    assert len(losses) == 2
    # There is no test split: the end of the run is not validated twice.
    assert capfd.readouterr().out.count(f"step {max(losses)} validation:") == 1
    assert found["loss"] == pytest.approx(losses[max(losses)], rel=1e-5)
    assert found["loss"] < 3.0  # log(257) is 5.5
    assert model.is_trained
    assert not np.allclose(before, model(np.full((1, 8), 65)))
    again = SpectralLLM.from_checkpoint(trainer.workdir)
    np.testing.assert_array_equal(again(np.full((1, 8), 65)), model(np.full((1, 8), 65)))
    assert isinstance(model.generate("1 plus", max_length=4), str)
    assert {line.get_label() for line in trainer.plot().axes[0].lines} == {"train", "validation"}
    assert trainer.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    with pytest.raises(ConfigError, match="has been trained"):
        trainer.train(epochs=1)
    with pytest.raises(ConfigError, match="has been trained"):
        SpectralTrainer(model=model, dataset=texts())
    with pytest.raises(ConfigError, match="no metric 'los'"):
        trainer.plot("los")


def test_a_classifier(tmp_path):
    model = SpectralModel(Config(**SMALL, embed_dim=8), num_classes=2)
    trainer = SpectralTrainer(
        model=model, dataset=records(), validation=records()[:100], learning_rate=1e-2,
        workdir=str(tmp_path / "run"),
    )  # fmt: skip
    assert trainer.train(epochs=8)["accuracy"] > 0.8
    assert model.classes == ["a", "b"]
    assert model.classes[np.argmax(model.classify(b"bbbbbbbbbabbbbb"))] == "b"


def test_pairs_of_documents(tmp_path):
    """What is written can be read by the task."""
    pair = SMALL | {"data": {"seq_len": 32, "documents": 2}}
    model = SpectralModel(Config(**pair, embed_dim=8), num_classes=2)
    data = [((one, two), one == two) for one in map(str, range(9)) for two in map(str, range(9))]
    trainer = SpectralTrainer(model=model, dataset=data, workdir=str(tmp_path / "run"))
    assert trainer.train()["records"] > 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the train data set is empty"),
        (["a text"], r"record 0 is 'a text'; it must be \(document, class\)"),
        ([("a text", "a"), ("b", "b", "b")], "record 1 is"),
        ([(("a", "b"), "a")], "record 0 is"),
        ([(3, "a")], "document 0 is 3; it must be str or bytes"),
    ],
)
def test_other_data_sets_are_refused(dataset, message):
    model = SpectralModel(Config(**SMALL, embed_dim=8), num_classes=2)
    with pytest.raises(DataError, match=message):
        SpectralTrainer(model=model, dataset=dataset)


def test_another_number_of_classes(tmp_path):
    model = SpectralModel(Config(**SMALL, embed_dim=8), num_classes=3)
    trainer = SpectralTrainer(model=model, dataset=records(), workdir=str(tmp_path / "run"))
    with pytest.raises(DataError, match="the data set has 2 classes, and the model 3"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"spectral_loss_weight": "much"}, "spectral_loss_weight"),
        ({"model": "gpt"}, "model is 'gpt'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    model = SpectralGPT(Config(**SMALL))
    with pytest.raises(ConfigError, match=message):
        SpectralTrainer(**({"model": model, "dataset": ["a"]} | arguments))
