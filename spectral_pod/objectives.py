"""What a model is asked: the layout of its labels, its loss, its metrics, and how they are told."""

from typing import ClassVar


class Objective:
    """One way of being right.

    Attributes:
      by_position: labels are [B, L], one for every position, rather than [B], one for every row.
    """

    by_position: ClassVar[bool]
    name: ClassVar[str]  # interim: what train code compares until it asks the class


class Classification(Objective):
    """One label a record."""

    name = "class"
    by_position = False


class LabelledPositions(Objective):
    """Labels at some of the positions of an example."""

    name = "positions"
    by_position = True


class NextByte(LabelledPositions):
    """The byte that follows, everywhere in a stream of documents."""

    name = "next"
