"""The comparison with published programs: what it finds, without these programs."""

import numpy as np
import pytest

from spectral_pod.data.tasks.listops import ListOps
from spectral_pod.data.tasks.listops_expressions import evaluate
from spectral_pod.data.tasks.mqar import Mqar
from tools.peers.agreement import __main__ as agreement
from tools.peers.agreement import listops, mqar
from tools.peers.agreement.rows import DISAGREES, Row


@pytest.mark.parametrize("given", [False, True])
def test_a_peer_that_is_missing_is_named_and_fails(given, tmp_path, capsys):
    """No folder, and a folder without the program."""
    flags = [f"--{flag}={tmp_path}" for flag in agreement.PEERS] if given else []
    assert agreement.main(flags) == 2
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(agreement.PEERS)
    for row, (peer, _) in zip(rows, agreement.PEERS.values()):
        assert row.startswith(f"| {peer} |")
        assert "missing: " in row


def test_draws_of_one_distribution_agree_and_of_two_do_not():
    rng = np.random.default_rng(0)
    row = Row("peer", "draws")
    row.add_draws("equal", rng.integers(9, size=(2000, 2)), rng.integers(9, size=3000))
    assert not row.failed
    row.add_draws("one value more", rng.integers(9, size=4000), rng.integers(10, size=3000))
    row.add_draws("equal again", rng.normal(size=2000), rng.normal(size=2000))
    assert row.failed
    assert "one value more" in row.line()
    assert DISAGREES in row.line()


@pytest.mark.parametrize("difference", [2.0, np.nan, np.inf])
def test_one_comparison_above_its_tolerance_fails(difference):
    row = Row("peer", "numbers")
    assert row.failed, "nothing was compared"
    row.add("small", 0.5, 1.0)
    assert not row.failed
    row.add("large", difference, 1.0)
    row.add("small again", 0.9, 1.0)
    assert row.failed
    assert "large" in row.line()


def test_sequences_of_recall_that_break_a_rule_are_counted():
    task = Mqar(settings=((64, 8),), num_symbols=256, random_non_queries=False)
    rng = np.random.default_rng(0)
    symbols, labels = (np.stack(x) for x in zip(*(task.draw(rng) for _ in range(8))))
    rules = 256, 8, False
    assert mqar._broken(symbols, labels, *rules) == 0
    query = int(np.flatnonzero(labels[0] >= 0)[0])
    labels[0, query] = symbols[0, 1] + 1  # a wrong value
    symbols[1, 2] = symbols[1, 0]  # a key twice
    symbols[2, 1] = 1  # a key as a value
    labels[3, np.flatnonzero(labels[3] >= 0)[0]] = -1  # a key without a query
    symbols[4, np.flatnonzero(labels[4, 16:] < 0)[0] + 16] = 7  # a symbol between the queries
    assert mqar._broken(symbols, labels, *rules) == 5


def test_an_expression_becomes_a_tree_of_pairs_with_its_value():
    """The published form: ((((operator, argument), argument) ...), ']')."""
    apply = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(np.median(v)), "[SM": sum}

    def value(tree):
        if not isinstance(tree, tuple):
            return tree
        arguments, (tree, end) = [], tree
        assert end == "]"
        while isinstance(tree, tuple):
            tree, argument = tree
            arguments.append(value(argument))
        return apply[tree](arguments[::-1]) % 10

    for example in ListOps(num_workers=1).generate(3):
        assert value(listops._tree(example.symbols)) == evaluate(example.symbols)
