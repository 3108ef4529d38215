"""What every task must satisfy, and the checks of its options."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from spectral_pod import fields
from spectral_pod.data import byte_store, tasks
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.errors import ConfigError
from spectral_pod.objectives import Objective
from spectral_pod.shapes import VOCAB_SIZE

STORED, DRAWN = (
    [name for name, task in tasks.TASKS.items() if issubclass(task, kind)]
    for kind in (tasks.StoredTask, tasks.DrawnTask)
)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_says_what_it_is(name):
    task = tasks.make(name, {})
    assert task.name == name
    assert issubclass(task.objective, Objective)
    assert (name in STORED) != (name in DRAWN)
    assert (name in DRAWN) <= task.objective.by_position
    assert task.num_classes > 1
    assert task.vocab_size >= VOCAB_SIZE
    _, _, supervision = name.partition("listops_")
    facts = {"supervision": supervision} if supervision else {}
    assert task.report({}, {}) == (facts, [])


@pytest.mark.parametrize("name", tasks.TASKS)
def test_an_unknown_option_is_named_with_those_there_are(name):
    with pytest.raises(ConfigError, match=rf"options\.sede is unknown to {name}; it has \["):
        tasks.make(name, {"sede": 1})


def test_misspelt_names_have_a_hint():
    with pytest.raises(ConfigError, match=r"options\.sede .*; did you mean 'seed'\?"):
        tasks.make("lm", {"sede": 1})
    with pytest.raises(ConfigError, match=r"config\.data\.task is 'mqra'.*did you mean 'mqar'\?"):
        tasks.make("mqra", {})


@pytest.mark.parametrize("name", tasks.TASKS)
def test_options_are_what_the_command_line_says(name):
    """The default of every option survives conversion to text or JSON and back."""
    options = tasks.make(name, {}).options
    annotations = tasks.TASKS[name].annotations()
    assert options.keys() == annotations.keys()
    for option, value in options.items():
        assert fields.parse(annotations[option], str(value), option) == value
    again = tasks.make(name, json.loads(json.dumps(options)))
    assert again == tasks.make(name, options) == tasks.make(name, {})
    assert hash(again) == hash(tasks.make(name, {}))  # no lists in it


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listops", {"seed": "x"}, "seed is 'x'; it must be an int"),
        ("listops", {"train": 0}, "train is 0; it must be at least 1"),
        ("listops", {"num_workers": 1.5}, "num_workers is 1.5; it must be an int or None"),
        ("listops", {"encoding": "symbols"}, "encoding is 'symbols'; known .*mean 'symbol'"),
        ("pathfinder", {"size": 64}, r"size is 64; known are \[32, 128\]"),
        ("records", {"luma": "yes"}, "luma is 'yes'; it must be True or False"),
        ("records", {"columns": "text"}, "columns is 'text'; it must be a tuple"),
        ("mqar", {"vocab_size": "x"}, "vocab_size is 'x'; it must be an int"),
    ],
)
def test_values_of_another_kind_are_named(name, options, message):
    with pytest.raises(ConfigError, match=rf"config\.data\.options\.{message}"):
        tasks.make(name, options)


# ---- what identifies data


def old_path(directory, task, options):
    """The path at which version 0.1.0 wrote a task's store, from its options as given."""
    meaning = byte_store.FORMAT + json.dumps([task.version, options], sort_keys=True)
    return f"{directory}/{task.name}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"


def test_store_paths_differ_with_what_options_mean(monkeypatch):
    task = LanguageModelling(source="a")
    path = task.store_path("gs://bucket/")
    assert path.startswith("gs://bucket/lm-")
    assert path == LanguageModelling(source="a").store_path("gs://bucket")
    assert path != LanguageModelling(source="b").store_path("gs://bucket")
    monkeypatch.setattr(LanguageModelling, "version", 99)
    assert path != task.store_path("gs://bucket")


