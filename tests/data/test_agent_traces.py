"""Traces to train on: the loss is of what the model writes, but for calls that led to an error."""

import numpy as np
import pytest

from spectral_pod.agent import protocol, traces
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.agent.traces import Trace
from spectral_pod.config import default
from spectral_pod.data import tasks
from spectral_pod.data.tasks.agent import AgentTask
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.shapes import PAD
from spectral_pod.train.sources import open_sources


def write(file, conversations):
    file.write_text("".join(traces.to_line(Trace(tuple(turns))) for turns in conversations))
    return str(file)


def generated(count, **options):
    task = AgentTask(**options)
    return [task.conversation("train", np.random.default_rng(i))[0] for i in range(count)]


def right(count):
    """Conversations without errors, which are scored whole."""
    return generated(count, failing=0.0, mistaken=0.0)


def sources(tmp_path, seq_len=320, **options):
    config = default()
    config.data.task, config.data.dir = "agent_traces", str(tmp_path / "data")
    config.data.seq_len = seq_len
    config.data.options = type(config.data.options)(options)
    config.train.eval_batch_size = 8
    return open_sources(config)


def rows(source, count):
    """(tokens, labels) of `count` rows in order, without padding; label -1 where not scored."""
    found = []
    for step in range(-(-count // source.batch_size)):
        batch = source.rows(step, np.arange(source.batch_size))
        labels = np.where(batch["valid"], batch["labels"], -1)
        for tokens, row in zip(batch["tokens"], labels):
            length = int((tokens != PAD).sum())
            assert (row[length:] == -1).all()
            found.append((tokens[:length], row[:length]))
    return found


def test_examples_are_those_of_the_protocol(tmp_path):
    conversations = right(30)
    file = write(tmp_path / "a.jsonl", conversations)
    source = sources(tmp_path, train=file, validation=file).evaluation("validation")["agent_traces"]
    assert source.num_records == 30
    found = rows(source, 30)
    for (tokens, labels), turns in zip(found, conversations):
        for one, expected in zip((tokens, labels), protocol.example(turns)):
            np.testing.assert_array_equal(one, expected)
    assert all(len(tokens) == 0 for tokens, _ in found[30:])


def test_calls_that_led_to_an_error_are_not_scored(tmp_path):
    """So that a mistake is scored as the task that makes it scores it."""
    task = AgentTask(mistaken=1.0, failing=0.0, plain=0.0)
    conversations = generated(20, mistaken=1.0, failing=0.0, plain=0.0)
    file = write(tmp_path / "a.jsonl", conversations)
    source = sources(tmp_path, train=file, validation=file).evaluation("validation")["agent_traces"]
    for i, (tokens, labels) in enumerate(rows(source, 20)[:20]):
        for one, expected in zip((tokens, labels), task.draw(np.random.default_rng(i))):
            np.testing.assert_array_equal(one, expected)


def test_any_bytes_and_thoughts(tmp_path):
    turns = [
        Turn(Role.USER, bytes(range(256))),
        Turn(Role.THOUGHT, b"\xff"),
        Turn(Role.ANSWER, b""),
    ]
    file = write(tmp_path / "a.jsonl", [turns])
    source = sources(tmp_path, train=file, validation=file).evaluation("train")["agent_traces"]
    ((tokens, labels),) = rows(source, 1)[:1]
    np.testing.assert_array_equal(tokens, protocol.example(turns)[0])
    np.testing.assert_array_equal(labels, protocol.example(turns)[1])


def test_questions_are_held_out_whole(tmp_path):
    conversations = [*generated(200, digits=2), *generated(200, digits=2)]
    file = write(tmp_path / "a.jsonl", conversations)
    opened = sources(tmp_path, train=file)
    questions = {}
    for split in ("train", "validation"):
        source = opened.evaluation(split)["agent_traces"]
        decoded = (protocol.decode([*x, protocol.END]) for x, _ in rows(source, source.num_records)
                   if len(x))  # fmt: skip
        questions[split] = [turns[0].data for turns in decoded]
    assert not set(questions["train"]) & set(questions["validation"])
    assert sum(map(len, questions.values())) == 400
    assert 4 <= len(questions["validation"]) <= 60
    with pytest.raises(DataError, match="has no test split; name its files with"):
        opened.evaluation("test")


def test_conversations_that_are_too_long(tmp_path):
    file = write(tmp_path / "a.jsonl", right(30))
    with pytest.raises(
        DataError, match=r"longest conversation .* has \d+ tokens, more than config"
    ):
        sources(tmp_path, seq_len=64, train=file, validation=file).training()
    cut = sources(tmp_path, seq_len=64, train=file, validation=file)
    cut.config.data.truncate = True
    source = cut.evaluation("validation")["agent_traces"]
    for (tokens, labels), turns in zip(rows(source, 30), right(30)):
        for one, expected in zip((tokens, labels), protocol.example(turns)):
            np.testing.assert_array_equal(one[:64], expected[:64][: len(one)])
        assert len(tokens) == min(64, len(protocol.example(turns)[0]))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"options\.train is empty; name a file of traces"):
        sources(tmp_path)
    cut = write(tmp_path / "cut.jsonl", [generated(1, plain=0.0)[0][:-1]])
    with pytest.raises(DataError, match="conversation 1 does not end with an answer"):
        sources(tmp_path, train=cut)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1 is no trace"):
        sources(tmp_path, train=str(tmp_path / "bad.jsonl"))
    one = write(tmp_path / "one.jsonl", generated(1))
    with pytest.raises(DataError, match="no conversations for the validation split"):
        sources(tmp_path, train=one)


def test_files_that_have_changed(tmp_path):
    file = write(tmp_path / "a.jsonl", generated(30))
    sources(tmp_path, train=file, validation=file)
    sources(tmp_path, train=file, validation=file)
    write(tmp_path / "a.jsonl", generated(31))
    with pytest.raises(DataError, match=r"options\.train = .* has changed since"):
        sources(tmp_path, train=file, validation=file)


def test_sizes():
    task = tasks.make("agent_traces", {})
    assert (task.num_classes, task.vocab_size) == (protocol.NUM_CLASSES, protocol.VOCAB_SIZE)
