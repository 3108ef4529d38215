"""Checks of the configuration: errors name invalid values, and valid ones pass."""

import functools
import itertools
import json
import math
import typing
from typing import Literal

import pytest

from spectral_pod import models
from spectral_pod.config import annotations, default, flat, to_dict
from spectral_pod.errors import ConfigError
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.models import MODELS
from spectral_pod.train.optim import OPTIMIZERS, make_optimizer
from spectral_pod.train.starts import claim_workdir
from spectral_pod.train.state import abstract_state
from spectral_pod.validation import validate, validate_mesh
from tests import trainer


def config(**fields):
    c = default()
    c.data.task = "listops"
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return c


def test_the_defaults_pass():
    validate(config())
    assert validate_mesh(config(), 4) == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__task": "listop"}, "config.data.task is 'listop'.*did you mean 'listops'"),
        ({"model__dtype": "float16"}, "config.model.dtype is 'float16'"),
        ({"train__total_steps": 0}, "config.train.total_steps is 0; it must be at least 1"),
        ({"model__memory_interval": -1}, "config.model.memory_interval"),
        ({"model__dropout": 1.0}, "config.model.dropout is 1.0"),
        (
            {"data__task": "lm", "model__name": "spectral_gpt", "train__sample_prompt": ""},
            "config.train.sample_prompt is empty",
        ),
        (
            {"data__task": "lm", "model__name": "spectral_llm", "model__wavelet__name": "db99"},
            "config.model.wavelet.name is 'db99'",
        ),
        (
            {
                "data__task": "lm",
                "model__name": "spectral_llm",
                "model__wavelet__padding": "circular",
            },
            "config.model.wavelet.padding is 'circular'.*sample_bytes=0",
        ),
        (
            {"data__task": "lm", "model__name": "spectral_gpt", "data__documents": 2},
            "config.data.documents is 2; a record of spectral_gpt is one document",
        ),
        ({"data__stores": (("a", 1.0, 2),)}, "config.data.stores has .'a', 1.0, 2.; an entry is"),
        ({"data__stores": (("a", 0),)}, "config.data.stores has .*weight above 0"),
        ({"data__stores": (7,)}, "config.data.stores has 7"),
        ({"data__documents": 3}, "config.data.documents is 3; .* or two"),
        ({"data__seq_len": 2047}, "config.data.seq_len is 2047; it must be a multiple of 4"),
        ({"model__memory__beta_min": 1.0}, "beta_min"),
        ({"model__pattern": ("spectral", "hyna")}, "model.pattern is 'hyna'.*did you mean 'hyena'"),
        ({"model__pattern": ("spectral",), "model__name": "spectral_gpt", "data__task": "lm"},
         "'spectral', which sees the whole sequence"),
        ({"model__pattern": ("hyna",), "model__name": "spectral_gpt", "data__task": "lm"},
         "model.pattern is 'hyna'.*did you mean 'hyena'"),
        ({"optimizer__name": "adam"}, "config.optimizer.name is 'adam'.*did you mean 'adamw'"),
        ({"model__pattern": ("spectral", 3)}, "pattern is .*; it must be a tuple.str, ..."),
        ({"model__coarser_scales": (4, 1)}, "coarser_scales is \\(4, 1\\); a ratio"),
        ({"model__comparison": "normalized"}, "'normalized', and a record is one document"),
        ({"model__patch__ngrams": (3, 33)}, "ngrams is \\(3, 33\\); .*from 1 to 32"),
        ({"model__patch__ngrams": (3,), "model__name": "spectral_gpt"}, "spectral_gpt has no pat"),
        ({"data__task": "lm"}, "'spectral_model', which predicts one class a record; task 'lm'"),
        ({"model__name": "spectral_gpt"}, "every next token; task 'listops' needs one of"),
        ({"data__task": "listops_subtrees", "model__patch__stride": 1},
         "pooling is 'attention'; in task 'listops_subtrees' every byte has a label, which needs"),
        ({"model__pooling": "none"}, "pooling is 'none'; in task 'listops' every record has a"),
        ({"data__task": "listops_subtrees", "model__pooling": "none"}, "stride is 4; .*needs 1"),
        ({"model__normalization": "batch", "model__name": "spectral_gpt", "data__task": "lm"},
         "normalization is 'batch', by which positions see later ones"),
        ({"model__chunk": 1000}, "chunk is 1000; it must be a multiple of 4.*seq_len = 2048"),
        ({"model__chunk": 512, "data__documents": 2, "data__task": "retrieval"}, "are read whole"),
        ({"model__chunk": 512, "model__pooling": "last"}, "'last', which counts from the start"),
        ({"model__chunk": 512, "model__name": "spectral_gpt", "data__task": "lm"},
         "positions is 'learned', which counts from the start"),
        ({"model__patch__kernel": 3}, "kernel is 3, less than the bytes of a patch"),
        ({"model__patch__stride": 3}, "seq_len is 2048; it must be a multiple of 3, the bytes"),
        ({"model__spectral__tau_max": 0.5}, "tau_max is 0.5, less than tau_min = 1.0"),
        ({"optimizer__clip_norm": -1.0}, "config.optimizer.clip_norm is -1.0; it must be 0 or"),
        ({"optimizer__b2": 1.5}, r"config.optimizer.b2 is 1.5; it must be in \[0, 1\)"),
        ({"optimizer__learning_rate": math.nan}, "learning_rate is nan; it must be a finite"),
        ({"train__total_steps": 10**30}, "config.train.total_steps is 10+; it must be below"),
        ({"train__profile_steps": (5, 3)}, "config.train.profile_steps is .5, 3."),
        ({"model__mlp_expansion": 1e-9}, "config.model.mlp_expansion is 1e-09"),
        ({"data__task": "lm", "model__name": "spectral_gpt", "model__consistency_weight": 0.1},
         "config.model.consistency_weight is 0.1, and spectral_gpt has no"),
        ({"model__memory__gated": True, "model__pattern": ("hyena+delta",)},
         "config.model.memory.gated .* name 'gated_delta' in config.model.pattern"),
        ({"model__pattern": ("attention",), "model__hidden_dim": 30},
         "hidden_dim is 30, not divisible by config.model.attention.num_heads = 4"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(config(**fields))


NONSENSE = [
    -1, 0, 3, 10**30, -1.0, 0.0, 1.5, 1e-320, 1e300, math.nan, math.inf, -math.inf, True, None, "",
    "x", "\ud800", b"x", (), (0,), (-1, 2), ("",), ("x", 1), {},
]  # fmt: skip


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
@pytest.mark.parametrize(("task", "name"), [("listops", "spectral_model"), ("lm", "spectral_gpt")])
def test_nonsense_is_refused_by_the_name_of_its_field(task, name, part):
    """Every value in every field: it is valid, or one message names the field."""

    def message(field, value):
        c = config(data__task=task, model__name=name)
        *sections, last = field.split(".")
        section = functools.reduce(getattr, sections, c)
        with section.ignore_type():
            section[last] = value
        try:
            validate(c)
            validate_mesh(c, 8)
        except ConfigError as error:
            return str(error)
        return ""

    pairs = [*itertools.product(annotations(), NONSENSE)][part::8]
    messages = [message(*pair) for pair in pairs]
    assert sum(map(bool, messages)) > len(pairs) / 2
    for (field, value), text in zip(pairs, messages):
        if text:
            assert field.rpartition(".")[2] in text
            assert "\n" not in text
        else:
            assert not isinstance(value, float) or 0 <= value < math.inf, field


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"mesh__data": 3}, 4, "config.mesh asks for data=3 .* = 3 devices, and there are 4"),
        ({"mesh__fsdp": 3}, 4, "devices, and there are 4"),
        ({"mesh__tensor": 0}, 4, "config.mesh.tensor is 0"),
        ({"mesh__sequence": 3, "mesh__data": 1}, 3, "not divisible by mesh.sequence = 3"),
        ({"train__global_batch_size": 6}, 4, "global_batch_size is 6, not divisible by .* = 4"),
        (
            {"train__global_batch_size": 50, "train__eval_batch_size": 3},
            16,
            "--config.train.global_batch_size=48 --config.train.eval_batch_size=16",
        ),
        ({"train__grad_accumulation": 16}, 4, "global_batch_size is 32, not divisible by .* = 64"),
        ({"train__eval_batch_size": 6}, 4, "eval_batch_size is 6"),
        (
            {"mesh__tensor": 4},
            4,
            "config.model.memory.num_heads is 1, not divisible by mesh.tensor",
        ),
        ({"mesh__tensor": 4, "model__memory_interval": 0, "model__hidden_dim": 6}, 4, "hidden_dim"),
    ],
)
def test_meshes_that_do_not_fit_are_named(fields, devices, message):
    with pytest.raises(ConfigError, match=message):
        validate_mesh(config(**fields), devices)


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    claim_workdir(str(tmp_path), config(), "digest")
    claim_workdir(str(tmp_path), config(), "digest")
    free = {"mesh__data": 2, "checkpoint__every_steps": 7, "train__eval_every_steps": 3}
    claim_workdir(str(tmp_path), config(**free), "digest")
    with pytest.raises(ConfigError, match="hidden_dim: 256 there, 128 now"):
        claim_workdir(str(tmp_path), config(model__hidden_dim=128), "digest")
    with pytest.raises(ConfigError, match="another version of the data"):
        claim_workdir(str(tmp_path), config(), "other")
    assert (
        json.loads((tmp_path / "config.json").read_text())["config"]["model"]["hidden_dim"] == 256
    )


