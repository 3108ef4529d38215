"""Our ListOps expressions and values beside those of the Long Range Arena's program."""

import collections
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from spectral_pod.data.tasks import listops, listops_expressions
from tools import shell
from tools.peers.agreement.rows import Row, load

EXAMPLES = 2000  # of each generator


def compare(folder: Path) -> Iterator[Row]:
    flags = mock.MagicMock()
    modules = {"absl": mock.MagicMock(flags=flags)}
    modules |= {f"tensorflow{part}": mock.MagicMock() for part in ("", ".compat", ".compat.v1")}
    program = load(folder / "lra_benchmarks/data/listops.py", modules)
    default = {call.args[0]: call.kwargs["default"] for call in flags.DEFINE_integer.mock_calls}
    shell.say("ListOps: drawing")
    random.seed(1)
    trees: list[Any] = []
    while len(trees) < EXAMPLES:
        tree, length = program.generate_tree(1, default["max_depth"], default["max_args"])
        if default["min_length"] < length < default["max_length"]:
            trees.append(tree)
    texts = [program.to_string(tree).encode() for tree in trees]
    theirs = [listops_expressions.decode(text, "raw") for text in texts]
    ours = list(itertools.islice(listops.ListOps(num_workers=1).generate(EXAMPLES), EXAMPLES))

    text = Row("LRA ListOps", "their texts, by our encoding", EXAMPLES)
    text.add(
        "unequal", sum(listops_expressions.encode(s, "raw") != t for s, t in zip(theirs, texts)), 0
    )
    value = Row("LRA ListOps", "values of their and our expressions", 2 * EXAMPLES)
    wrong = sum(
        listops_expressions.evaluate(s) != program.to_value(t) for s, t in zip(theirs, trees)
    )
    value.add("unequal, theirs", wrong, 0)
    wrong = sum(e.answer != program.to_value(_tree(e.symbols)) for e in ours)
    value.add("unequal, ours", wrong, 0)
    draws = Row("LRA ListOps", "distributions")
    answers = [e.answer for e in ours], [program.to_value(tree) for tree in trees]
    draws.add_draws("answers", *answers)
    measures = [_expression_measures(s) for s in ([e.symbols for e in ours], theirs)]
    for what in measures[0]:
        draws.add_draws(what, *(m[what] for m in measures))
    draws.cases = 1 + len(measures[0])
    yield from (text, value, draws)


def _tree(symbols: bytes) -> Any:
    """Our symbols as a tree of the program, nested pairs, through its text."""
    stack: list[Any] = [[]]
    for token in listops_expressions.encode(symbols, "raw").decode().split():
        if token == "(":
            stack.append([])
        elif token == ")":
            node = tuple(stack.pop())
            stack[-1].append(node)
        else:
            stack[-1].append(int(token) if token.isdigit() else token)
    ((tree,),) = stack
    return tree


def _expression_measures(expressions: Sequence[bytes]) -> dict[str, list[float]]:
    """Samples to be compared, from expressions as symbols.

    Digits and operators are drawn independently of each other. Shapes are not, within an
    expression, which therefore counts once.
    """
    found: dict[str, list[float]] = collections.defaultdict(list)
    for symbols in expressions:
        arguments, depths = [0], []
        for symbol in symbols:
            if symbol == ord("]"):
                root = arguments.pop()
                continue
            arguments[-1] += 1
            depths.append(len(arguments))
            if symbol in b"<>=+":
                arguments.append(0)
        operators = [b"<>=+".index(symbol) for symbol in symbols if symbol in b"<>=+"]
        found["digits"] += [symbol for symbol in symbols if symbol in b"0123456789"]
        found["operators"] += operators
        found["root"].append(operators[0])
        found["arguments of the root"].append(root)
        found["arguments of an operator"].append((len(depths) - 1) / len(operators))
        found["operators of an expression"].append(len(operators))
        found["length"].append(len(symbols))
        found["depth"].append(max(depths))
        found["mean depth of a node"].append(float(np.mean(depths)))
    return found
