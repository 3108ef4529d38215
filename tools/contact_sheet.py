"""Draws a sheet of Pathfinder (32 pixels, enlarged) and Path-X (128 pixels) images as a PNG.

    python -m tools.contact_sheet --output=docs/pathfinder.png

Rows from the top: Pathfinder, connected and separate; Path-X, connected and separate.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

import numpy as np

from spectral_pod.data.tasks import pathfinder
from spectral_pod.fields import NonNegative, Positive

from . import shell

_CELL, _GAP = max(pathfinder.PARAMETERS), 4  # pixels


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("contact_sheet", __doc__)
    parser.add_output("--output", "the PNG to write", required=True)
    parser.add_value("--columns", Positive, 8, "images in a row (8)")
    parser.add_value("--seed", NonNegative, 0, "of the generator (0)")
    return shell.run(parser, draw, argv)


def draw(arguments: argparse.Namespace) -> None:
    from PIL import Image

    rows = [
        row(size, label, arguments.columns, arguments.seed)
        for size in pathfinder.PARAMETERS
        for label in (1, 0)
    ]
    Image.fromarray(np.concatenate(rows)[:-_GAP, :-_GAP]).save(
        arguments.output, format="PNG", optimize=True
    )


def row(size: int, label: int, columns: int, seed: int) -> np.ndarray:
    """uint8 [height, width]: the first images of a label, side by side."""
    task = pathfinder.Pathfinder.from_options({"size": size, "seed": seed, "num_workers": 1})
    images = task.generate(2**31)
    chosen = (example.image for example in images if example.label == label)
    cells = []
    for image in itertools.islice(chosen, columns):
        enlarged = image.repeat(_CELL // size, 0).repeat(_CELL // size, 1)
        cells.append(np.pad(enlarged, (0, _GAP), constant_values=96))
    return np.concatenate(cells, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
