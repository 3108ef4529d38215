"""The command line of retrieval; and what `evaluate` makes of scripts in the model's place."""

import json
import re

import pytest

from spectral_pod.agent import passages, retrieval
from spectral_pod.agent.loop import Agent
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.agent.retrieval import Search
from spectral_pod.data.tasks import rag
from spectral_pod.data.tasks.rag import Rag
from spectral_pod.errors import UserError
from tests.agent.scripted import Scripted, answer, call, steps
from tests.agent.test_passages import read
from tests.data.test_rag_task import asked_by, stating, value_in, write_documents
from tests.tiny_run import tiny_config, write_run
from tools import rag as tool
from tools import rag_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


def run(*arguments, code=0):
    assert tool.main([str(argument) for argument in arguments]) == code


def test_index_and_search(tmp_path, capfd):
    (tmp_path / "a.txt").write_bytes(b"nothing here\n\n" * 30 + b"The vault\x1b[31m is safe.")
    (tmp_path / "b.gz").write_bytes(b"\x1f\x8b\x08")
    run("index", tmp_path, f"--out={tmp_path}/index", "--passage_bytes=40")
    said = capfd.readouterr().err
    assert f"left out: {tmp_path}/b.gz: a file of gzip" in said
    assert f"passages of 1 files indexed in {tmp_path}/index" in said
    run("search", f"--index={tmp_path}/index", "which VAULT?")
    out = capfd.readouterr().out
    assert re.fullmatch(
        rf"\d\.\d{{3}} {tmp_path}/a.txt:420-443\n    The vault\\x1b\[31m is safe\.\n", out
    ), out
    run("search", f"--index={tmp_path}/index", "caf\udce9?")  # a question may be any bytes
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "nothing found: no passage has a word of the question\n"


def test_one_message(tmp_path, capfd):
    for arguments, message in {
        ("index", tmp_path / "gone", f"--out={tmp_path}/x"): "gone: there is no such file",
        ("search", f"--index={tmp_path}", "x"): "index.json is missing; make the index again",
        ("index", tmp_path, f"--out={tmp_path}/x", "--passage_bytes=3"): "--passage_bytes is 3;",
    }.items():
        run(*arguments, code=2)
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line


def test_an_answer_is_printed_with_its_passage(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("The code of Ada is 4711.")
    search = Search(retrieval.build(str(tmp_path / "a.txt"), str(tmp_path / "index")))
    for said, out in {
        "4711 [1]": f"4711\n{tmp_path}/a.txt:0-24\n",
        "not in the documents": "not in the documents\n",
    }.items():
        script = steps(call('search {"query": "Ada"}'), answer(said))
        tool.say_answer(Agent(Scripted(script), search.tools()), search, b"code of Ada?")
        assert capfd.readouterr().out == out
    script = steps(call('search {"query": "Ada"}'), answer("4712 [1]"))
    with pytest.raises(UserError, match="is not in the passage that it names"):
        tool.say_answer(Agent(Scripted(script), search.tools()), search, b"code of Ada?")
    assert capfd.readouterr().out == ""


# ---- measuring


def reader(turns):
    """Answers as it should, from what it reads."""
    asked = turns[0].data.decode()
    if len(turns) == 1:
        return rag.called(asked)
    for number, text in enumerate(read(turns[2].data), 1):
        noun, name = asked_by(asked)
        for line in stating(text.decode(errors="replace"), noun, name):
            return Turn(Role.ANSWER, passages.citing(value_in(line, name).encode(), number))
    return Turn(Role.ANSWER, passages.UNKNOWN)


def measured(script, task, count=40):
    def agent(tools):
        return Agent(Scripted(script), tools)

    return rag_evaluation.measure(agent, task, count=count, seed=0, batch=16)


def test_a_perfect_reader(folder):
    retrieved, oracle = measured(reader, Rag(source=str(folder)))
    assert oracle == ("oracle", 30, 30, 30, 30, 10, 10)
    assert retrieved == ("retrieved", 30, retrieved.found, retrieved.found, retrieved.found, 10, 10)
    assert retrieved.found >= 28
    lines = rag_evaluation.table([oracle]).splitlines()
    assert lines[0].split() == ["read", "found", "exact", "cited", "unknown"]
    assert lines[1].split()[:3] == ["oracle", "100.0%", "(30/30)"]


def test_other_readers(folder):
    def wrong_passage(turns):
        said = reader(turns)
        text, number = passages.cited(said.data)
        return said if number is None else Turn(said.role, passages.citing(text, number % 3 + 1))

    def uncited(turns):
        return reader(turns)._replace(data=passages.cited(reader(turns).data)[0])

    task = Rag(source=str(folder))
    for script in (wrong_passage, uncited):
        retrieved, _ = measured(script, task)
        assert (retrieved.exact, retrieved.cited, retrieved.unknown) == (retrieved.found, 0, 10)
    retrieved, _ = measured(steps(call("search {}"), answer("4711")), task)
    assert retrieved[2:] == (0, 0, 0, 10, 0)
    retrieved, _ = measured(steps([65]), task)  # no turn at all
    assert retrieved[2:] == (0, 0, 0, 10, 0)


def test_without_passages(folder):
    (row,) = measured(steps(answer("not in the documents")), Rag("none", source=str(folder)))
    assert row == ("none", 30, 0, 0, 0, 10, 10)
    shares = rag_evaluation.table([row]).splitlines()[1].split()
    assert shares == ["none", "0.0%", "(0/30)", "0.0%", "(0/30)", "-", "100.0%", "(10/10)"]


def test_of_a_run(folder, tmp_path, capfd):
    """An untrained model answers nothing, and that is measured; other runs are refused."""
    config = tiny_config(**{"data.task": "rag", "model.num_layers": 1})
    config.data.options = {"passages": "none", "source": str(folder)}
    write_run(tmp_path / "run", config)
    run("evaluate", f"--workdir={tmp_path}/run", "--questions=4", f"--json={tmp_path}/shares.json")
    (row,) = json.loads((tmp_path / "shares.json").read_text())["rows"]
    assert row == {
        "read": "none", "asked": 3, "unanswerable": 1,
        "found": 0.0, "exact": 0.0, "cited": None, "unknown": 0.0,
    }  # fmt: skip
    assert capfd.readouterr().out.splitlines()[1].split()[:3] == ["none", "0.0%", "(0/3)"]
    write_run(tmp_path / "other", tiny_config(**{"model.num_layers": 1}))
    run("evaluate", f"--workdir={tmp_path}/other", code=2)
    assert "was trained on 'lm'; `evaluate` measures runs of the task 'rag'" in (
        capfd.readouterr().err
    )
