"""Questions about passages: what is stated where, what is held out, and planted documents."""

import gzip
import itertools
import pathlib
import re

import numpy as np
import pytest

from spectral_pod.agent import passages, protocol, retrieval
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.retrieval import Index, Search
from spectral_pod.data.tasks import rag, rag_facts
from spectral_pod.data.tasks.rag import Rag
from spectral_pod.data.tasks.rag_facts import RELATIONS, is_held_out
from spectral_pod.errors import ConfigError, DataError
from tests.agent.test_passages import read

SPLITS = ("train", "validation", "test")
FORMS = ("retrieved", "oracle", "none")
NOUNS = {relation.noun for relation in RELATIONS}


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


def asked_by(question):
    """(noun, name) of a question, in whatever words."""
    (noun,) = set(re.findall(r"\w+", question)) & NOUNS
    (name,) = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", question)
    return noun, name


def stating(text, noun, name):
    """The lines of a text that state a fact of this kind about a person."""
    lines = text.split("\n")
    return [x for x in lines if name in x and re.search(rf"\b{noun}\b", x, re.IGNORECASE)]


def value_in(line, name):
    """What a line states about a person: its only number or capitalised words besides the name."""
    rest = line.replace(name, "", 1)[1:]  # a sentence begins with a capital
    (value,) = re.findall(r"[A-Z][a-z]+(?: [A-Z][a-z]+)?|\d+", rest)
    return value


def questions_and_answers(turns):
    """Of a conversation with a search: (question, answer) of each."""
    asked = [turn.data.decode() for turn in turns if turn.role == Role.USER]
    return list(zip(asked, [turn.data for turn in turns if turn.role == Role.ANSWER], strict=True))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["retrieved", "oracle"])
def test_answers_are_in_the_passages_that_they_name(folder, form, split):
    task = Rag(passages=form, source=str(folder))
    unknown, known, places = 0, 0, set()
    for turns in conversations(task, split):
        protocol.check(turns)
        question, call, result = turns[:3]
        assert call == rag.called(question.data.decode())
        assert {turn.role for turn in turns[3:]} <= {Role.USER, Role.ANSWER}
        found = [text.decode() for text in read(result.data)]
        assert len(found) == (3 if form == "retrieved" else 1)
        assert all(len(text) <= task.passage_bytes for text in found)
        for asked, answer in questions_and_answers(turns):
            noun, name = asked_by(asked)
            lines = [stating(text, noun, name) for text in found]
            said, number = passages.cited(answer)
            if number is None:
                assert (said, list(itertools.chain(*lines))) == (passages.UNKNOWN, [])
                unknown += 1
            else:
                (line,) = list(itertools.chain(*lines))
                assert lines[number - 1] == [line]
                assert value_in(line, name) == said.decode()
                known += 1
                places.add(number)
    assert 0.15 < unknown / (unknown + known) < 0.35
    assert known > 1.2 * 300  # further questions
    assert places == set(range(1, len(found) + 1))


def test_without_passages(folder):
    for turns in conversations(Rag(passages="none"), "train"):
        assert [turn.role for turn in turns] == [Role.USER, Role.ANSWER]
        assert passages.cited(turns[1].data)[1] is None


def test_passages_without_the_fact_look_as_if_they_had_it(folder):
    task, kinds = Rag(unknown=1.0, source=str(folder)), {"person": 0, "relation": 0, "order": 0}
    for turns in conversations(task, "validation"):
        noun, name = asked_by(turns[0].data.decode())
        text = turns[2].data.decode()
        assert not stating(text, noun, name)
        kinds["person"] += name in text
        kinds["relation"] += bool(stating(text, noun, ""))
        kinds["order"] += "Ignore" in text or "END ANSWER" in text or "SYSTEM" in text
        assert all(answer == passages.UNKNOWN for _, answer in questions_and_answers(turns)[:1])
    assert all(count > 60 for count in kinds.values()), kinds


