"""ListOps against the official generator, re-implemented literally and slowly below."""

import collections
import itertools
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import listops
from spectral_pod.data.tasks.listops import ListOps
from spectral_pod.errors import ConfigError

OPERATORS = ["[MIN", "[MAX", "[MED", "[SM"]
PUBLISHED_RUNGS = [0.363, 0.590, 0.739, 0.834, 0.904, 0.940]


def official_tree(rng, value_p=0.25, max_depth=10, max_args=10, depth=1):
    """A nested pair of pairs and its length, as the Long Range Arena's generator makes them."""
    r = rng.random() if depth < max_depth else 1
    if r > value_p:
        return rng.choice(range(10)), 1
    length, values = 2, []
    for _ in range(rng.randint(2, max_args)):
        value, value_length = official_tree(rng, value_p, max_depth, max_args, depth + 1)
        values.append(value)
        length += value_length
    tree = (rng.choice(OPERATORS), values[0])
    for value in values[1:]:
        tree = (tree, value)
    return (tree, "]"), length


def official_string(tree):
    if not isinstance(tree, tuple):
        return str(tree)
    return f"( {official_string(tree[0])} {official_string(tree[1])} )"


def official_value(tree):
    """The value of a tree, by joining arguments to an unsaturated function pair by pair."""
    if not isinstance(tree, tuple):
        return tree
    left, right = official_value(tree[0]), official_value(tree[1])
    if left in OPERATORS:
        return (left, [right])
    operator, values = left
    if right != "]":
        return (operator, [*values, right])
    if operator == "[MED":
        return int(statistics.median(values))
    if operator == "[SM":
        return int(np.sum(values)) % 10
    return min(values) if operator == "[MIN" else max(values)


def official_examples(n, seed, **parameters):
    rng = random.Random(seed)
    trees = (official_tree(rng, **parameters) for _ in itertools.count())
    kept = (tree for tree, length in trees if 500 < length < 2000)
    return list(itertools.islice(kept, n))


def read_official(text):
    """The nested pairs that `official_string` wrote."""
    tokens = iter(text.split())

    def read():
        token = next(tokens)
        if token == "(":
            pair = (read(), read())
            assert next(tokens) == ")"
            return pair
        return int(token) if token.isdigit() else token

    tree = read()
    assert next(tokens, None) is None
    return tree


def official_texts(examples):
    return [listops.encode(e.symbols, "raw").decode() for e in examples]


def nodes(tree, depth=1):
    """(depth, operator or digit, number of arguments) of every node, the root first."""
    if not isinstance(tree, tuple):
        yield depth, tree, 0
        return
    head, arguments = tree[0], []
    while isinstance(head, tuple):
        head, argument = head
        arguments.append(argument)
    yield depth, head, len(arguments)
    for argument in reversed(arguments):
        yield from nodes(argument, depth + 1)


def features(trees):
    """By name, one value a tree, so that the values of a feature are independent draws."""
    columns = collections.defaultdict(list)
    for i, tree in enumerate(trees):
        depths, names, num_args = zip(*nodes(tree), strict=True)
        operators = [(name, n) for name, n in zip(names, num_args, strict=True) if n]
        digits = [name for name in names if name not in OPERATORS]
        operator, operator_args = operators[(7 * i) % len(operators)]
        columns["length"].append(2 * len(operators) + len(digits))
        columns["mean depth"].append(np.mean(depths))
        columns["nodes at depth 10"].append(depths.count(10))
        columns["operators per node"].append(len(operators) / len(depths))
        columns["mean number of arguments"].append(sum(num_args) / len(operators))
        columns["arguments of the root"].append(num_args[0])
        columns["arguments of some operator"].append(operator_args)
        columns["operator at the root"].append(operators[0][0])
        columns["some operator"].append(operator)
        columns["some digit"].append(digits[(7 * i) % len(digits)])
        columns["answer"].append(official_value(tree))
    return columns


def p_values(ours, theirs):
    """By feature, how likely two samples of one distribution differ as much as these two."""
    result = {}
    for name, column in ours.items():
        if len(set(column)) > 12:
            result[name] = stats.ks_2samp(column, theirs[name]).pvalue
            continue
        kinds = sorted(set(column) | set(theirs[name]))
        table = [[c.count(kind) for kind in kinds] for c in (column, theirs[name])]
        result[name] = stats.chi2_contingency(table).pvalue
    return result


@pytest.fixture(scope="module")
def examples():
    return list(ListOps(seed=1, num_workers=1).generate(1000))


@pytest.fixture(scope="module")
def our_features(examples):
    return features(read_official(text) for text in official_texts(examples))


def test_distribution_is_the_official_one(our_features):
    theirs = features(official_examples(1000, seed=2))
    p = p_values(our_features, theirs)
    assert min(p.values()) > 0.01 / len(p), p


@pytest.mark.parametrize("wrong", [{"value_p": 0.27}, {"max_args": 9}, {"max_depth": 9}], ids=str)
def test_a_wrong_generator_is_told_apart(our_features, wrong):
    theirs = features(official_examples(500, seed=3, **wrong))
    p = p_values(our_features, theirs)
    assert min(p.values()) < 1e-4 / len(p), p


def test_lengths_reach_both_bounds(examples):
    lengths = [len(e.symbols) for e in examples]
    assert 500 < min(lengths) < 505
    assert 1980 < max(lengths) < 2000


def test_value_is_the_official_one(examples):
    for text, example in zip(official_texts(examples[:300]), examples, strict=False):
        assert listops.evaluate(example.symbols) == example.answer
        assert official_value(read_official(text)) == example.answer


