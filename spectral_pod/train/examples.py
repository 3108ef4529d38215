"""A sheet of pictures with their true and predicted classes, for TensorBoard."""

from collections.abc import Sequence

import numpy as np

_CELL, _GAP = 128, 8  # pixels; pictures are enlarged to at most a cell
_LINE = 14  # pixels, of a line of text
_LETTERS = 22  # of a line, that a cell has room for
_COLUMNS = 8
_PAPER, _INK = (255, 255, 255), (0, 0, 0)
_RIGHT, _WRONG = (0, 128, 0), (192, 0, 0)


def sheet(
    pictures: Sequence[np.ndarray], labels: Sequence[int], predicted: Sequence[int],
    classes: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """Pictures in rows, each with its class and the predicted one, green if right and else red.

    Args:
      pictures: uint8 [height, width] of equal shapes.
      labels, predicted: the class of each.
      classes: their names.

    Returns:
      uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw

    height, width = pictures[0].shape
    scale = max(1, _CELL // max(height, width))
    across, down = max(_CELL, width * scale) + _GAP, height * scale + 2 * _LINE + _GAP
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.fontmode = "1"  # sharp, and a smaller file
    for i, picture in enumerate(pictures):
        left, top = _GAP + i % columns * across, _GAP + i // columns * down
        page.paste(Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1)), (left, top))
        right = labels[i] == predicted[i]
        below = top + height * scale
        draw.text((left, below), _shown(classes[labels[i]]), _INK)
        text = "predicted" if right else f"taken for {classes[predicted[i]]}"
        draw.text((left, below + _LINE), _shown(text), _RIGHT if right else _WRONG)
    return np.asarray(page)


def _shown(text: str) -> str:
    """The start of a text, in letters that every font has."""
    return text.encode("ascii", "replace").decode()[:_LETTERS]
