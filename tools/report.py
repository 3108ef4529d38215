"""Writes the tables of docs/results.md from the measurements in docs/results/NAME.json.

    python -m tools.report            writes every table again
    python -m tools.report --check    prints the tables that differ; exit code 1 if there are any

A table stands between the lines `<!-- table NAME -->` and `<!-- end -->`, and nowhere else. What
NAME.json says of it is in the class Table of this module; its figures are what tools have written:

    python -m tools.report add ablation DIR/table.json --columns=accuracy,parameters \\
        --command='python -m tools.ablate ...' --machine='2 CPU cores'
    python -m tools.report add curve DIR/metrics.jsonl --columns=step,validation/loss --steps=50,100
    python -m tools.report add mixers DIR/result.json --row=attention --columns=eval.accuracy

FILE is a run's result.json or metrics.jsonl, or the JSON of a tool. A row of the table is a line of
metrics.jsonl, or an element of the list or object --rows of FILE; without --rows of the first of
`variants` (tools.ablate), `models` (tools.lra), `rows` (tools.bench), `steps` (tools.profile) and
`baselines` (tools.baseline) that it has, or else all of it. --columns are fields of a row, such as
`eval.accuracy` within `eval`. The field `row` is an element's name, or what --row gives, which adds
a row to the table or replaces the one so named.

Without --columns, --command or --machine those of NAME.json stay, as do headings, formats and what
is bold, which are edited there by hand.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

import pydantic
from etils import epath
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from spectral_pod import fields, project_files, storage
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import NonNegative

from . import shell, study

# Neither JAX nor TensorFlow is imported here, directly or indirectly: they take seconds.

DOCUMENT = epath.Path("docs/results.md")
TABLES = epath.Path("docs/results")
_BLOCK = re.compile(r"^<!-- table ([a-z0-9_]+) -->\n(?:(?!<!-- ).*\n)*<!-- end -->$", re.MULTILINE)
_STRAY = re.compile(r"^(?:\||<!-- table|<!-- end).*", re.MULTILINE)
_ROWS = ("variants", "models", "rows", "steps", "baselines")
_LABEL = "row"


def _format(text: str) -> str:
    if not re.fullmatch(r"[^{}]*\{:[^{}]*\}[^{}]*", text):
        raise ValueError("write a format of Python for one number, such as '{:.1%}' or '{:,} ms'")
    text.format(1.0)
    return text


Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Bold = Annotated[dict[Literal["bold"], Number], pydantic.Field(min_length=1)]


class _Closed(TypedDict):
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]


class Column(_Closed):
    name: str  # the heading, in Markdown
    field: NotRequired[str]  # what `add` fills the column with; without it, that of its name
    format: NotRequired[Annotated[str, pydantic.AfterValidator(_format)]]  # of numbers; "{:,}"
    bold: NotRequired[Literal["max", "min"]]  # the highest or the lowest number


class Table(_Closed):
    """docs/results/NAME.json. Its date is that of FILE; of older tables, of their publication.

    A cell is a number, {"bold": number}, text in Markdown, or null, which is empty. Figures are
    text where they lack the format of their column: "1:14 min", "98 / 100%", "17.5 MiB" among ms.
    """

    commands: list[str]  # that measured; none where that was not recorded
    date: Annotated[str, pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    machine: str
    transposed: NotRequired[bool]  # columns are written as the rows of the Markdown
    columns: Annotated[list[Column], pydantic.Field(min_length=1)]
    rows: list[list[Number | str | Bold | None]]


def _rectangular(table: Table) -> Table:
    width = len(table["columns"])
    for i, row in enumerate(table["rows"]):
        if len(row) != width:
            raise ValueError(f"rows.{i} has {len(row)} cells, and there are {width} columns")
    return table


TABLE: project_files.Kind[Table] = project_files.Kind(
    Annotated[Table, pydantic.AfterValidator(_rectangular)],
    "correct it, or write it with `python -m tools.report add`",
)
_REPORT: project_files.Kind[dict[str, Any]] = project_files.Kind(dict[str, Any], "measure again")


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing: see above")
    parser.set_defaults(verb=write)
    adds = parser.add_subparsers(metavar="add").add_parser("add", help="makes NAME.json of FILE")
    adds.add_argument("name", type=_name, help="of the table")
    adds.add_place("file", help="what was measured, on disk or gs://")
    adds.add_argument("--rows", metavar="FIELD", help="the list or object of FILE with the rows")
    adds.add_argument("--columns", metavar="A,B", help="fields of a row")
    adds.add_argument("--steps", metavar="N,M", help="rows with these steps only")
    adds.add_argument("--row", metavar="NAME", help="add the row of FILE, so named")
    adds.add_argument("--command", action="append", help="that measured; may be given repeatedly")
    adds.add_argument("--machine", help="that it ran on")
    adds.set_defaults(verb=add)
    return shell.run(parser, lambda arguments: arguments.verb(arguments), argv)


def _name(text: str) -> str:
    if not re.fullmatch("[a-z0-9_]{1,64}", text):
        raise ConfigError(f"the name {text!r} must be of at most 64 letters a-z, 0-9 and _")
    return text


def write(arguments: argparse.Namespace) -> int:
    if not DOCUMENT.exists():
        raise ConfigError(f"there is no {DOCUMENT} here; start in the root of a checkout")
    text, differing = rendered(DOCUMENT.read_text())
    print("".join(f"{name}\n" for name in differing), end="")
    if differing and not arguments.check:
        storage.write_whole(DOCUMENT, text)
    return 1 if differing and arguments.check else 0


def rendered(document: str) -> tuple[str, list[str]]:
    """The text of the document with its tables by their JSON, and the names of those that differed.

    Raises:
      DataError: the document and the files do not fit together, or a file is damaged.
    """
    if stray := _STRAY.search(_BLOCK.sub("", document)):
        raise DataError(
            f"{DOCUMENT}: {stray[0][:60]!r} is not of a table between '<!-- table NAME -->' and "
            "'<!-- end -->', with a NAME of a-z, 0-9 and _"
        )
    seen, differing = [], []

    def block(match: re.Match[str]) -> str:
        name = match[1]
        table = markdown(TABLE.read(TABLES / f"{name}.json"))
        new = f"<!-- table {name} -->\n\n{table}\n\n<!-- end -->"  # Markdown needs empty lines
        seen.append(name)
        differing.extend([name] if new != match[0] else [])
        return new

    text = _BLOCK.sub(block, document)
    for path in sorted(TABLES.glob("*.json")):
        if path.stem not in seen:
            raise DataError(
                f"{DOCUMENT} does not show {path}; write '<!-- table {path.stem} -->' and "
                "'<!-- end -->' where it belongs, or delete the file"
            )
    return text, differing


def markdown(table: Table) -> str:
    columns = [
        [column["name"], *_texts(column, [row[i] for row in table["rows"]])]
        for i, column in enumerate(table["columns"])
    ]
    lines = columns if table.get("transposed") else list(zip(*columns))
    return re.sub(r"\|  (?=\|)", "| ", study.table(lines))


def _texts(column: Column, cells: Sequence[Any]) -> list[str]:
    """The cells of a column in Markdown."""
    values = [cell["bold"] if isinstance(cell, dict) else cell for cell in cells]
    numbers = [value for value in values if isinstance(value, int | float)]
    choose = max if column.get("bold") == "max" else min
    best = choose(numbers, default=None) if "bold" in column else None
    texts = []
    for cell, value in zip(cells, values):
        if isinstance(value, int | float):
            text = column.get("format", "{:,}").format(value)
            text = re.sub(r"e([+-])0(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)  # 1e-7
            texts.append(f"**{text}**" if isinstance(cell, dict) or value == best else text)
        else:
            texts.append((value or "").replace("|", r"\|").replace("\n", " "))
    return texts


def add(arguments: argparse.Namespace) -> None:
    file, path = epath.Path(arguments.file), TABLES / f"{arguments.name}.json"
    old: Any = TABLE.read(path) if path.exists() else {}
    found = _records(file, arguments.rows, arguments.steps)
    if arguments.row is not None:
        if len(found) != 1:
            raise ConfigError(f"--row names one row, and {file} has {len(found)}; see --steps")
        found = [{_LABEL: arguments.row} | found[0]]
    columns = _columns(arguments.columns, old.get("columns"), found, file)
    names = [column.get("field", column["name"]) for column in columns]
    measured = set(names) - {"step", _LABEL} or set(names)
    rows = [[row.get(name) for name in names] for row in found if row.keys() & measured]
    commands = arguments.command or []
    if arguments.row is not None and old:
        if columns != old["columns"] or names[0] != _LABEL:
            raise ConfigError(
                f'--row: the first column of {path} must have "field": "{_LABEL}", and the others '
                "be those of --columns; edit it, or delete it"
            )
        rows = list({str(row[0]): row for row in old["rows"] + rows}.values())
        commands = study.distinct(old["commands"] + commands)
    day = datetime.date.fromtimestamp(file.stat().mtime).isoformat()
    new = {"commands": commands, "date": day, "machine": arguments.machine, "columns": columns}
    table = old | {key: value for key, value in new.items() if value} | {"rows": rows}
    for flag, key in (("--command", "commands"), ("--machine", "machine")):
        if key not in table:
            raise ConfigError(f"{flag} is missing, which {path} is to record")
    text = encoded(table)
    TABLE.parse(text.encode(), f"what {file} gives for {path}")
    TABLES.mkdir(parents=True, exist_ok=True)
    storage.write_whole(path, text)
    print(markdown(table))
    shell.say(f"{path}; `python -m tools.report` writes it into {DOCUMENT}")


def _records(file: epath.Path, rows: str | None, steps: str | None) -> list[dict[str, Any]]:
    """The rows of what a tool has written: their fields by name, numbers and texts."""
    if not file.exists() or file.is_dir():
        raise DataError(f"there is no file {file}")
    if file.suffix == ".jsonl":
        of_steps: Any = {}
        for line in project_files.Log(file, project_files.METRICS).lines:
            of_steps.setdefault(line["step"], {}).update(line)
        if not of_steps:
            raise DataError(f"the file {file} has no metrics; give that of a run")
        found: Any = list(of_steps.values())
    else:
        raw = file.read_bytes()
        raw = b'{"rows": %b}' % raw if raw.lstrip().startswith(b"[") else raw
        report = _REPORT.parse(raw, str(file))
        lists = [key for key, value in report.items() if isinstance(value, list | dict)]
        if rows is not None and rows not in lists:
            raise ConfigError(f"--rows is {rows!r}; {file} has {', '.join(lists) or 'none'}")
        key = rows or next((key for key in _ROWS if key in lists), None)
        found = report[key] if key else [report]
    if isinstance(found, dict):
        found = [{_LABEL: name} | _flat(value) for name, value in found.items()]
    else:
        found = [_flat(value) for value in found]
    if steps is None:
        return found
    asked = [fields.parse(NonNegative, text, "--steps") for text in steps.split(",")]
    there = {row.get("step"): row for row in found}
    if missing := [step for step in asked if step not in there]:
        raise ConfigError(f"--steps: {file} has no step {', '.join(map(str, missing))}")
    return [there[step] for step in asked]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The numbers and texts within JSON, by the names of the fields on the way, joined by dots."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in parts for k, v in _flat(part, f"{prefix}{name}.").items()}
    is_cell = isinstance(value, int | float | str) and not isinstance(value, bool)
    return {prefix[:-1] or "value": value} if is_cell else {}


def _columns(asked: str | None, old: Any, found: Sequence[Any], file: epath.Path) -> list[Any]:
    """The columns that are asked for, of known ones as they are declared, or those of the table."""
    there = study.distinct(name for row in found for name in row)
    names = asked.split(",") if asked is not None else []
    if names and _LABEL in there and _LABEL not in names:
        names = [_LABEL, *names]
    known = {column.get("field", column["name"]): column for column in old or []}
    if not (names := names or list(known)):
        raise ConfigError(f"--columns is missing; {file} has {', '.join(there[:40])}")
    for name in names:
        if name not in there:
            near = fields.hint(name, there)
            raise ConfigError(f"--columns: {file} has no field {fields.shown(name)}{near}")
    return [known.get(name, {"name": name}) for name in names]


def encoded(table: Mapping[str, Any]) -> str:
    """The JSON of a table, with a line for each row, column and command."""
    parts = []
    for key, value in table.items():
        items = [value] if not isinstance(value, list) else value
        texts = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in items)
        parts.append(f' "{key}": ' + (f"[\n  {texts}\n ]" if items is value else texts))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
