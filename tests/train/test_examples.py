"""The pictures of the first examples of an evaluation, with their classes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.util import tensor_util

from spectral_pod.data import tasks
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.objectives import NUM_SHOWN
from spectral_pod.train import examples, loop
from spectral_pod.train.sources import open_sources
from tests import trainer


def test_a_sheet_has_every_picture_and_whether_its_prediction_is_right():
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (3, 32, 64), np.uint8))
    sheet = examples.sheet(pictures, [0, 1, 1], [0, 1, 0], ["no", "yes \N{SNOWMAN} " * 50])
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    for i, picture in enumerate(pictures):
        left = examples._GAP + i * (128 + examples._GAP)
        shown = sheet[examples._GAP :, left : left + 128]
        enlarged = picture.repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(shown[:64], np.stack([enlarged] * 3, -1))
        # Its text is black, and green or red.
        colours = {tuple(pixel) for pixel in shown[64 + examples._LINE :].reshape(-1, 3)}
        assert (examples._RIGHT in colours, examples._WRONG in colours) == (i < 2, i == 2)


def test_squares_of_luma_are_pictures():
    def picture(record, **options):
        return tasks.make("records", {"train": "x", **options}).picture(record)

    pixels = np.arange(9, dtype=np.uint8)
    np.testing.assert_array_equal(picture(pixels, luma=True), pixels.reshape(3, 3))
    assert picture(pixels) is None
    assert picture(pixels[:8], luma=True) is None
    assert picture(pixels, luma=True, data=("a", "b")) is None
    assert tasks.make("listops", {}).picture(pixels) is None
    assert tasks.make("pathfinder", {}).picture(pixels) is None


@pytest.mark.parametrize("eval_batch_size", [16, 32])
def test_a_run_shows_its_first_examples_with_what_it_predicts(tmp_path, eval_batch_size):
    config = trainer.config(
        data__task="pathfinder", data__seq_len=1024, data__dir=str(tmp_path / "data"),
        train__total_steps=2, train__eval_every_steps=1, train__grad_accumulation=1,
        train__eval_batch_size=eval_batch_size, model__dropout=0.0,
    )  # fmt: skip
    config.data.options = {
        "contour_length": 3, "train": 16, "validation": 20, "test": 5, "num_workers": 1
    }  # fmt: skip
    loop.run(config, str(tmp_path / "run"))
    sources = open_sources(config)
    trained = restore_for_inference(str(tmp_path / "run"), step=2)
    for split, steps, count in (("validation", [1, 2], NUM_SHOWN), ("test", [2], 5)):
        (source,) = sources.evaluation(split).values()
        batch = source.rows(0, np.arange(count))
        with jax.set_mesh(trained.mesh):
            tokens = jnp.asarray(batch["tokens"])
            logits = trained.module.apply({"params": trained.params}, tokens, tokens < 256)
        expected = examples.sheet(
            batch["tokens"].astype(np.uint8).reshape(-1, 32, 32),
            batch["labels"],
            np.argmax(logits, -1),
            ["separate", "connected"],
        )
        events = trainer.event_accumulators(tmp_path / "run")[split].Tensors("pictures/examples")
        assert [event.step for event in events] == steps
        png = tensor_util.make_ndarray(events[-1].tensor_proto)[2]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)
