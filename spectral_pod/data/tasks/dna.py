"""DNA: is a window of a genome real, or shuffled so that every count of k letters is kept?

The genome is a FASTA file of yours. Real windows are cut from it, from either strand with
probability 1/2. To each belongs a shuffled one, drawn uniformly from all sequences with the same
number of every k letters in a row (Altschul and Erickson 1985) and the same first and last k - 1
letters. With the default k = 2 the bytes of a window and its pairs of neighbours are those of both
classes, and any rule that looks at nothing else is right for exactly half of the records. What
tells them apart is order beyond k letters: codons, whose letters come with period 3, repeats, and
long-range composition.

- Every sequence is cut into blocks as long as 4 windows; whole blocks, drawn by the seed, are
  for validation and testing, 3 in 20 each. No base is in two splits. Within a split windows
  overlap, but no two are at the same place of the same strand.
- Letters are those of IUPAC, upper or lower case; U counts as T. Windows with a letter for several
  bases (N, R, ...) are left out, and so are those whose letters have no other order.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spectral_pod.data import byte_store, formats, origin
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.task import StoredTask
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Positive
from spectral_pod.seeds import entropy
from spectral_pod.storage import Source

CLASSES = ("shuffled", "real")
SPLITS = ("train", "validation", "test")
_BLOCK_WINDOWS = 4
_HELD_OUT = 0.15  # of the blocks, for each of validation and test
_MAX_MISSES = 20  # unusable draws allowed for every record
_IUPAC = b"ACGTRYSWKMBDHVN"
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")
_U_TO_T = bytes.maketrans(b"U", b"T")


@dataclasses.dataclass(frozen=True)
class Dna(StoredTask):
    """Windows of a genome, half of them shuffled."""

    name = "dna"
    version = 2
    num_classes = len(CLASSES)

    seed: int = 0  # draws blocks, windows and shuffles
    source: Source = ""  # a FASTA file, on disk or gs://, which may be compressed
    window: Positive = 512  # letters in a record
    k: int = 2  # letters in a row whose counts a shuffle keeps; 1 keeps those of letters only
    train: int = 20_000  # records, half of them real; likewise validation and test
    validation: int = 1_000
    test: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k < self.window:
            raise ConfigError(
                f"config.data.options.k is {self.k} and window {self.window}; they need "
                "1 <= k < window"
            )
        for name, size in self._sizes.items():
            if size < 2 or size % 2:
                raise ConfigError(
                    f"config.data.options.{name} is {size}; half of the records are real, so it "
                    "must be even, and at least 2"
                )

    @property
    def _sizes(self) -> dict[str, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def build(self, path: str) -> None:
        """Writes the windows as a byte store.

        Raises:
          ConfigError: there is no `source`.
          DataError: the file is missing, damaged or no FASTA, has a sequence that is no DNA (names
            the record), or is too short for so many windows.
        """
        if not self.source:
            raise ConfigError(
                "config.data.options.source is empty; name a FASTA file, which may be compressed"
            )
        sequences = read_genome(self.source)
        blocks = self._blocks(sequences)
        for split, size in self._sizes.items():
            # Drawing distinct windows takes ever longer beyond every second one.
            count = _places(blocks[split], self.window)
            if size > count:
                raise DataError(
                    f"config.data.options.{split} is {size}, and {self.source} has {count} windows "
                    f"of {self.window} letters for it, both strands counted, of which every second "
                    "one may be drawn; ask for fewer records"
                )
        byte_store.write(
            path,
            {
                split: self._records(sequences, blocks[split], size, [entropy(self.seed), number])
                for number, (split, size) in enumerate(self._sizes.items())
            },
            classes=CLASSES,
            provenance={
                "task": "dna",
                "seed": self.seed,
                "source": self.source,
                "file": origin.describe(formats.files(self.source)),
                "window": self.window,
                "k": self.k,
                "sequences": len(sequences),
                "bases": sum(map(len, sequences)),
                "bases_in_split": {
                    split: sum(b.stop - b.start for b in blocks[split]) for split in SPLITS
                },
            },
        )

    def check(self, store: byte_store.ByteStore) -> None:
        """Compares the file with what the store was written from, where it is still on this host.

        Raises:
          DataError: it has changed since.
        """
        described = store.manifest["provenance"]["file"]
        option = f"config.data.options.source = {self.source!r}"
        origin.check(origin.on_this_host(self.source), described, option, store.path)

    def _blocks(self, sequences: Sequence[bytes]) -> dict[str, list["_Block"]]:
        """The blocks of all sequences by split; the last one of a sequence takes what remains."""
        length = _BLOCK_WINDOWS * self.window
        blocks = []
        for number, sequence in enumerate(sequences):
            starts = list(range(0, max(1, len(sequence) // length) * length, length))
            ends = zip(starts, [*starts[1:], len(sequence)])
            blocks += [_Block(number, i, j) for i, j in ends if j - i >= self.window]
        if len(blocks) < len(SPLITS):
            raise DataError(
                f"{self.source} has {sum(map(len, sequences))} letters in {len(sequences)} "
                f"sequence(s); each of the three splits needs a block of {length} letters, "
                f"{_BLOCK_WINDOWS} windows"
            )
        held_out = max(1, round(_HELD_OUT * len(blocks)))
        order = np.random.default_rng([entropy(self.seed), len(SPLITS)]).permutation(len(blocks))
        shuffled_blocks = [blocks[i] for i in order]
        return {
            "train": shuffled_blocks[2 * held_out :],
            "validation": shuffled_blocks[:held_out],
            "test": shuffled_blocks[held_out : 2 * held_out],
        }

    def _records(
        self,
        sequences: Sequence[bytes],
        blocks: Sequence["_Block"],
        size: int,
        seed: Sequence[int],
    ) -> Iterator[byte_store.Record]:
        """Real windows, each followed by its shuffled form."""
        rng = np.random.default_rng(seed)
        bounds = np.cumsum([0] + [block.stop - block.start - self.window + 1 for block in blocks])
        drawn: set[int] = set()
        progress = Progress("Cutting and shuffling windows", size, "records")
        misses = 0
        while len(drawn) < size // 2:
            place = int(rng.integers(2 * bounds[-1]))
            position, reverse = divmod(place, 2)
            index = int(np.searchsorted(bounds, position, side="right")) - 1
            block = blocks[index]
            start = block.start + position - int(bounds[index])
            real = sequences[block.sequence][start : start + self.window]
            if reverse:
                real = real.translate(_COMPLEMENT)[::-1]
            other = shuffled(real, self.k, rng)
            if place in drawn or real.translate(None, b"ACGT") or other == real:
                misses += 1
                if misses > _MAX_MISSES * size:
                    raise DataError(
                        f"{self.source} has too few windows of {self.window} letters for {size} "
                        "records that are A, C, G and T alone and have another order with the same "
                        f"counts of {self.k} letters; ask for fewer records, or a smaller k"
                    )
                continue
            drawn.add(place)
            yield byte_store.Record(real, CLASSES.index("real"))
            yield byte_store.Record(other, CLASSES.index("shuffled"))
            progress.add(2)
        progress.end()


def read_genome(source: str) -> list[bytes]:
    """The sequences of a FASTA file, upper case, with T for U.

    Raises:
      DataError: the file is missing, damaged or no FASTA, or a sequence is no DNA.
    """
    sequences = []
    for row in formats.rows(source, format="fasta"):
        if isinstance(row, formats.Fault):
            raise DataError(f"{row.place}: {row.reason}")
        sequence = row.fields["sequence"].upper().translate(_U_TO_T)
        foreign = sequence.translate(None, _IUPAC)
        if foreign:
            raise DataError(
                f"{row.place}: sequence {row.fields['id'].decode(errors='backslashreplace')!r} has "
                f"the letter {chr(foreign[0])!r}, which stands for no nucleotide (IUPAC)"
            )
        sequences.append(sequence)
    if not sequences:
        raise DataError(f"{source} holds no sequences; a FASTA record starts with '>'")
    return sequences


def shuffled(sequence: bytes, k: int, rng: np.random.Generator) -> bytes:
    """A sequence drawn uniformly from those with the same number of every k letters in a row.

    Its first and last k - 1 letters are those of `sequence`, too. k = 1 permutes the letters.

    Altschul and Erickson (1985), Mol. Biol. Evol. 2:526: a sequence is a walk from one run of
    k - 1 letters to the next, and the walks that use the same steps are Eulerian. Which step is
    the last to leave a run makes a tree that leads to where the walk ends; any such tree, with any
    order of the other steps, is one walk. The tree is drawn by Wilson's loop-erased walks (1996),
    uniformly, where the paper draws last steps until they happen to be a tree.
    """
    m = k - 1
    if m == 0:
        return rng.permutation(np.frombuffer(sequence, np.uint8)).tobytes()
    steps: dict[bytes, list[bytes]] = defaultdict(list)
    for i in range(len(sequence) - m):
        steps[sequence[i : i + m]].append(sequence[i + 1 : i + k])
    end = sequence[len(sequence) - m :]

    last: dict[bytes, int] = {}  # index of the step that leaves a run for the last time
    settled = {end}
    for start in list(steps):
        run = start
        while run not in settled:
            last[run] = int(rng.random() * len(steps[run]))  # overwritten when a loop comes back
            run = steps[run][last[run]]
        run = start
        while run not in settled:
            settled.add(run)
            run = steps[run][last[run]]

    for run, targets in steps.items():
        final = [targets.pop(last[run])] if run != end else []
        order = rng.permutation(len(targets))
        steps[run] = final + [targets[i] for i in order]  # taken from the end: `final` is last
    run = sequence[:m]
    letters = bytearray(run)
    while steps.get(run):
        run = steps[run].pop()
        letters.append(run[-1])
    return bytes(letters)


class _Block(NamedTuple):
    """Letters `start` to `stop` of a sequence."""

    sequence: int
    start: int
    stop: int


def _places(blocks: Sequence[_Block], window: int) -> int:
    """Windows of both strands that blocks hold."""
    return 2 * sum(block.stop - block.start - window + 1 for block in blocks)
