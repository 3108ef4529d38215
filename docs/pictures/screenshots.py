"""Makes the pictures of what a user sees: {tensorboard,status,preflight,xprof,site}.png beside it.

In a folder of its own, so that only its relative paths are in the pictures, with the repository in
PYTHONPATH:

    python -m spectral_pod.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spectral_pod.main --config=configs/quickstart.py --workdir=runs/traced \
        --config.train.total_steps=20 --config.train.profile_steps="(10, 12)"
    python REPOSITORY/docs/pictures/screenshots.py              # all; or by name: status xprof

It needs `pip install playwright` with a Chromium, which `playwright install chromium` downloads or
which --browser names; xprof also `pip install xprof`; and site a site: `python -m mkdocs build`.
Preflight compiles for some minutes.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import io
import os
import pathlib
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

FOLDER = pathlib.Path(__file__).parent
SITE = FOLDER.parents[1] / "dist/site/index.html"
COLUMNS = 112
WIDTH, HEIGHT = 1250, 860  # of a browser's window
PREFLIGHT = (
    "tools.preflight --config=configs/lra_listops.py --topology=v4-128 --quick "
    "--config.train.global_batch_size=512"
)
# Lines are as high as their characters, so that boxes and curves have no gaps.
TERMINAL = """<body style="margin: 0"><pre style="display: inline-block; margin: 0;
padding: 14px 18px; font: 14px/1.164 'DejaVu Sans Mono', monospace">{code}</pre></body>"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--browser", help="a Chromium's program; by default Playwright's own")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PICTURES):
        parser.error(f"there is no picture {sorted(unknown)[0]!r}; there are {', '.join(PICTURES)}")
    with browser(arguments.browser) as chromium:
        for name in arguments.names or PICTURES:
            page = chromium.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
            )
            save(PICTURES[name](page), FOLDER / f"{name}.png")
            page.close()


@contextlib.contextmanager
def browser(program: str | None) -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        sys.exit("Pictures need Playwright: pip install playwright")
    with sync_playwright() as playwright:
        try:
            # The sandbox needs privileges that containers lack. All pages are of this machine.
            chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except Error as error:
            sys.exit(
                f"No Chromium starts: playwright install chromium, or --browser=PROGRAM\n{error}"
            )
        yield chromium
        chromium.close()


def save(png: bytes, file: pathlib.Path) -> None:
    """With a palette of 256 colours, which takes a third of the space."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(file, optimize=True)
    print(f"{file.name}: {image.width} x {image.height}, {file.stat().st_size:,} bytes")


def status(page: Any) -> bytes:
    return terminal(page, "tools.status runs/quickstart")


def preflight(page: Any) -> bytes:
    return terminal(page, PREFLIGHT)


def terminal(page: Any, command: str) -> bytes:
    """A terminal in which a tool has run."""
    colours = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    shown = command.replace(" --", " \\\n    --") if len(command) > COLUMNS - 15 else command
    colours.print(Text(f"$ python -m {shown}", style="bold"))
    colours.print(Text.from_ansi(output(command)), soft_wrap=True)
    code = colours.export_html(
        theme=DEFAULT_TERMINAL_THEME, inline_styles=True, code_format="{code}"
    )
    page.set_content(TERMINAL.format(code=code))
    return page.locator("pre").screenshot()


def output(command: str) -> str:
    """What a tool writes on a terminal's stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", *shlex.split(command)], stdout=theirs)
    os.close(theirs)
    pieces = []
    with contextlib.suppress(OSError):  # EIO, when the process has closed its end
        while piece := os.read(ours, 1 << 16):
            pieces.append(piece)
    os.close(ours)
    if process.wait():
        sys.exit(f"{command} ended with exit code {process.returncode}; see above")
    return b"".join(pieces).decode().replace("\r\n", "\n").rstrip()


@contextlib.contextmanager
def tensorboard_of(logdir: str) -> Iterator[str]:
    """The URL of a TensorBoard."""
    if not pathlib.Path(logdir).is_dir():
        sys.exit(f"{logdir} does not exist: train first, as --help says")
    command = [sys.executable, "-m", "tensorboard.main", "--port=0", f"--logdir={logdir}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:  # type: ignore[union-attr]
            said.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            sys.exit(f"TensorBoard does not start:\n{''.join(said)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def tensorboard(page: Any) -> bytes:
    with tensorboard_of("runs/quickstart") as url:
        page.goto(f"{url}#timeseries")
        page.wait_for_selector("scalar-card line-chart", timeout=60_000)
        page.get_by_role("button", name="Settings").first.click()  # closes their column
        page.wait_for_timeout(5_000)  # until the curves are drawn
        return page.screenshot()


def xprof(page: Any) -> bytes:
    """The trace of some steps, from a copy whose file does not name the host."""
    if not importlib.util.find_spec("xprof"):
        sys.exit("TensorBoard shows no traces: pip install xprof")
    traces = sorted(pathlib.Path("runs/traced/plugins/profile").glob("*/*.xplane.pb"))
    if not traces:
        sys.exit("runs/traced has no trace: train first, as --help says")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "plugins/profile/trace/host-0.xplane.pb")
        copy.parent.mkdir(parents=True)
        shutil.copyfile(traces[-1], copy)
        with tensorboard_of(folder) as url:
            page.goto(f"{url}?run=trace&tag=trace_viewer%40&hosts=host-0#profile")
            viewer = page.frame_locator("iframe").frame_locator("iframe")
            track = viewer.get_by_text("/host:CPU").locator("visible=true")
            track.first.wait_for(timeout=300_000)  # a trace is large
            page.wait_for_timeout(3_000)  # until it is drawn
            return page.screenshot()


def site(page: Any) -> bytes:
    if not SITE.exists():
        sys.exit(f"{SITE} does not exist: python -m mkdocs build")
    page.goto(SITE.as_uri())
    return page.screenshot()


PICTURES: dict[str, Callable[[Any], bytes]] = {
    "tensorboard": tensorboard,
    "status": status,
    "preflight": preflight,
    "xprof": xprof,
    "site": site,
}

if __name__ == "__main__":
    main()