@pytest.mark.parametrize(
    ("symbols", "value"),
    [
        ("7", 7),
        ("<4<92]]", 2),
        (">3+78]]", 5),
        ("=90]", 4),  # 4.5 is cut to 4
        ("=9012]", 1),
        ("=512]", 2),
        ("+999]", 7),
    ],
)
def test_values_by_hand(symbols, value):
    assert listops.evaluate(symbols.encode()) == value


def test_levels_below_the_cut_are_constants():
    symbols = b"+1<55=77]]>22]+11]]"  # SM 1 (MIN 5 5 (MED 7 7)) (MAX 2 2) (SM 1 1)
    assert [listops.evaluate(symbols, k) for k in range(4)] == [4, 4, 9, 0]
    assert listops.evaluate(symbols) == 0


def test_raw_is_the_official_text():
    for tree in official_examples(20, seed=4):
        text = official_string(tree).encode()
        assert listops.encode(listops.decode(text, "raw"), "raw") == text


@pytest.mark.parametrize("encoding", listops.ENCODINGS)
def test_encodings_round_trip(examples, encoding):
    for symbols in [b"7", b">34]", *(e.symbols for e in examples[:200])]:
        assert listops.decode(listops.encode(symbols, encoding), encoding) == symbols


def test_encodings_by_hand():
    symbols = b">3+78]]"
    assert listops.encode(symbols, "symbol") == symbols
    assert listops.encode(symbols, "stripped") == b"[MAX 3 [SM 7 8 ] ]"
    assert listops.encode(symbols, "raw") == b"( ( ( [MAX 3 ) ( ( ( [SM 7 ) 8 ) ] ) ) ] )"


def test_examples_are_distinct(monkeypatch):
    monkeypatch.setattr(listops, "MIN_LENGTH", 0)  # single digits, so drawn again and again
    symbols = [e.symbols for e in ListOps(num_workers=1).generate(300)]
    assert len(symbols) == len(set(symbols)) == 300


def test_workers_do_not_change_the_examples(examples):
    assert list(ListOps(seed=1, num_workers=2).generate(700)) == examples[:700]
    assert list(ListOps(seed=2, num_workers=1).generate(50)) != examples[:50]


def test_ladder_has_the_published_rungs(examples):
    sample = [*examples, *ListOps(seed=5, num_workers=1).generate(2000)]
    for share, published in zip(listops.ladder(sample).values(), PUBLISHED_RUNGS, strict=True):
        # The published figures are shares of 2,000 examples too.
        deviation = (published * (1 - published) * (1 / len(sample) + 1 / 2000)) ** 0.5
        assert abs(share - published) < 2.5 * deviation


def test_ladder_rung():
    ladder = {"0": 0.363, "1": 0.59, "2": 0.739}
    place = "accuracy 41.2% stands between rung 0 (36.3%) and rung 1 (59.0%)"
    assert listops.ladder_rung(0.412, ladder) == place
    assert listops.ladder_rung(0.17, ladder).endswith("stands below rung 0 (36.3%)")
    assert listops.ladder_rung(0.8, ladder).endswith("stands at or above rung 2 (73.9%)")


@pytest.mark.parametrize("encoding", listops.ENCODINGS)
def test_build(tmp_path, encoding):
    path = str(tmp_path / "store")
    ListOps(seed=3, encoding=encoding, train=30, validation=10, test=20).build(path)
    store = ByteStore(path)
    assert store.classes == list("0123456789")
    drawn = ListOps(seed=3, num_workers=1).generate(60)
    for name, size in (("test", 20), ("validation", 10), ("train", 30)):
        split, expected = store.split(name), list(itertools.islice(drawn, size))
        symbols = [listops.decode(d.tobytes(), encoding) for d in split.read(range(len(split)))]
        assert symbols == [e.symbols for e in expected]
        np.testing.assert_array_equal(split.labels, [e.answer for e in expected])
        if name == "test":
            assert store.manifest["provenance"]["ladder"] == listops.ladder(expected)
    assert store.manifest["provenance"]["generator"]["operator_probability"] == 0.25
    assert store.manifest["provenance"]["generator"]["seed"] == 3


def test_impossible_requests_name_the_field():
    with pytest.raises(ConfigError, match=r"config.data.options.encoding is 'utf8'"):
        ListOps(encoding="utf8")
    with pytest.raises(ConfigError, match=r"config.data.options.validation is 0"):
        ListOps(validation=0)
    for function in (listops.encode, listops.decode):
        with pytest.raises(ConfigError, match="encoding is 'utf8'"):
            function(b"7", "utf8")


def test_the_report_of_a_run():
    ladder = {"0": 0.363, "1": 0.59}
    added, lines = ListOps().report({"accuracy": 0.412}, {"ladder": ladder})
    assert added == {"ladder": ladder}
    assert lines == [listops.ladder_rung(0.412, ladder)]
    assert ListOps().report({"accuracy": 0.412}, {}) == ({}, [])  # of several stores


def test_tfds_holds_the_same_examples(tmp_path):
    import tensorflow_datasets as tfds  # here: TensorFlow takes seconds to import

    from spectral_pod.data.tasks import listops_tfds

    config = next(c for c in listops_tfds.Listops.BUILDER_CONFIGS if c.name == "tiny")
    splits = tfds.load("listops/tiny", data_dir=str(tmp_path))
    for name, examples in config.task.splits().items():
        found = {(e["Source"], int(e["Target"])) for e in splits[name].as_numpy_iterator()}
        assert found == {(listops.encode(e.symbols, "raw"), e.answer) for e in examples}
