"""A model that writes turns: logits are those of the whole transcript, and nothing is reread."""

import functools

import jax
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.agent import protocol
from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.tools import Tools
from spectral_pod.agent.writer import ModelWriter, grammar
from spectral_pod.errors import ConfigError
from spectral_pod.generate import decode, turns
from spectral_pod.generate.restore import Trained, one_device
from spectral_pod.generate.sampling import Sampling, draw
from spectral_pod.layers.block import unstack
from spectral_pod.seeds import random_key
from spectral_pod.shapes import CALL, END, PAD
from tests.models.drawn import drawn_params
from tests.tiny_run import tiny_config

LENGTH = 512
HALT = int(grammar().halt)
CALLS = protocol.SYMBOL_OF_CLASS.tolist().index(CALL)
RESULT = b"a result that is longer than a block of positions, and has \xff in it"
TASKS = [b"a", b"a longer question, of more than a block of positions", b"xyz"]


@functools.cache
def make(name="spectral_gpt"):
    """(a tiny untrained model for inference, the same for training, its stacked parameters)."""
    config = tiny_config(**{"model.name": name, "model.dtype": "float32"})
    build = functools.partial(
        models.build,
        config,
        seq_len=LENGTH,
        num_classes=protocol.NUM_CLASSES,
        vocab_size=protocol.VOCAB_SIZE,
    )
    params = drawn_params(build())
    params["head"]["bias"] = params["head"]["bias"].copy()
    params["head"]["bias"][HALT] += 3.0  # so that its turns are short
    params["head"]["bias"][CALLS] += 2.0  # and many are calls
    trained = Trained(
        config, one_device(), build(decoding=True), unstack(params), 1, protocol.NUM_CLASSES,
        protocol.VOCAB_SIZE, "", [],
    )  # fmt: skip
    return trained, build(), params


@functools.partial(jax.jit, static_argnums=0)
def logits_of_whole(model, params, tokens_BL):
    return model.apply({"params": params}, tokens_BL, tokens_BL != PAD)


def whole(name, symbols):
    """float32 logits [n, C] of a transcript, in one pass."""
    _, model, params = make(name)
    tokens = np.full((1, LENGTH), PAD)
    tokens[0, : len(symbols)] = symbols
    return np.asarray(logits_of_whole(model, params, tokens))[0, : len(symbols)]


class Recorded:
    """A writer whose logits are recorded wherever it halts, with what each row has read."""

    def __init__(self, writer):
        self.writer, self.context, self.seen = writer, writer.context, []

    def begin(self, symbols, num_symbols):
        self.stream = self.writer.begin(symbols, num_symbols)
        self.read = [list(row) for row in symbols]
        self.pending = [[] for _ in symbols]  # written, but not yet read
        return self

    def go_on(self, given, live):
        before = self.stream._decoder.position + self.stream._decoder._phase
        heard = self.stream.go_on(given, live)
        count = self.stream._decoder.position + self.stream._decoder._phase - before
        for row, (read, written) in enumerate(heard):
            own = [] if given[row] else self.pending[row]
            arrived = [*given[row][:read], *own, *written][:count]
            assert len(arrived) == count
            self.read[row] += arrived
            self.pending[row] = written[-1:]
            logits = np.asarray(self.stream._decoder.logits_BC[row])
            self.seen.append((row, live[row], list(self.read[row]), logits))
        return heard


def converse(name, tasks=TASKS, limit=300, seed=0, wrap=lambda writer: writer):
    writer = wrap(ModelWriter(make(name)[0], sampling=Sampling(1.0), seed=seed))
    tools = Tools()
    # An untrained model calls no tool by name: its calls have results whatever they are.
    tools._result = lambda call: RESULT if len(call) % 2 else b"error: x"
    return writer, Agent(writer, tools, limits=Limits(bytes=limit)).run(tasks)


@pytest.mark.parametrize("name", ["spectral_gpt", "spectral_llm"])
def test_logits_are_those_of_the_whole_transcript(name):
    writer, found = converse(name, wrap=Recorded)
    assert sum(turn.role == Role.RESULT for trace in found for turn in trace.turns) >= 2
    checked = 0
    for row, is_live, symbols, logits in writer.seen:
        if is_live:
            expected = whole(name, symbols)
            bound = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(logits, expected[-1], atol=bound)
            transcript = protocol.encode(found[row].turns).tolist()
            assert symbols[: len(transcript)] == transcript[: len(symbols)]
            checked += 1
    assert checked > 10
    assert any(not is_live for _, is_live, _, _ in writer.seen)


