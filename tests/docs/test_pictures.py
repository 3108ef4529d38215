"""The picture of the architecture is what its script draws, is legible, and names what exists."""

import importlib.util
import itertools
import pathlib
import re
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "docs/pictures/architecture.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(file):
    """The texts with their places, and the shapes with their colours, whatever the formatting."""
    found = []
    for element in ElementTree.parse(file).iter():
        style = sorted(element.get("style", "").split("; "))
        if element.tag == f"{SVG}text":
            found.append((element.text, places(f"{element.get('x')} {element.get('y')}"), style))
        elif element.tag == f"{SVG}path":
            found.append(("", places(element.get("d")), style))
    return found


def places(text):
    return [round(float(number), 1) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_the_file_is_what_its_script_draws(script, tmp_path):
    script.write(tmp_path / "new.svg")
    assert drawn(tmp_path / "new.svg") == drawn(script.FILE)
    script.write(tmp_path / "again.svg")
    assert (tmp_path / "new.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_it_has_texts_on_an_opaque_light_ground(script):
    shapes = drawn(script.FILE)
    assert shapes[0] == ("", shapes[0][1], ["fill: #ffffff"])
    width, height = max(shapes[0][1][0::2]), max(shapes[0][1][1::2])
    root = ElementTree.parse(script.FILE).getroot()
    assert places(root.get("viewBox")) == [0, 0, width, height]
    assert len([text for text, *_ in shapes if text]) > 50
    assert not list(root.iter(f"{SVG}use")), "letters were drawn as shapes"


def test_texts_overlap_nothing_and_stay_in_their_boxes(script):
    with rc_context(script.STYLE):
        canvas = script.draw()
        renderer = FigureCanvasAgg(canvas.figure).get_renderer()
        dpi = canvas.figure.dpi

        def extent(text):
            corners = text.get_window_extent(renderer)
            return [x / dpi for x in (corners.x0, corners.y0, corners.x1, corners.y1)]

        texts = [(t, box) for box, held in canvas.boxes for t in held]
        texts += [(t, None) for t in canvas.notes]
        extents = [(t.get_text(), extent(t), box) for t, box in texts]
    for text, (left, low, right, high), box in extents:
        x, y, width, height = (
            (box.left + 0.03, box.top - box.height, box.width - 0.06, box.height)
            if box
            else (0, 0, script.WIDTH, script.HEIGHT)
        )
        assert x <= left < right <= x + width, text
        assert y <= low < high <= y + height, text
    for (one, a, _), (other, b, _) in itertools.combinations(extents, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 0.01 or b[3] <= a[1] + 0.01
        assert apart, f"{one!r} is on {other!r}"
    corners = [(b.left, b.left + b.width, b.top - b.height, b.top) for b, _ in canvas.boxes]
    for a, b in itertools.combinations(corners, 2):
        apart = a[1] < b[0] or b[1] < a[0] or a[3] < b[2] or b[3] < a[2]
        inside = (a[0] < b[0] and b[1] < a[1]) or (b[0] < a[0] and a[1] < b[1])
        assert apart or inside, f"boxes overlap at {a} and {b}"


def test_it_names_files_that_exist(script):
    texts = " ".join(text for text, *_ in drawn(script.FILE) if text)
    names = re.findall(r"[\w/]+(?:\.py|/)(?=[\s,:;)]|$)", texts)
    assert len(names) > 15
    for name in names:
        assert any((root / name).exists() for root in (ROOT, ROOT / "spectral_pod")), name
