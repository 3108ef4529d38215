"""Every shipped config, in each of its presets, passes the checks and builds a model."""

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.analysis import hardware
from spectral_pod.data import tasks
from spectral_pod.train.sources import open_sources
from spectral_pod.validation import validate, validate_mesh

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
BASELINES = ("transformer", "linear_transformer", "linformer", "fnet", "s5")
FORMS = {
    "quickstart": [()],
    "lra_listops": [
        "symbol", "stripped", "raw", "hybrid", "multi_scale", "cpu", "gpu", "overfit", "short",
        "short,subtrees", "short,arguments", "gpu,hybrid,packed", *BASELINES, "s5,raw,cpu",
    ],
    "lra_text": ["full", "cpu", *BASELINES],
    "lra_image": ["full", "cpu", *BASELINES],
    "lra_retrieval": ["full", "cpu", *BASELINES],
    "dna": ["full", "cpu"],
    "python_syntax": [()],
    "logs": ["blocks", "lines"],
    "proteins": ["cpu", "full"],
    "topics": ["cpu", "full"],
    "lra_pathfinder": ["pathfinder", "path_x", "cpu", "cpu,hybrid", "hybrid", *BASELINES,
                       "path_x,s5"],
    "lm_library": ["gpt", "llm"],
    "lm_shakespeare": ["cpu", "gpu"],
    "lm_wikitext": ["cpu", "gpu"],
    "lm_enwik8": ["cpu", "gpu"],
    "lm_pod": ["125m", "350m", "1b", "7b", "125m_32k", "350m_32k", "1b_32k", "7b_32k"],
    "memory": ["copy", "recall", "overwrite"],
    "mqar": ["zoology", "bytes"],
    "agent": ["tool", "python", "direct", "traces"],
    "rag": ["retrieved", "oracle", "none"],
}  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_configs_are_listed():
    assert {path.stem for path in CONFIGS.glob("*.py")} == FORMS.keys()


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms], ids=str
)
def test_a_config_is_sound(name, form):
    config = load(name).get_config(*([form] if form else []))
    validate(config)
    validate_mesh(config, config.mesh.fsdp)
    task = tasks.make(config.data.task, config.data.options)
    if isinstance(task, tasks.DrawnTask):
        assert task.max_length <= config.data.seq_len
    model = models.build(
        config,
        seq_len=config.data.seq_len,
        num_classes=task.num_classes,
        vocab_size=task.vocab_size,
    )
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    assert jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]


@pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("lra_")])
def test_presets_combine(name):
    """Every choice of one preset of each kind, in any order, is valid and has what each of them has
    alone."""
    module = load(name)
    kinds = [tuple(getattr(module, kind, {})) for kind in ("SEQ_LEN", "TASKS", "SIZES", "MODELS")]
    kinds = [kind for kind in kinds if kind]
    for choice in itertools.product(*kinds):
        config = module.get_config(",".join(choice))
        validate(config)
        assert config.to_dict() == module.get_config(",".join(reversed(choice))).to_dict()
        size, model = choice[-2:]
        alone = module.get_config(model)
        assert config.model.pattern == alone.model.pattern
        if size != "full":
            assert config.train.total_steps == module.get_config(size).train.total_steps
            assert config.train.global_batch_size == module.get_config(size).train.global_batch_size
        for kind, taken in zip(kinds, choice, strict=True):
            for other in set(kind) - {taken}:
                with pytest.raises(ValueError, match=f"'{taken}' and '{other}' exclude each other"):
                    module.get_config(",".join([*choice, other]))