def test_options_of_mixers_that_a_model_does_not_have_are_free(tmp_path):
    claim_workdir(str(tmp_path), config(model__memory_interval=0), "digest")
    unread = {"model__hyena__order": 3, "model__s5__blocks": 2, "model__memory__clip": 1.0}
    claim_workdir(str(tmp_path), config(model__memory_interval=0, **unread), "digest")
    with pytest.raises(ConfigError, match=r"model\.spectral\.padding: 'linear' there"):
        claim_workdir(
            str(tmp_path),
            config(model__memory_interval=0, model__spectral__padding="circular"),
            "digest",
        )


def test_a_workdir_of_before_a_field_was_added_continues(tmp_path):
    claim_workdir(str(tmp_path), config(), "digest")
    trainer.edit(tmp_path / "config.json", lambda run: run["config"]["train"].pop("on_bad_step"))
    claim_workdir(str(tmp_path), config(), "digest")
    with pytest.raises(ConfigError, match="on_bad_step: 'stop' there, 'skip' now"):
        claim_workdir(str(tmp_path), config(train__on_bad_step="skip"), "digest")


def test_every_field_says_what_it_may_be():
    """And there is no annotation of a field that does not exist."""
    assert annotations().keys() == flat(to_dict(default())).keys()


ORDINARY = {int: [0, 1, 2, 3, 5, 8, 1000], float: [0.0, 1e-320, 0.5, 1.0, 1.5, 7.0, 1e30, 1e300]}
NAMES = {
    "model.channel_mixer": CHANNEL_MIXERS,
    "optimizer.name": OPTIMIZERS,
    "model.pattern": [(mixer,) for mixer in MIXERS],
}


