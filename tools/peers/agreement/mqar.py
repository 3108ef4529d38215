"""Our sequences of associative recall beside those of Zoology's generator."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from spectral_pod.data.tasks.mqar import TEST_SETTINGS, Mqar, tokens_of
from tools import shell
from tools.peers.agreement.rows import Row, load

EXAMPLES = 2000  # per setting, of each generator


def compare(folder: Path) -> Iterator[Row]:
    def segment(inputs: Any, labels: Any, slices: Any) -> tuple[np.ndarray, np.ndarray]:
        return inputs.numpy(), labels.numpy()

    modules = {
        **{name: mock.MagicMock() for name in ("zoology", "zoology.data")},
        "zoology.config": SimpleNamespace(DataSegmentConfig=object),
        "zoology.data.utils": SimpleNamespace(DataSegment=segment),
    }
    program = load(folder / "zoology/data/multiquery_ar.py", modules)
    rules, draws = Row("Zoology", "rules of a sequence"), Row("Zoology", "distributions")
    settings = [(8192, 0.01, True, s) for s in TEST_SETTINGS[:5]]
    settings += [
        (256, 0.01, False, (64, 16)),
        (8192, 1.0, True, (256, 64)),
        (97, 0.3, True, (64, 8)),
    ]
    for V, power_a, random_non_queries, (length, pairs) in settings:
        name = f"V={V} a={power_a} N={length} pairs={pairs}"
        shell.say(f"Zoology {name}")
        theirs = program.multiquery_ar(
            V, EXAMPLES, length, seed=1, power_a=power_a, num_kv_pairs=pairs,
            random_non_queries=random_non_queries,
        )  # fmt: skip
        task = Mqar(
            settings=((length, pairs),), num_symbols=V, power_a=power_a,
            random_non_queries=random_non_queries,
        )  # fmt: skip
        rng = np.random.default_rng(2)
        ours = [np.stack(x) for x in zip(*(task.draw(rng) for _ in range(EXAMPLES)))]
        symbol_of_token = np.full(task.vocab_size, -1)
        symbol_of_token[tokens_of(np.arange(V))] = np.arange(V)
        ours[0] = symbol_of_token[ours[0]]
        for who, (symbols, labels) in {"ours": ours, "theirs": theirs}.items():
            broken = _broken(symbols, labels, V, pairs, random_non_queries)
            rules.add(f"{who} that break one, {name}", broken, 0)
        measures = [_recall_measures(*sample, pairs) for sample in (ours, theirs)]
        for what in measures[0]:
            draws.add_draws(f"{what}, {name}", *(m[what] for m in measures))
        rules.cases, draws.cases = rules.cases + 2 * EXAMPLES, draws.cases + len(measures[0])
    yield from (rules, draws)


def _broken(symbols: np.ndarray, labels: np.ndarray, V: int, pairs: int, filled: bool) -> int:
    """The number of sequences that are not pairs, then each key once, labelled by its value."""
    count = 0
    for tokens, wanted in zip(symbols, labels):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        places = np.flatnonzero(wanted >= 0)
        value_of = dict(zip(keys.tolist(), values.tolist()))
        kept = (
            len(value_of) == pairs == len(places) == len(set(values.tolist()))
            and 1 <= keys.min() <= keys.max() < V // 2 <= values.min() <= values.max() < V
            and places.min() >= 2 * pairs
            and not (places % 2).any()
            and set(tokens[places].tolist()) == set(value_of)
            and all(value_of[key] == value for key, value in zip(tokens[places], wanted[places]))
            and (filled or not np.delete(tokens, places)[2 * pairs :].any())
        )
        count += not kept
    return count


def _recall_measures(symbols: np.ndarray, labels: np.ndarray, pairs: int) -> dict[str, Any]:
    """Samples to be compared, from examples [B, N]."""
    rest = labels[:, 2 * pairs :]
    place_of_value = {}
    for b, n in zip(*np.nonzero(rest >= 0)):
        place_of_value[b, rest[b, n]] = n // 2
    values = symbols[:, 1 : 2 * pairs : 2]
    places = np.array([[place_of_value[b, v] for v in row] for b, row in enumerate(values)])
    return {
        "place of a query": places,
        "place of the first key's query": places[:, 0],
        "place of the last key's query": places[:, -1],
        "first place of any": places.min(axis=1),
        "last place of any": places.max(axis=1),
        "keys": symbols[:, 0 : 2 * pairs : 2],
        "values": values,
        "other symbols": symbols[:, 2 * pairs :][rest < 0],
    }