@pytest.mark.parametrize("name", STORED)
def test_what_is_the_same_data_is_one_store(name):
    plain = tasks.make(name, {})
    spelt = [{"seed": 0}, dict(plain.options)]
    if "num_workers" in plain.options:
        spelt += [{"num_workers": 3}, {"num_workers": 1, "seed": 0}]
    for options in spelt:
        task = tasks.make(name, options)
        assert task.identity() == plain.identity()
        assert task.store_path("data") == plain.store_path("data")
    assert tasks.make(name, {"seed": 1}).store_path("data") != plain.store_path("data")
    assert "num_workers" not in plain.identity()


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {}),
        ({}, {"seed": 0}),
        ({"train": 9}, {"num_workers": 2, "train": 9, "validation": 2000}),
        ({"num_workers": 2}, {"num_workers": 2}),
        ({"seed": 0, "train": 9}, {"seed": 0, "train": 9}),
    ],
)
def test_stores_of_older_versions_are_found(tmp_path, then, now):
    directory, task = str(tmp_path), tasks.make("listops", now)
    assert task.find_store(directory, now) == task.store_path(directory)
    old = old_path(directory, task, then)
    splits = {"train": [byte_store.Record(b"0", 0)]}
    byte_store.write(old, splits, classes=["0"], provenance={})
    assert task.find_store(directory, now) == old
    assert tasks.make("listops", {"seed": 1}).find_store(directory, {"seed": 1}) != old
    byte_store.write(task.store_path(directory), splits, classes=["0"], provenance={})
    assert task.find_store(directory, now) == task.store_path(directory)  # the new one is preferred


def test_the_digest_of_a_drawn_task_is_what_workdirs_have_recorded():
    """Version 0.1.0 digested the options as they were given."""
    recorded = {
        ("copy", "{}"): "43ae443fa6e43a1311736a39eb01003ee4d9c445cac2df81f6f0b46cc5ba3bc4",
        (
            "mqar",
            '{"settings": [[64, 4]], "vocab_size": 256}',
        ): "0857aa42a76d9cee88e12e3ce18c1d2524cccec4ac062d6a029188f86d8e7a33",
    }
    for (name, given), digest in recorded.items():
        given = json.loads(given)
        assert tasks.make(name, given).digest(given) == digest


# ---- drawn tasks


@pytest.mark.parametrize("name", DRAWN)
def test_examples_keep_to_what_the_task_says(name):
    task, rng = tasks.make(name, {}), np.random.default_rng(0)
    examples = [task.draw(rng) for _ in range(500)]
    for tokens, labels in examples:
        assert tokens.dtype == labels.dtype == np.int32
        assert tokens.shape == labels.shape == (len(tokens),)
        assert (labels >= 0).any()
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
        assert labels.min() >= -1
        assert labels.max() < task.num_classes
    longest = max(len(tokens) for tokens, _ in examples)
    # The longest conversation is rare; the tests of these tasks look for it.
    is_rare = name in ("agent", "rag")
    assert longest == task.max_length or (is_rare and longest < task.max_length)


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_task_is_identified_by_its_examples(name, monkeypatch):
    def digest(options):
        return tasks.make(name, options).digest(options)

    task = tasks.make(name, {})
    option = next(
        o
        for o in task.options
        if o.startswith(("num_pairs", "num_passages", "length", "vocab", "digits"))
    )
    digests = {digest({}), digest({}), digest({option: task.options[option] + 1})}
    assert len(digests) == 2
    draw = type(task).draw

    def another(self, rng):
        tokens, labels = draw(self, rng)
        return np.append(tokens[:-1], tokens[-1] ^ 1).astype(np.int32), labels

    monkeypatch.setattr(type(task), "draw", another)
    assert digest({}) not in digests


def test_a_task_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks.make("copy", {}).length = 3


@pytest.mark.parametrize(
    ("task", "options", "field"),
    [
        ("copy", {"length": 0}, "min_length, length"),
        ("copy", {"length": 4, "min_length": 5}, "min_length"),
        ("copy", {"alphabet": 257}, "alphabet"),
        ("recall", {"num_pairs": 27}, "num_pairs"),
        ("recall", {"num_pairs": 3}, "num_questions"),
        ("overwrite", {"num_overwrites": 0}, "num_overwrites"),
        ("overwrite", {"num_overwrites": 93}, "num_overwrites"),
        ("overwrite", {"num_questions": 0}, "num_questions"),
        ("mqar", {"settings": ()}, "settings"),
        ("mqar", {"settings": ((64, 17),)}, "settings"),
        ("mqar", {"settings": ((65, 4),)}, "settings"),
        ("mqar", {"vocab_size": 128}, "vocab_size"),
        ("mqar", {"power_a": 0.0}, "power_a"),
    ],
)
def test_impossible_options_are_named(task, options, field):
    with pytest.raises(ConfigError, match=rf"config\.data\.options\.{field}"):
        tasks.make(task, options)
