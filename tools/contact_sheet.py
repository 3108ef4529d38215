"""Writes a sheet of Pathfinder (32 pixels, enlarged) and Path-X (128 pixels) images as a PNG.

    python -m tools.contact_sheet --output=docs/pathfinder.png

Rows from the top: Pathfinder, connected and separate; Path-X, connected and separate.
"""

import itertools

import numpy as np
from absl import flags
from PIL import Image

from spectral_pod.data.tasks import pathfinder
from tools import entry

_OUTPUT = flags.DEFINE_string("output", None, "The PNG to write.")
_COLUMNS = flags.DEFINE_integer("columns", 8, "Images in a row.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the generator.")
flags.mark_flags_as_required(["output"])

_CELL, _GAP = max(pathfinder.PARAMETERS), 4  # pixels


def main() -> None:
    rows = [row(size, label) for size in pathfinder.PARAMETERS for label in (1, 0)]
    Image.fromarray(np.concatenate(rows)[:-_GAP, :-_GAP]).save(_OUTPUT.value or "", optimize=True)


def row(size: int, label: int) -> np.ndarray:
    """uint8 [height, width]: the first images of a label, side by side."""
    task = pathfinder.Pathfinder.from_options({"size": size, "seed": _SEED.value, "num_workers": 1})
    images = task.generate(2**31)
    chosen = (example.image for example in images if example.label == label)
    cells = []
    for image in itertools.islice(chosen, _COLUMNS.value):
        enlarged = image.repeat(_CELL // size, 0).repeat(_CELL // size, 1)
        cells.append(np.pad(enlarged, (0, _GAP), constant_values=96))
    return np.concatenate(cells, 1)


if __name__ == "__main__":
    entry.run(main)
