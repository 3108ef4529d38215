"""Answers from documents: an index of their passages, and a trained model that reads them.

    python -m tools.rag index FOLDER --out=INDEX
    python -m tools.rag search --index=INDEX "who wrote it?"
    python -m tools.rag ask --index=INDEX --workdir=DIR "who wrote it?"
    python -m tools.rag evaluate --workdir=DIR [--questions=200]

`index` cuts text files into passages and writes an index for BM25, on disk or gs://. Files that are
no text are left out, and stderr names them. `search` prints the passages that fit a question, each
with its score, file and range of bytes, and its text, indented. `ask` lets the model of a run
search and answer: stdout has the answer, and a line FILE:START-STOP, the passage in which the
answer stands as it is: bytes START to STOP - 1 of the file. An answer for which that is not so is
an error, exit code 2. "not in the documents" is an answer, and has no passage.

`evaluate` measures a run of the task rag (configs/rag.py): it places generated facts of the test
split into real documents, indexes them, and asks. Its columns are shares of questions: `found`,
those with an answer whose passage the search found; `exact`, those that were answered as expected;
`cited`, of the exact ones those whose passage holds the fact; `unknown`, of those without an answer
those that were answered "not in the documents". Its rows: "retrieved", what the search finds is
read; "oracle", the passage with the fact instead (without one, the first that was found); of a run
without passages "none". Exit code 0 says that it was measured, whatever the figures.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from spectral_pod import storage
from spectral_pod.agent import passages, retrieval
from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.tools import Tools
from spectral_pod.agent.writer import ModelWriter
from spectral_pod.data.tasks.rag import Rag
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.parallel import runtime

from . import rag_evaluation, shell, trained_model


def main(argv: Sequence[str]) -> int:
    return shell.run(_parser(), lambda a: a.command(a), argv)


def index(arguments: argparse.Namespace) -> None:
    storage.check_access(arguments.out, write=True)
    made = retrieval.build(arguments.source, arguments.out, passage_bytes=arguments.passage_bytes)
    for file in made.facts["left_out"]:
        shell.say(f"left out: {shell.in_line(file['name'])}: {file['reason']}")
    count = len(made.facts["files"])
    shell.say(f"{len(made):,} passages of {count:,} files indexed in {arguments.out}")


def search(arguments: argparse.Namespace) -> None:
    found = _open(arguments.index).find(arguments.question, arguments.passages)
    for passage, score in found:
        print(f"{score:.3f} {shell.in_line(passage.place)}")
        print(f"    {shell.indented(passage.data)}")
    if not found:
        shell.say("nothing found: no passage has a word of the question")


def ask(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    tool = retrieval.Search(_open(arguments.index), arguments.passages)
    agent = Agent.from_checkpoint(
        arguments.workdir,
        tool.tools(),
        step=arguments.step,
        mesh=trained_model.mesh_of(arguments.mesh),
        dtype=arguments.dtype,
    )
    say_answer(agent, tool, os.fsencode(arguments.question))


def say_answer(agent: Agent, tool: retrieval.Search, question: bytes) -> None:
    """Prints the answer of an agent with that tool, and the place of its passage.

    Raises:
      UserError: see `retrieval.answer`.
    """
    found = retrieval.answer(agent.run([question])[0], tool)
    print(shell.in_line(found.text))
    if found.passage:
        print(shell.in_line(found.passage.place))


def evaluate(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    trained = restore_for_inference(
        arguments.workdir,
        step=arguments.step,
        mesh=trained_model.mesh_of(arguments.mesh),
        dtype=arguments.dtype,
    )
    data = trained.config.data
    if data.task != Rag.name:
        raise ConfigError(
            f"{arguments.workdir} was trained on {data.task!r}; `evaluate` measures runs of the "
            "task 'rag' (configs/rag.py)"
        )
    task = Rag.from_options(data.options.to_dict())
    # A conversation that is twice as long as any in training has gone wrong.
    writer, limits = ModelWriter(trained), Limits(bytes=2 * task.max_length)

    def agent(tools: Tools) -> Agent:
        return Agent(writer, tools, limits=limits)

    rows = rag_evaluation.measure(
        agent, task, count=arguments.questions, seed=arguments.seed, batch=arguments.batch
    )
    if arguments.json:
        shell.write(arguments.json, json.dumps(rag_evaluation.report(rows), indent=1) + "\n")
    print(rag_evaluation.table(rows), end="")


def _open(folder: str) -> retrieval.Index:
    storage.check_access(folder, write=False)
    return retrieval.Index(folder)


def _parser() -> shell.Parser:
    parser = shell.parser("rag", __doc__)
    commands = parser.add_subparsers(required=True, metavar="index|search|ask|evaluate")
    writes = commands.add_parser("index", help="makes an index of documents")
    writes.add_place("source", root=True, help="a file, a folder or a glob, on disk or gs://")
    writes.add_place("--out", required=True, help="of the index: a folder or a gs:// URL")
    writes.add_value(
        "--passage_bytes",
        retrieval.PassageBytes,
        passages.PASSAGE_BYTES,
        f"of a passage, at most ({passages.PASSAGE_BYTES})",
    )
    writes.set_defaults(command=index)
    for name, function, about in (
        ("search", search, "prints the passages that fit a question"),
        ("ask", ask, "answers a question from the passages that fit it"),
        ("evaluate", evaluate, "measures a model on facts in real documents"),
    ):
        reads = commands.add_parser(name, help=about)
        reads.set_defaults(command=function)
        if name != "evaluate":
            reads.add_place("--index", required=True, help="a folder or a gs:// URL")
            # A question may be any bytes: `type` exempts it from being Unicode.
            reads.add_argument("question", type=str)
            many = passages.NUM_PASSAGES
            reads.add_value("--passages", Positive, many, f"that are found, at most ({many})")
        if name != "search":
            trained_model.add_flags(reads)
        if name == "evaluate":
            reads.add_value("--questions", Positive, 200, "to ask (200)")
            reads.add_value("--batch", Positive, 32, "of questions at once (32)")
            reads.add_value("--seed", NonNegative, 0, "of facts and documents (0)")
            reads.add_output("--json", "write the shares to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