@pytest.mark.parametrize(
    ("name", "layers", "width", "states", "blocks", "steps", "batch", "rates", "decay"),
    [
        # The published programs' own arguments: epochs * records // batch, sqrt(batch / theirs).
        ("lra_listops:s5", 8, 128, 8, 8, 40 * 1500, 64, (3e-3, 1e-3, 50), 0.04),
        ("lra_text:s5", 6, 256, 96, 12, 35 * 351, 64, (4e-3, 1e-3, 50), 0.07),
        ("lra_retrieval:s5", 6, 128, 128, 16, 20 * 4596, 32, (2e-3, 1e-3, 32), 0.05),
        ("lra_image:s5", 6, 512, 192, 3, 250 * 703, 64, (4.5e-3, 1e-3, 50), 0.07),
        ("lra_pathfinder:s5", 6, 192, 128, 8, 200 * 2500, 64, (4.5e-3, 0.9e-3, 64), 0.03),
        ("lra_pathfinder:path_x,s5", 6, 128, 128, 16, 75 * 5000, 32, (1.8e-3, 0.6e-3, 32), 0.06),
    ],
)
def test_s5_has_its_published_recipe(
    name, layers, width, states, blocks, steps, batch, rates, decay
):
    name, form = name.split(":")
    c = load(name).get_config(form)
    assert (c.model.num_layers, c.model.hidden_dim) == (layers, width)
    assert (c.model.s5.state_dim, c.model.s5.blocks) == (states, blocks)
    assert (c.train.total_steps, c.train.global_batch_size) == (steps, batch)
    *rates, theirs = rates
    scaled = [rate * (batch / theirs) ** 0.5 for rate in rates]
    assert [c.optimizer.learning_rate, c.optimizer.dynamics_learning_rate] == pytest.approx(scaled)
    assert c.optimizer.weight_decay == decay
    assert (c.model.patch.stride, c.model.patch.positions) == (1, "none")


@pytest.mark.parametrize("name", ["lm_library:gpt", "lm_library:llm", "lm_shakespeare:cpu"])
def test_a_single_file_has_the_splits_that_a_language_model_needs(name, tmp_path):
    (tmp_path / "file.txt").write_bytes(bytes(10_000))
    name, form = name.split(":")
    config = load(name).get_config(form)
    config.data.dir = str(tmp_path / "data")
    config.data.options.source = str(tmp_path / "file.txt")
    sources = open_sources(config)
    assert sources.training().rows(0, np.arange(2))["valid"].all()
    for split in ("validation", config.train.eval_split):
        (windows,) = sources.evaluation(split).values()
        assert windows.num_records == -(-1000 // config.data.seq_len)


@pytest.mark.parametrize("slice_", ["v4-128", "v4-1024", "v5e-256", "v5p-512", "v6e-256"])
@pytest.mark.parametrize("form", FORMS["lm_pod"])
def test_a_pod_config_serves_every_slice(form, slice_):
    """As it is at 8K; at 32K with split positions where there are more chips than rows."""
    config, chips = load("lm_pod").get_config(form), hardware.parse(slice_).num_devices
    rows = config.train.global_batch_size
    assert rows >= chips or form.endswith("_32k")
    config.mesh.sequence = max(1, chips // rows)
    assert config.mesh.sequence <= 4  # as its docstring says
    sizes = validate_mesh(config, chips)
    assert sizes["data"] * sizes["fsdp"] == min(rows, chips)


@pytest.mark.parametrize(
    ("size", "count"), [("125m", 107e6), ("350m", 370e6), ("1b", 1.46e9), ("7b", 7.6e9)]
)
def test_a_pod_model_has_the_parameters_that_its_docstring_says(size, count):
    config = load("lm_pod").get_config(size)
    task = tasks.make(config.data.task, config.data.options)
    model = models.build(config, num_classes=task.num_classes, vocab_size=task.vocab_size)
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
    total = sum(x.size for x in jax.tree.leaves(params))
    assert total == pytest.approx(count, rel=0.01)
    text = config.train.total_steps * config.train.global_batch_size * config.data.seq_len
    assert text == pytest.approx(20 * 4 * total, rel=0.03)  # 20 tokens of 4 bytes a parameter


@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"quickstart", "python_syntax"}))
def test_an_unknown_form_is_refused(name):
    with pytest.raises(ValueError, match="nonsense"):
        load(name).get_config("nonsense")