def ordinary_values(field, annotation):
    """Values that a field may accept."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if annotation is bool:
        return True, False
    return [*NAMES.get(field, ORDINARY.get(annotation, ())), *NONSENSE]


def settings(name):
    """(field, value, pattern): each value of each field that decides how a model is built, with a
    pattern of the mixers that read the field."""
    usable = {n: m for n, m in MIXERS.items() if m.can_be_causal or not MODELS[name].causal}
    for field, annotation in annotations().items():
        if field.startswith(("model.", "optimizer.")) or field == "data.seq_len":
            section = field.split(".")[1]
            pattern = tuple(n for n, mixer in usable.items() if mixer.section == section)
            for value in ordinary_values(field, annotation):
                yield field, value, pattern


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 200))]
)
@pytest.mark.parametrize(("task", "name"), [("listops", "spectral_model"), ("lm", "spectral_gpt")])
def test_what_is_accepted_can_be_built(task, name, part):
    """A model and its optimizer, in shapes only."""
    mesh = one_device()
    small = {
        "data.task": task, "data.seq_len": 64, "model.name": name, "model.hidden_dim": 16,
        "model.embed_dim": 8, "model.memory.head_dim": 8,
        "train.global_batch_size": 8, "train.sample_bytes": 0,
    }  # fmt: skip
    for field, value, pattern in [*settings(name)][part::200]:
        c = default()
        layers = {"model.pattern": pattern, "model.num_layers": max(1, len(pattern))}
        c.update_from_flattened_dict(small | layers)
        *sections, last = field.split(".")
        section = functools.reduce(getattr, sections, c)
        with section.ignore_type():
            section[last] = value
        try:
            validate(c)
            validate_mesh(c, 1)
        except ConfigError:
            continue
        model = models.build(c, num_classes=10)
        try:
            abstract_state(model, make_optimizer(c, model, mesh).tx, mesh)
        except Exception as error:
            raise AssertionError(f"config.{field} = {value!r} is accepted") from error
