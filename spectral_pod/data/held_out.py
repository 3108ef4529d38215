"""Which documents, and which bytes of long ones, are held out of training for evaluation.

Shares are of bytes, in twentieths. A document that is longer than a twentieth of all bytes is cut:
its first bytes are for training, the next for validation, the last for testing. The others are
whole, in the order of their keys: the first twentieth of their bytes is for validation, the second
for testing. Documents of one key, such as copies, are in one split.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

_TRAIN, _CUT = 0, -1
_WHOLE = 20  # twentieths


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The splits of documents.

    Attributes:
      sizes: bytes of every document, int64 [n].
      shares: of the bytes, in twentieths, by the names of the splits that are held out.
      places: int8 [n]; 0 is training, i the i-th split that is held out, -1 a document that is cut.
    """

    sizes: np.ndarray
    shares: dict[str, int]
    places: np.ndarray

    def pieces(self, index: int) -> list[tuple[str, int, int]]:
        """The split, the first byte and the end of each piece of a document; none is empty."""
        size, place = int(self.sizes[index]), self.places[index]
        if place != _CUT:
            return [(("train", *self.shares)[place], 0, size)]
        twentieths = np.cumsum([_WHOLE - sum(self.shares.values()), *self.shares.values()])
        stops = (size * twentieths // _WHOLE).tolist()
        cut = zip(("train", *self.shares), [0, *stops], stops)
        return [(split, start, stop) for split, start, stop in cut if start < stop]


def hold_out(sizes: np.ndarray, keys: np.ndarray, splits: Sequence[str]) -> HeldOut:
    """Holds documents out of training.

    Args:
      sizes: bytes of every document, int64 [n].
      keys: uint64 [n], hashes that decide the order of the documents.
      splits: the names of the splits to hold out; of a single document only the first, with a tenth
        of the bytes, as nanoGPT splits tiny Shakespeare.
    """
    shares = {splits[0]: 2} if len(sizes) == 1 else dict.fromkeys(splits, 1)
    places = np.full(len(sizes), _TRAIN, np.int8)
    is_long = sizes * _WHOLE > sizes.sum()
    places[is_long] = _CUT

    (whole,) = np.nonzero(~is_long)
    _, unit_of = np.unique(keys[whole], return_inverse=True)  # units in the order of their keys
    units = np.bincount(unit_of, sizes[whole]).astype(np.int64)
    units_place = np.full(len(units), _TRAIN, np.int8)
    (short,) = np.nonzero(units * _WHOLE <= sizes.sum())  # many copies of one stay in training
    ends = np.cumsum(units[short])
    total = ends[-1] if len(ends) else 0
    middles = (2 * ends - units[short]) * _WHOLE  # in fortieths: all are integers
    bounds = 2 * total * np.cumsum([*shares.values()])
    nth = np.searchsorted(bounds, middles, side="right") + 1
    units_place[short] = np.where(nth <= len(shares), nth, _TRAIN)
    places[whole] = units_place[unit_of]
    return HeldOut(sizes, shares, places)
