"""Draws docs/pictures/architecture.svg.

    python docs/pictures/architecture.py

Text stays text, the background is opaque, so that it is legible on dark pages too, and the same
version of matplotlib writes the same bytes. `tests/docs/test_pictures.py` draws it again.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILE = pathlib.Path(__file__).with_suffix(".svg")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spectral_pod",
    "font.family": ["DejaVu Sans", "sans-serif"],
}

WIDTH, HEIGHT = 10.0, 11.6  # inches, the unit of all coordinates
CHAIN_WIDTH, CHAIN_HEIGHT, CHAIN_GAP = 1.72, 1.02, 0.275  # five boxes in a row
INK, QUIET = "#1f2328", "#57606a"
DATA, COMPUTE, FILES, TEXT, PLAIN = "#dbeafe", "#fde8c8", "#dcf2dc", "#eadcf7", "#eceff2"
Point = tuple[float, float]


class Box(NamedTuple):
    """A box by its left and upper edge; the first of its lines is its title."""

    left: float
    top: float
    width: float
    height: float
    lines: tuple[str, ...]

    def at(self, side: str, share: float = 0.5) -> Point:
        """The point of an edge ("left", "right", "top", "bottom"), from its left or upper end."""
        across, down = self.left + share * self.width, self.top - share * self.height
        return {
            "left": (self.left, down),
            "right": (self.left + self.width, down),
            "top": (across, self.top),
            "bottom": (across, self.top - self.height),
        }[side]


class Canvas:
    """A figure whose coordinates are inches from its lower left corner.

    Attributes:
      boxes: those that were drawn, each with its texts.
      notes: the texts outside of boxes.
    """

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.set_axis_off()
        self.boxes: list[tuple[Box, list[Any]]] = []
        self.notes: list[Any] = []

    def box(
        self, left: float, top: float, width: float, height: float, colour: str, *lines: str
    ) -> Box:
        """Draws a box with a title and lines of text, of which names of files are grey."""
        box = Box(left, top, width, height, lines)
        self.axes.add_patch(
            FancyBboxPatch(
                (left, top - height), width, height, boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=colour, edgecolor=QUIET, linewidth=0.9,
            )
        )  # fmt: skip
        x, y = left + width / 2, top - (height - 0.16 * (len(lines) - 1)) / 2
        texts = []
        for number, line in enumerate(lines):
            style: dict[str, Any] = {"ha": "center", "va": "center"}
            if number:
                style |= {"fontsize": 8.5, "color": QUIET if line.endswith((".py", "/")) else INK}
            else:
                style |= {"fontsize": 9.5, "color": INK, "weight": "bold"}
            below = 0.16 * number + (0.02 if number else -0.02) * (len(lines) > 1)
            texts.append(self.axes.text(x, y - below, line, **style))
        self.boxes.append((box, texts))
        return box

    def chain(self, top: float, parts: Sequence[tuple[str, ...]]) -> list[Box]:
        """Five boxes of equal sizes side by side; each part is a colour, a title and lines."""
        return [
            self.box(0.15 + i * (CHAIN_WIDTH + CHAIN_GAP), top, CHAIN_WIDTH, CHAIN_HEIGHT, *part)
            for i, part in enumerate(parts)
        ]

    def arrow(self, start: Point, end: Point, heads: str = "->") -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle=f"{heads},head_length=4,head_width=2.4",
                shrinkA=1, shrinkB=1, color=INK, linewidth=1.2,
            )
        )  # fmt: skip

    def note(self, x: float, y: float, text: str, **style: Any) -> None:
        look: dict[str, Any] = {"color": QUIET, "fontsize": 8.5, "va": "center"}
        self.notes.append(self.axes.text(x, y, text, **(look | style)))

    def heading(self, y: float, text: str, more: str) -> None:
        self.note(0.15, y, text, color=INK, fontsize=12, weight="bold")
        self.note(0.15, y - 0.23, more)


def draw_batch(canvas: Canvas, top: float) -> None:
    """From records to a training step, and what comes out of it."""
    canvas.heading(
        top, "A batch", "In training: B rows of L bytes, of which a process reads its own b."
    )
    boxes = canvas.chain(
        top - 0.44,
        [
            (DATA, "Records", "files on disk, on gs://,", "TFDS, or generated",
             "data/formats.py", "data/tasks/"),
            (DATA, "Byte store", "zarr3 with checksums,", "manifest last",
             "data/byte_store.py", "data/zarr_arrays.py"),
            (DATA, "Batches", "a function of", "(seed, step): no state",
             "data/pipeline.py", "data/windows.py"),
            (DATA, "Rows of a process", "[b, L], its own only,", "read ahead by threads",
             "data/pipeline.py", "data/drawn.py"),
            (DATA, "Global array", "[B, L], rows over", "mesh axes data, fsdp",
             "parallel/mesh.py", "parallel/sharding.py"),
        ],
    )  # fmt: skip
    for one, other in itertools.pairwise(boxes):
        canvas.arrow(one.at("right"), other.at("left"))

    left, below = 2.95, top - 0.44 - CHAIN_HEIGHT - 0.42
    step = canvas.box(left, below, WIDTH - 0.15 - left, 2.06, "#fdf4e3")
    enters = boxes[4].at("bottom")
    canvas.arrow(enters, (enters[0], below))
    left, room = left + 0.14, step.width - 0.28
    canvas.note(
        left, below - 0.2, "The step, jitted once with shardings",
        color=INK, fontsize=9.5, weight="bold",
    )  # fmt: skip
    canvas.note(
        left,
        below - 0.38,
        "train/step.py: a pure function of TrainState and batch; donates the state",
    )
    width = (room - 3 * 0.24) / 4
    parts = [
        canvas.box(left + i * (width + 0.24), below - 0.54, width, 0.84, COMPUTE, *lines)
        for i, lines in enumerate((
            ("Encoder", "bytes to patches or", "embeddings", "layers/patching.py"),
            ("Blocks", "norm, mixer, norm,", "channel mixer", "layers/block.py"),
            ("Loss", "pooling or head,", "objective", "objectives.py"),
            ("Update", "gradients by group,", "optax", "train/optim.py"),
        ))
    ]  # fmt: skip
    for one, other in itertools.pairwise(parts):
        canvas.arrow(one.at("right"), other.at("left"))
    rule = "ops/ under shard_op: every FFT, kernel and branch on data"
    ops = canvas.box(left, below - 1.64, room, 0.28, "#ffffff", rule)
    for part in parts[:3]:
        canvas.arrow(part.at("bottom"), (part.at("bottom")[0], ops.top), heads="<->")

    metrics = canvas.box(
        0.15, below, 2.2, 0.94, FILES,
        "Metrics", "read one step late", "train/progress.py", "train/writers.py",
    )  # fmt: skip
    saved = canvas.box(
        0.15, below - 1.12, 2.2, 0.94, FILES,
        "Checkpoint", "TrainState, sealed by sha256,", "restored on any mesh",
        "train/checkpoint.py",
    )  # fmt: skip
    canvas.arrow((step.left, metrics.at("right")[1]), metrics.at("right"))
    canvas.arrow((step.left, saved.at("right")[1]), saved.at("right"), heads="<->")


def draw_prompt(canvas: Canvas, top: float) -> None:
    """From a prompt to text."""
    canvas.heading(top, "A prompt", "In decoding, exact: each logit is that of the whole sequence.")
    boxes = canvas.chain(
        top - 0.44,
        [
            (TEXT, "Prompts", "bytes, left-padded", "to one length", "generate/decode.py"),
            (COMPUTE, "Prefill", "all positions in", "one pass", "models/causal_model.py"),
            (COMPUTE, "Decode state", "typed, of every mixer,", "and sums of the tiles",
             "layers/mixer.py", "generate/decode.py"),
            (COMPUTE, "Block of 32 bytes", "one program: read,", "sample, read, ...",
             "generate/decode.py", "generate/sampling.py"),
            (TEXT, "Text", "stop strings, valid", "UTF-8 piece by piece", "generate/text.py"),
        ],
    )  # fmt: skip
    _, _, state, block, _ = boxes
    for one, other in itertools.pairwise(boxes):
        heads = "<->" if one is state else "->"
        canvas.arrow(one.at("right"), other.at("left"), heads)
    tiles = canvas.box(
        state.left, top - 0.44 - CHAIN_HEIGHT - 0.36, 2 * CHAIN_WIDTH + CHAIN_GAP, 0.66, COMPUTE,
        "Tiles of long convolutions", "one small program a size, every 32 positions",
        "ops/online_conv.py",
    )  # fmt: skip
    canvas.arrow(block.at("bottom"), (block.at("bottom")[0], tiles.top))
    canvas.arrow((state.at("bottom")[0], tiles.top), state.at("bottom"))


def draw_code(canvas: Canvas, top: float) -> None:
    """Which part imports which."""
    canvas.heading(top, "The code", "Arrows lead to what imports; not all are drawn.")
    width, gap, height = 1.2, 0.217, 0.66
    rows = [top - 0.46 - 0.88 * row for row in range(4)]

    def box(column: int, row: int, colour: str, title: str, *lines: str, tall: bool = False) -> Box:
        left, size = 0.15 + column * (width + gap), height + 0.88 * tall
        return canvas.box(left, rows[row], width, size, colour, title, *lines)

    storage = box(0, 0, PLAIN, "storage", "project_files,", "lease")
    data = box(1, 0, DATA, "data", "stores, batches,", "tasks")
    config = box(3, 0, PLAIN, "config", "and validation")
    shapes = box(0, 1, PLAIN, "shapes", "fields, errors,", "seeds")
    ops = box(1, 1, COMPUTE, "ops", "mathematics", "of arrays")
    layers = box(2, 1, COMPUTE, "layers", "mixers, blocks")
    models = box(3, 1, COMPUTE, "models", "three, by name")
    step = box(4, 1, COMPUTE, "train.step", "objectives,", "optim, state")
    loop = box(5, 0, FILES, "train.loop", "trainer, sources,", "checkpoints,", "writers", tall=True)
    main = box(6, 1, PLAIN, "main", "flags, and the", "exit code")
    parallel = box(0, 2, PLAIN, "parallel", "mesh, sharding,", "runtime")
    generate = box(4, 2, TEXT, "generate", "decode, restore,", "export")
    analysis = box(4, 3, PLAIN, "analysis", "FLOPs, HLO,", "estimates")
    agent = box(5, 2, TEXT, "agent", "conversations,", "tools, retrieval")
    api = box(5, 3, TEXT, "api", "the same from", "Python")
    tools = box(6, 2, PLAIN, "tools", "a command each,", "thin over the", "package", tall=True)
    for one, other in (
        (storage, data), (data, config), (shapes, ops), (ops, layers), (layers, models),
        (models, step), (generate, agent), (analysis, api),
    ):  # fmt: skip
        canvas.arrow(one.at("right"), other.at("left"))
    across = (main.at("left")[1], config.at("right")[1])
    canvas.arrow(step.at("right"), (loop.left, across[0]))
    canvas.arrow((loop.left + width, across[0]), main.at("left"))
    canvas.arrow(config.at("right"), (loop.left, across[1]))
    canvas.arrow(layers.at("top", 0.7), config.at("left", 0.75))
    canvas.arrow(parallel.at("right", 0.3), ops.at("bottom", 0.3))
    canvas.arrow(models.at("bottom", 0.75), generate.at("left"))
    canvas.arrow(models.at("bottom", 0.4), analysis.at("left"))
    canvas.arrow(generate.at("bottom", 0.8), api.at("left", 0.2))
    for one in (agent, api):
        canvas.arrow(one.at("right"), (tools.left, one.at("right")[1]))
    for line, text in enumerate(
        ("Here orange is pure: it knows neither files,", "flags, logging nor TensorFlow.",
         "tests/test_imports.py has every rule.")
    ):  # fmt: skip
        canvas.note(0.15 + width + gap, rows[3] - 0.14 - 0.17 * line, text)


def draw() -> Canvas:
    """The whole picture."""
    canvas = Canvas()
    draw_batch(canvas, HEIGHT - 0.3)
    draw_prompt(canvas, HEIGHT - 4.75)
    draw_code(canvas, HEIGHT - 7.65)
    return canvas


def write(file: pathlib.Path) -> None:
    """Writes an SVG file, without the date and the version of matplotlib."""
    with rc_context(STYLE):
        draw().figure.savefig(file, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    write(FILE)
