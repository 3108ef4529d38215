"""The DNA task; shuffles are compared with a list of all sequences that have the same counts."""

import collections
import gzip
import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import dna
from spectral_pod.errors import ConfigError, DataError

LAMBDA = pathlib.Path(__file__).parents[3] / "shared/data/lambda_virus.fa"
SIZES = {"train": 400, "validation": 200, "test": 200}
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}


def counts(sequence, k):
    return collections.Counter(sequence[i : i + k] for i in range(len(sequence) - k + 1))


def alike(sequence, k):
    """All sequences with the same counts and ends, from all permutations of the letters."""
    m = k - 1
    orders = {bytes(order) for order in itertools.permutations(sequence)}
    return {
        order
        for order in orders
        if counts(order, k) == counts(sequence, k)
        and order[:m] == sequence[:m]
        and order[len(order) - m :] == sequence[len(sequence) - m :]
    }


@settings(deadline=None)
@given(st.text("ACGT", min_size=1, max_size=200), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_shuffle_keeps_every_count(text, k, seed):
    sequence = text.encode()
    assume(k <= len(sequence))
    other = dna.shuffled(sequence, k, np.random.default_rng(seed))
    for length in range(1, k + 1):
        assert counts(other, length) == counts(sequence, length)
    assert other[: k - 1] == sequence[: k - 1]
    assert other[len(other) - k + 1 :] == sequence[len(sequence) - k + 1 :]


@pytest.mark.parametrize(
    ("sequence", "k"),
    [(b"ACCAGTAC", 1), (b"ACAGATCA", 2), (b"AACATGACA", 2), (b"CACAACAAC", 3)],
)
def test_a_shuffle_is_uniform(sequence, k):
    rng, expected = np.random.default_rng(0), alike(sequence, k)
    draws = 60 * len(expected)
    drawn = collections.Counter(dna.shuffled(sequence, k, rng) for _ in range(draws))
    assert drawn.keys() == expected
    assert len(expected) > 2
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


# ---- the store


def genome(rng, *lengths):
    return ["".join(rng.choice(list("ACGT"), length)) for length in lengths]


def write_fasta(path, sequences):
    lines = [f">seq{i} text\n" + "\n".join(s[j : j + 60] for j in range(0, len(s), 60))
             for i, s in enumerate(sequences)]  # fmt: skip
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def build(source, path, **options):
    dna.Dna(source=str(source), **(SIZES | {"window": 40} | options)).build(str(path))
    store = ByteStore(str(path))
    return store, {split: read(store, split) for split in dna.SPLITS}


def read(store, name):
    split = store.split(name)
    data = split.read(np.arange(len(split)))
    return [(x.tobytes(), store.classes[k]) for x, k in zip(data, split.labels, strict=True)]


def reverse_complement(sequence):
    return "".join(COMPLEMENT[letter] for letter in reversed(sequence))


def test_splits_share_no_base(tmp_path):
    sequences = genome(np.random.default_rng(0), 1900, 30, 3007)
    source = write_fasta(tmp_path / "genome.fa.gz", sequences)
    _, splits = build(source, tmp_path / "store")
    places = collections.defaultdict(list)
    for split, records in splits.items():
        assert len(records) == SIZES[split]
        strands = collections.Counter()
        for (real, is_real), (other, is_shuffled) in zip(records[::2], records[1::2], strict=True):
            assert (is_real, is_shuffled) == ("real", "shuffled")
            assert counts(real, 2) == counts(other, 2)
            assert other != real
            forward = real.decode()
            strand = not any(forward in sequence for sequence in sequences)
            window = reverse_complement(forward) if strand else forward
            ((i, start),) = [(i, s.find(window)) for i, s in enumerate(sequences) if window in s]
            places[split].append((strand, i, start))
            strands[strand] += 1
        assert min(strands.values()) >= 0.2 * len(records) / 2
        assert len(set(places[split])) == len(records) / 2
    bases = {
        split: {(i, base) for _, i, start in held for base in range(start, start + 40)}
        for split, held in places.items()
    }
    for one, other in itertools.combinations(dna.SPLITS, 2):
        assert not bases[one] & bases[other]
    assert {i for i, _ in bases["train"]} == {0, 2}  # the second sequence is shorter than a window


def test_the_same_seed_is_the_same_store(tmp_path):
    source = write_fasta(tmp_path / "genome.fa", genome(np.random.default_rng(1), 4000))
    stores = [build(source, tmp_path / f"{i}", seed=seed)[0] for i, seed in enumerate((3, 3, 4))]
    assert stores[0].digest == stores[1].digest != stores[2].digest
    assert stores[0].manifest["splits"] != stores[2].manifest["splits"]


def test_letters(tmp_path):
    """Case is ignored and U counts as T; windows with ambiguous letters or a single letter are left
    out."""
    (sequence,) = genome(np.random.default_rng(2), 8000)
    plain = build(write_fasta(tmp_path / "plain.fa", [sequence]), tmp_path / "plain")[1]
    spelt = sequence.replace("T", "u").replace("C", "c")
    assert build(write_fasta(tmp_path / "spelt.fa", [spelt]), tmp_path / "spelt")[1] == plain
    mixed = sequence[:3000] + "N" * 50 + "A" * 2000 + "r" + sequence[3000:]
    for records in build(write_fasta(tmp_path / "n.fa", [mixed]), tmp_path / "n")[1].values():
        for data, _ in records:
            assert set(data) <= set(b"ACGT")
            assert len(set(data)) > 1


def test_a_changed_file(tmp_path):
    source = write_fasta(tmp_path / "genome.fa", genome(np.random.default_rng(1), 4000))
    store, _ = build(source, tmp_path / "store")
    task = dna.Dna(source=str(source))
    task.check(store)
    write_fasta(source, genome(np.random.default_rng(2), 4000))
    with pytest.raises(DataError, match=r"genome\.fa' has changed"):
        task.check(store)
    source.unlink()
    task.check(store)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (">a\n" + "ACGT" * 600, {"train": 7}, ConfigError, "options.train is 7; half"),
        (">a\n" + "ACGT" * 600, {"test": 0}, ConfigError, "options.test is 0; half"),
        (">a\n" + "ACGT" * 600, {"k": 40}, ConfigError, "options.k is 40 and window 40"),
        (">a\n" + "ACGT" * 600, {"k": 0}, ConfigError, "options.k is 0 and window 40"),
        (">a\nACGT\n>b\nACXT\n", {}, DataError, r"genome.fa:3: sequence 'b' has the letter 'X'"),
        ("ACGT\n>b\nACGT\n", {}, DataError, r"genome.fa:1: no FASTA"),
        ("", {}, DataError, "genome.fa holds no sequences"),
        (">a\n" + "ACGT" * 80, {}, DataError, "genome.fa has 320 letters in 1 sequence"),
        (">a\n" + "ACGT" * 600, {"test": 5000}, DataError, "options.test is 5000, and .* for it"),
        (">a\n" + "N" * 4000, {}, DataError, "genome.fa has too few windows"),
        (">a\n" + "A" * 4000, {}, DataError, "genome.fa has too few windows"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, text, options, error, message):
    source = tmp_path / "genome.fa"
    source.write_text(text)
    with pytest.raises(error, match=message):
        build(source, tmp_path / "store", **options)


def test_a_source_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"options\.source is empty; name a FASTA file"):
        dna.Dna().build(str(tmp_path / "store"))
    with pytest.raises(DataError, match=r"missing\.fa cannot be opened"):
        dna.Dna(source=str(tmp_path / "missing.fa")).build(str(tmp_path / "store"))


@pytest.mark.skipif(not LAMBDA.exists(), reason=f"there is no {LAMBDA}")
def test_codons_tell_a_real_genome(tmp_path):
    """Real windows have more power at period 3, as genes fill most of a phage's genome."""
    _, splits = build(LAMBDA, tmp_path / "store", window=510, train=400, test=200)

    def share(data):
        letters = np.frombuffer(data, np.uint8)
        power = sum(np.abs(np.fft.rfft(letters == letter)) ** 2 for letter in b"ACGT")
        return power[170] / power[1:].mean()

    shares = {label: [share(data) for data, kind in splits["train"] if kind == label]
              for label in dna.CLASSES}  # fmt: skip
    assert stats.mannwhitneyu(shares["real"], shares["shuffled"]).pvalue < 1e-6
    assert np.median(shares["real"]) > 2 * np.median(shares["shuffled"])