def test_no_question_is_asked_twice(folder):
    for turns in conversations(Rag(source=str(folder)), "train"):
        asked = [asked_by(text) for text, _ in questions_and_answers(turns)]
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("split", SPLITS)
def test_passages_of_facts_alone(folder, split):
    """Half of the conversations of training have them, and ask more questions about them."""
    numbers = {True: [], False: []}
    for turns in conversations(Rag(source=str(folder)), split):
        found = [text.decode() for text in read(turns[2].data)]
        alone = not any(re.search(r"(?:\b(?:le|la|de|in) ){4}", text) for text in found)
        lines = list(itertools.chain(*(text.split("\n") for text in found)))
        if alone:
            assert all(re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", line) for line in lines)
            assert all(text.count("\n") in (1, 2) for text in found)
        numbers[alone].append(len(questions_and_answers(turns)))
    if split != "train":
        assert not numbers[True]
        return
    assert 120 < len(numbers[True]) < 180
    assert np.mean(numbers[True]) > 1.7 * np.mean(numbers[False])


def test_ways_to_state_a_fact():
    """Drawn ways have noun and name in both orders, with words anywhere, in training alone."""
    rng = np.random.default_rng(0)
    fact = rag_facts.Fact(0, "Tamo Reki", "4711")
    for split, fewest in (("train", 300), ("validation", 5), ("test", 1)):
        texts = {rag_facts.statement(fact, split, rng) for _ in range(1000)}
        assert len(texts) >= fewest
        assert (len(texts) > 10) == (split == "train")
        parts = (r"\blocker\b", "Tamo Reki", r"\b4711\b")
        places = [[re.search(part, x, re.IGNORECASE).start() for part in parts] for x in texts]
        orders = {tuple(np.argsort(place).tolist()) for place in places}
        assert len(orders) == (1 if split == "test" else 2)
        assert all(order[-1] == 2 for order in orders)
        assert max(map(len, texts)) <= rag_facts.longest()


def test_what_is_held_out(folder):
    task = Rag(source=str(folder))
    for split in SPLITS:
        last = 0
        for turns in conversations(task, split):
            for asked, _ in questions_and_answers(turns):
                noun, name = asked_by(asked)
                for line in [asked, *stating(turns[2].data.decode(), noun, name)]:
                    persons = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", line.replace(name, ""))
                    assert all(is_held_out(who) == (split != "train") for who in [name, *persons])
            last += turns[0].data.startswith(b"find ")
        assert last == (300 if split == "test" else 0)
    pools = {split: set(task._files[split]) for split in SPLITS}
    assert sum(map(len, pools.values())) == len(set.union(*pools.values())) == 60
    assert all(pools.values())


def test_files_that_are_no_text_are_no_documents(tmp_path):
    """As an index leaves them out."""
    write_documents(tmp_path)
    before = Rag(source=str(tmp_path))._files
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    assert Rag(source=str(tmp_path))._files == before


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_the_longest_example(form, split):
    """Also in the standard library, whose passages have many lines."""
    task = Rag(passages=form)
    lengths = [len(task.drawer(split)(np.random.default_rng(i))[0]) for i in range(200)]
    assert 0.5 * task.max_length < max(lengths) <= task.max_length


@pytest.mark.parametrize("split", SPLITS)
def test_questions_of_training_are_in_any_words(folder, split):
    """Half of them begin with words that mean nothing, and half have such words inside."""
    ways = [way.replace("{name}", "N") for one in RELATIONS for way in one.questions]
    found = [text for turns in conversations(Rag(source=str(folder)), split)
             for text, _ in questions_and_answers(turns)]  # fmt: skip
    whole = [re.sub("[A-Z][a-z]+ [A-Z][a-z]+", "N", text) for text in found]
    known = sum(text in ways for text in whole) / len(whole)
    ends = sum(any(text.endswith(way) for way in ways) for text in whole) / len(whole)
    assert 0.15 < known < 0.35 if split == "train" else known == 1
    assert 0.4 < ends < 0.65 if split == "train" else ends == 1


def test_what_is_scored(folder):
    turns = Rag(source=str(folder)).conversation("train", np.random.default_rng(2))
    _, labels = Rag(source=str(folder)).draw(np.random.default_rng(2))
    scored = protocol.SYMBOL_OF_CLASS[labels[labels >= 0]].tolist()
    written = [turn for turn in turns if turn.role in (Role.CALL, Role.ANSWER)]
    assert len(written) > 2
    assert scored == list(itertools.chain(*map(protocol.symbols_of, written)))


def test_planted_documents(folder, tmp_path):
    """Each fact is stated once, where the question says; the search finds most of them."""
    task = Rag(source=str(folder))
    questions = task.plant(str(tmp_path), "test", 80, seed=0)
    text = b"\n".join(path.read_bytes() for path in sorted(tmp_path.iterdir())).decode()
    index = retrieval.build(str(tmp_path), str(tmp_path / "index"))
    found = 0
    for question in questions:
        noun, name = asked_by(question.text)
        lines = stating(text, noun, name)
        if not question.file:
            assert (lines, question.answer) == ([], "not in the documents")
            continue
        raw = pathlib.Path(question.file).read_bytes()[question.start : question.stop].decode()
        assert lines == [raw]
        assert value_in(raw, name) == question.answer
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
    with pytest.raises(ConfigError, match=r"options.passage_bytes is 94; it must be at least 95"):
        Rag(passage_bytes=94)
    for name in ("num_passages", "passage_bytes"):
        with pytest.raises(ConfigError, match=rf"options.{name} is 1000000; it must be in 1 to"):
            Rag(**{name: 1_000_000})
    (tmp_path / "a.txt").write_text("a single document")
    with pytest.raises(DataError, match=r"options.source is .*, which has no documents for "):
        Rag(source=str(tmp_path)).draw(np.random.default_rng(0))