def test_what_it_writes_is_drawn_from_the_logits_of_the_whole():
    _, found = converse("spectral_gpt")
    allowed = grammar().allowed_VC
    for row, trace in enumerate(found):
        symbols = protocol.encode(trace.turns)
        key = jax.random.fold_in(random_key(0), row)
        logits = np.where(allowed[symbols], whole("spectral_gpt", symbols), -np.inf)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(1, len(symbols) + 1))
        drawn = protocol.SYMBOL_OF_CLASS[draw(logits, keys, Sampling(1.0))]
        is_mine = protocol.written(trace.turns)
        assert is_mine.sum() > 8
        np.testing.assert_array_equal(drawn[:-1][is_mine[1:]], symbols[1:][is_mine[1:]])


def test_an_untrained_model_writes_turns_until_it_ends_in_a_stated_way():
    _, found = converse("spectral_gpt", tasks=[f"{i}" for i in range(8)])
    assert {trace.end for trace in found} == {"answered", "bytes"}


def test_a_conversation_depends_on_its_own_symbols_and_place():
    _, together = converse("spectral_gpt")
    assert together == converse("spectral_gpt")[1]
    assert together[:1] == converse("spectral_gpt", tasks=TASKS[:1])[1]
    assert together != converse("spectral_gpt", seed=1)[1]


def test_the_prompt_is_read_once_and_every_symbol_once(monkeypatch):
    prefills, positions = [], []
    prefill, by_turns = decode._prefill, turns._read_by_turns

    def count_prefill(model, params, tokens_BP):
        prefills.append(tokens_BP.shape)
        return prefill(model, params, tokens_BP)

    def count_positions(*arguments):
        result = by_turns(*arguments)
        positions.append(int(result[-1]))
        return result

    monkeypatch.setattr(decode, "_prefill", count_prefill)
    monkeypatch.setattr(turns, "_read_by_turns", count_positions)
    _, found = converse("spectral_gpt")
    assert prefills == [(3, 64)]  # the longest question, padded
    assert sum(turn.role == Role.RESULT for trace in found for turn in trace.turns) > 0
    # But for the questions. The rows advance together; a result that is too long for the transcript
    # is not read, and the last block may go beyond the end.
    lengths = [len(protocol.encode(trace.turns)) for trace in found]
    questions = [len(protocol.encode(trace.turns[:1])) for trace in found]
    longest = max(length - question for length, question in zip(lengths, questions))
    assert longest - len(RESULT) - 2 <= sum(positions) <= longest + 32


def test_a_chat_goes_on_from_its_state():
    writer = Recorded(ModelWriter(make()[0], sampling=Sampling(1.0), seed=3))
    tools = Tools()
    chat = Agent(writer, tools, limits=Limits(bytes=LENGTH)).chat()
    for question in ("one", "two", "three"):
        trace = chat.ask(question)
        if trace.end != "answered":
            break
    assert sum(turn.role == Role.USER for turn in trace.turns) >= 2
    _, _, symbols, logits = writer.seen[-1]
    expected = whole("spectral_gpt", symbols)
    np.testing.assert_allclose(logits, expected[-1], atol=1e-4 * np.abs(expected).max())


def test_the_grammar():
    arrays = grammar()
    symbols = arrays.symbol_C
    assert symbols[HALT] == END
    after_end = set(symbols[arrays.allowed_VC[END]].tolist())
    begins = {protocol.SYMBOL[role] for role in protocol.WRITTEN}
    assert after_end == begins
    for symbol in [0, 255, *protocol.SYMBOL.values()]:
        assert set(symbols[arrays.allowed_VC[symbol]].tolist()) == {*range(256), END}


def test_the_context_of_the_model_limits_the_transcript():
    _, found = converse("spectral_gpt", limit=10**6)
    for trace in found:
        assert trace.end == "answered" or len(protocol.encode(trace.turns)) >= LENGTH


def test_a_model_of_texts_is_refused():
    trained = make()[0]._replace(num_classes=257, vocab_size=260)
    with pytest.raises(ConfigError, match="trained on 'lm' does not write conversations"):
        ModelWriter(trained)
