"""What all tasks owe, and what their options are checked for."""

import inspect

import numpy as np
import pytest

from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError
from spectral_pod.shapes import VOCAB_SIZE

DRAWN = [name for name in tasks.TASKS if tasks.is_drawn(name)]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_says_what_it_is(task):
    module = tasks.TASKS[task]
    assert module.OBJECTIVE in ("class", "next", "positions")
    assert tasks.is_drawn(task) == (module.OBJECTIVE == "positions")
    assert hasattr(module, "build") != hasattr(module, "draw")
    assert module.num_classes() > 1
    assert module.vocab_size() >= VOCAB_SIZE


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_unknown_option_is_named_with_those_there_are(task):
    tasks.check_options(task, {})
    tasks.store_path("data", task, {})
    for check in (tasks.check_options, lambda *a: tasks.store_path("data", *a)):
        with pytest.raises(ConfigError, match=rf"options\.sede is unknown to {task}; it has \["):
            check(task, {"sede": 1})


def test_store_paths_differ_with_what_options_mean(monkeypatch):
    path = tasks.store_path("gs://bucket/", "lm", {"source": "a"})
    assert path.startswith("gs://bucket/lm-")
    assert path == tasks.store_path("gs://bucket", "lm", {"source": "a"})
    assert path != tasks.store_path("gs://bucket", "lm", {"source": "b"})
    monkeypatch.setattr(tasks.lm, "VERSION", 99)
    assert path != tasks.store_path("gs://bucket", "lm", {"source": "a"})


@pytest.mark.parametrize("task", DRAWN)
def test_all_functions_of_a_drawn_task_take_its_options(task):
    module = tasks.TASKS[task]
    drawn, bounded = (
        {name: p.default for name, p in inspect.signature(f).parameters.items() if name != "rng"}
        for f in (module.draw, module.max_length)
    )
    assert drawn == bounded
    module.num_classes(**drawn), module.vocab_size(**drawn)


@pytest.mark.parametrize("task", DRAWN)
def test_examples_keep_to_what_the_task_says(task):
    module, rng = tasks.TASKS[task], np.random.default_rng(0)
    examples = [module.draw(rng) for _ in range(500)]
    for tokens, labels in examples:
        assert tokens.dtype == labels.dtype == np.int32
        assert tokens.shape == labels.shape == (len(tokens),)
        assert (labels >= 0).any()
        assert tokens.min() >= 0
        assert tokens.max() < module.vocab_size()
        assert labels.min() >= -1
        assert labels.max() < module.num_classes()
    assert max(len(tokens) for tokens, _ in examples) == module.max_length()


@pytest.mark.parametrize("task", DRAWN)
def test_a_drawn_task_is_identified_by_its_examples(task, monkeypatch):
    module = tasks.TASKS[task]
    (name, value), *_ = (
        (name, p.default)
        for name, p in inspect.signature(module.draw).parameters.items()
        if name.startswith(("num_pairs", "length", "vocab"))
    )
    digests = {
        tasks.drawn_digest(task, {}),
        tasks.drawn_digest(task, {}),
        tasks.drawn_digest(task, {name: value + 1}),
    }
    assert len(digests) == 2
    draw = module.draw

    def another(rng, **options):
        tokens, labels = draw(rng, **options)
        return np.append(tokens[:-1], tokens[-1] ^ 1).astype(np.int32), labels

    monkeypatch.setattr(module, "draw", another)
    assert tasks.drawn_digest(task, {}) not in digests


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
        tasks.check_options(task, options)
