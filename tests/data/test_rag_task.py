"""Questions about passages: what is stated where, what is held out, and planted documents."""

import pathlib
import re

import numpy as np
import pytest

from spectral_pod.agent import passages, protocol, retrieval
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.retrieval import Index, Search
from spectral_pod.data.tasks import rag
from spectral_pod.data.tasks.rag import RELATIONS, Rag, is_held_out
from spectral_pod.errors import ConfigError, DataError
from tests.agent.test_passages import read

SPLITS = ("train", "validation", "test")
FORMS = ("retrieved", "oracle", "none")


def write_documents(folder):
    """Documents that are small and many."""
    rng = np.random.default_rng(0)
    for i in range(60):
        lines = [" ".join(rng.choice(["le", "la", "de", "in"], size=7)) for _ in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


def conversations(task, split, count=300):
    return [task.conversation(split, np.random.default_rng(i)) for i in range(count)]


def facts_in(text):
    """(relation, name, value) of each fact that a text states."""
    found = set()
    for number, relation in enumerate(RELATIONS):
        for form in relation.statements:
            pattern = re.escape(form).replace(r"\{", "{").replace(r"\}", "}")
            pattern = pattern.format(name="(?P<name>[A-Z]\\w+ [A-Z]\\w+)", value="(?P<value>.+?)")
            for one in re.finditer(f"^ ?{pattern}$", text, re.MULTILINE):
                found.add((number, one["name"], one["value"]))
    return found


def asked_by(question):
    """(relation, name) of a question, whatever words come before it."""
    for number, relation in enumerate(RELATIONS):
        for form in relation.questions:
            pattern = re.escape(form).replace(r"\{name\}", r"([A-Z]\w+ [A-Z]\w+)")
            if one := re.fullmatch(f"([a-z]{{1,5}} ){{0,2}}{pattern}", question):
                return number, one[2]
    raise AssertionError(question)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["retrieved", "oracle"])
def test_answers_are_in_the_passages_that_they_name(folder, form, split):
    task = Rag(passages=form, source=str(folder))
    unknown, places = 0, set()
    for turns in conversations(task, split):
        protocol.check(turns)
        question, call, result, answer = turns
        assert call == rag.called(question.data.decode())
        found = [text.decode() for text in read(result.data)]
        assert len(found) == (3 if form == "retrieved" else 1)
        assert all(len(text) <= task.passage_bytes for text in found)
        relation, name = asked_by(question.data.decode())
        stated = [
            {value for one, who, value in facts_in(text) if (one, who) == (relation, name)}
            for text in found
        ]
        said, number = passages.cited(answer.data)
        if number is None:
            assert said == passages.UNKNOWN
            assert not any(stated)
            unknown += 1
        else:
            places.add(number)
            assert (
                stated
                == [{said.decode()} if i + 1 == number else set() for i in range(3)][: len(found)]
            )
    assert 40 < unknown < 110  # of 300 x 0.25
    assert places == set(range(1, len(found) + 1))


def test_without_passages(folder):
    for turns in conversations(Rag(passages="none"), "train"):
        assert [turn.role for turn in turns] == [Role.USER, Role.ANSWER]
        assert passages.cited(turns[1].data)[1] is None


def test_passages_without_the_fact_look_as_if_they_had_it(folder):
    task, kinds = Rag(unknown=1.0, source=str(folder)), {"person": 0, "relation": 0, "order": 0}
    for turns in conversations(task, "train"):
        relation, name = asked_by(turns[0].data.decode())
        text = turns[2].data.decode()
        kinds["person"] += any(who == name for _, who, _ in facts_in(text))
        kinds["relation"] += any(one == relation for one, _, _ in facts_in(text))
        kinds["order"] += "Ignore" in text or "END ANSWER" in text or "SYSTEM" in text
    assert all(count > 60 for count in kinds.values()), kinds


def test_what_is_held_out(folder):
    task = Rag(source=str(folder))
    for split in SPLITS:
        last = 0
        for turns in conversations(task, split):
            _, name = asked_by(turns[0].data.decode())
            assert is_held_out(name) == (split != "train")
            for _, who, _ in facts_in(turns[2].data.decode()):
                assert is_held_out(who) == (split != "train")
            last += turns[0].data.startswith(b"find ")
        assert last == (300 if split == "test" else 0)
    pools = {split: set(task._files[split]) for split in SPLITS}
    assert sum(map(len, pools.values())) == len(set.union(*pools.values())) == 60
    assert all(pools.values())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_the_longest_example(form, split):
    """Also in the standard library, whose passages have many lines."""
    task = Rag(passages=form)
    lengths = [len(task.drawer(split)(np.random.default_rng(i))[0]) for i in range(200)]
    assert 0.5 * task.max_length < max(lengths) <= task.max_length


@pytest.mark.parametrize("split", SPLITS)
def test_questions_of_training_begin_anywhere(folder, split):
    found = conversations(Rag(source=str(folder)), split)
    first = (
        r"(what|which|find|where|in which|who|tell|I|give|can|locker|phone|home|office|teacher) "
    )
    opened = sum(not re.match(first, turns[0].data.decode()) for turns in found)
    assert 100 < opened < 200 if split == "train" else opened == 0


def test_what_is_scored(folder):
    turns = Rag(source=str(folder)).conversation("train", np.random.default_rng(1))
    _, labels = Rag(source=str(folder)).draw(np.random.default_rng(1))
    scored = protocol.SYMBOL_OF_CLASS[labels[labels >= 0]].tolist()
    assert scored == protocol.symbols_of(turns[1]) + protocol.symbols_of(turns[3])


def test_planted_documents(folder, tmp_path):
    """Each fact is stated once, where the question says; the search finds most of them."""
    task = Rag(source=str(folder))
    questions = task.plant(str(tmp_path), "test", 80, seed=0)
    text = b"\n".join(path.read_bytes() for path in sorted(tmp_path.iterdir())).decode()
    stated = facts_in(text)
    index = retrieval.build(str(tmp_path), str(tmp_path / "index"))
    found = 0
    for question in questions:
        asked = asked_by(question.text)
        values = [value for relation, name, value in stated if (relation, name) == asked]
        if not question.file:
            assert (values, question.answer) == ([], "not in the documents")
            continue
        assert values == [question.answer]
        raw = pathlib.Path(question.file).read_bytes()[question.start : question.stop].decode()
        assert facts_in(raw) == {(*asked, question.answer)}
        holder = index.holding(question.file, question.start, question.stop)
        found += holder in [one.passage for one in index.find(question.text)]
    assert sum(not question.file for question in questions) == 20
    assert found >= 57  # of 60
    assert task.plant(str(tmp_path), "test", 80, seed=0) == questions
    assert task.plant(str(tmp_path), "test", 80, seed=1) != questions


def test_the_result_of_a_search_is_what_is_trained_on(folder, tmp_path):
    """Results of the tool and of the task have one form."""
    (tmp_path / "a.txt").write_bytes(b"one vault\n\n[1] two")
    retrieval.build(str(tmp_path / "a.txt"), str(tmp_path / "index"))
    search = Search(Index(str(tmp_path / "index")))
    result = search.tools().call([rag.called('the "vault"?').data])[0]
    assert result == passages.shown([b"one vault\n\n[1] two"])


def test_options(tmp_path):
    with pytest.raises(ConfigError, match=r"options.passage_bytes is 86; it must be at least 87"):
        Rag(passage_bytes=86)
    (tmp_path / "a.txt").write_text("a single document")
    with pytest.raises(DataError, match=r"options.source is .*, which has no documents for "):
        Rag(source=str(tmp_path)).draw(np.random.default_rng(0))
