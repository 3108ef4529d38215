"""A task that is defined here and registered by one line needs no edit anywhere else."""

import dataclasses
import re
import sys
from typing import Literal

import numpy as np
import pytest
from absl import flags

from spectral_pod import command_line, fields
from spectral_pod.data import byte_store
from spectral_pod.data.tasks import TASKS, StoredTask, make
from spectral_pod.data.tasks.task import execution
from spectral_pod.errors import ConfigError
from spectral_pod.shapes import PAD
from spectral_pod.train.sources import open_sources


@dataclasses.dataclass(frozen=True)
class Toy(StoredTask):
    """Is a repeated letter in the first half of the alphabet?"""

    name = "toy"
    version = 1
    num_classes = 2

    repeats: fields.Positive = 3
    case: Literal["lower", "upper"] = "lower"
    loud: bool = execution(False)

    def build(self, path):
        letters = b"abcdefghijklmnopqrstuvwxyz"
        records = [
            byte_store.Record(self.repeats * bytes([letter]), int(letter < ord("n")))
            for letter in getattr(letters, self.case)()
        ]
        splits = dict.fromkeys(("train", "validation", "test"), records)
        byte_store.write(path, splits, classes=("late", "early"), provenance={})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", Toy)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses arguments to a configuration, as `app.run` with `command_line.parser` does."""
    file = tmp_path / "toy_config.py"
    file.write_text(
        "from spectral_pod.config import default\n"
        "def get_config():\n"
        "    c = default()\n"
        "    c.data.task = 'toy'\n"
        "    c.data.seq_len = 8\n"
        f"    c.data.dir = {str(tmp_path / 'data')!r}\n"
        "    c.train.global_batch_size = c.train.eval_batch_size = 4\n"
        "    return c\n"
    )

    def parse_once(*arguments):
        values = flags.FlagValues()
        holder = command_line.config_flag(values)
        argv = ["main", f"--config={file}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        assert command_line.parser(holder, values)(argv) == ["main"]
        assert sys.argv is argv
        return holder.value

    return parse_once


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--config.data.options.repeats=5"], {"repeats": 5}),
        (["--config.data.options.repeats", "5", "--config.seed=1"], {"repeats": 5}),
        (["-config.data.options.case=upper"], {"case": "upper"}),
        (["--config.data.options.loud", "--config.data.seq_len=9"], {"loud": True}),
        (["--config.data.options.loud=true"], {"loud": True}),
        (["--config.data.options.loud=1"], {"loud": True}),
        (["--config.data.options.loud=F"], {"loud": False}),
        (["--config.data.task=mqar", "--config.data.options.power_a=1"], {"power_a": 1.0}),
        (["--noconfig.data.options.loud"], {"loud": False}),
        (["--config.data.options.repeats=5", "--config.data.options.repeats=6"], {"repeats": 6}),
        (
            ["--config.data.options.case=upper", "--config.data.options.repeats=2"],
            {"case": "upper", "repeats": 2},
        ),
        (
            ["--config.data.options.settings=((16, 2),)", "--config.data.task=mqar"],
            {"settings": ((16, 2),)},
        ),
        (["--config.data.task=lm", "--config.data.options.source=a b"], {"source": "a b"}),
        (["--config.data.task=dna", "--config.data.options.source=3"], {"source": "3"}),
        (["--config.data.task=records", "--config.data.options.columns=a"], {"columns": ("a",)}),
        (
            ["--config.data.task=records", "--config.data.options.data=('a', 'b')"],
            {"data": ("a", "b")},
        ),
    ],
    ids=str,
)
def test_any_option_is_a_flag(parse, arguments, options):
    config = parse(*arguments)
    assert repr(config.data.options.to_dict()) == repr(options)
    assert make(config.data.task, config.data.options).options.items() >= options.items()
    assert (config.seed, config.data.seq_len) == (
        int("--config.seed=1" in arguments),
        9 if "--config.data.seq_len=9" in arguments else 8,
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("repeat=2", r"options.repeat is unknown to toy; it has \['repeats', .*mean 'repeats'\?"),
        ("repeats=many", "options.repeats is 'many'; it must be an int"),
        ("repeats=0", "options.repeats is 0; it must be at least 1"),
        ("case=Upper", r"options.case is 'Upper'; known are .*; did you mean 'upper'\?"),
        ("repeats=(1,)", r"options.repeats is \(1,\); it must be an int"),
        ("case", "--config.data.options.case has no value; write --config.data.options.case=VALUE"),
    ],
)
def test_a_wrong_option_is_one_message(parse, argument, message):
    with pytest.raises(ConfigError) as caught:
        parse(f"--config.data.options.{argument}")
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_still_named(parse):
    with pytest.raises(ConfigError, match=r"'tyo'; known are .*; did you mean 'toy'"):
        parse("--config.data.task=tyo", "--config.data.options.repeats=2")
    with pytest.raises(ConfigError, match=r"--config.train.totl_steps=5: .*'total_steps'"):
        parse("--config.train.totl_steps=5", "--config.data.options.repeats=2")


def test_its_store_is_written_once_and_read(parse, monkeypatch):
    sources = open_sources(parse("--config.data.options.repeats=2"))
    assert (sources.classes, sources.num_classes) == (["late", "early"], 2)
    assert not sources.objective.by_position
    batch = sources.evaluation("test")["toy"].rows(0, np.arange(4))
    assert batch["tokens"].tolist() == [[c, c, *[PAD] * 6] for c in b"abcd"]
    assert batch["labels"].tolist() == [1] * 4
    assert sources.training().rows(3, np.arange(4))["valid"].all()

    monkeypatch.setattr(Toy, "build", pytest.fail)
    same = ["--config.data.options.repeats=2", "--config.data.options.case=lower"]
    again = open_sources(parse(*same, "--config.data.options.loud"))
    assert again.digest == sources.digest
    assert again.stores["toy"].path == sources.stores["toy"].path


def test_a_float_option_given_as_an_int_is_the_same_data():
    one, other = (make("records", {"train": "a.csv", "held_out": zero}) for zero in (0, 0.0))
    assert one.store_path("/data") == other.store_path("/data")


def test_the_items_of_a_tuple_are_checked():
    with pytest.raises(ConfigError, match=r"settings is .*; it must be a tuple\[tuple\[int, int\]"):
        make("mqar", {"settings": ((16, 2, 3),)})
