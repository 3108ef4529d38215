"""The pages of fields: what the dataclasses declare, and what their comments and docstrings say."""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

from spectral_pod import config, models
from spectral_pod.data.tasks import TASKS
from spectral_pod.layers.architecture import ModelConfig
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.patching import Patches
from spectral_pod.storage import Place
from spectral_pod.train.optim import OPTIMIZERS

_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}


def page() -> str:
    """Every field of the configuration, by section."""
    kinds = config.annotations()
    defaults = config.flat(config.to_dict(config.default()))

    def table(names: Iterable[str], texts: dict[str, str]) -> str:
        """Of the fields of a section; those that are not in it are sections or options of tasks."""
        known = [name for name in names if name in kinds]
        field = (name.rpartition(".")[2] for name in known)
        return _table((n, kinds[n], defaults[n], texts[f]) for n, f in zip(known, field))

    parts = [
        "# Fields of the configuration",
        "A file in `configs/` sets fields, and any field is a flag of the trainer and of the tools "
        "that take `--config`: `--config.train.total_steps=60`. A value that a field does not "
        "accept is an error that names the field. `data.options` are the options of the "
        "[task](tasks.md).",
        table(["seed"], described(config.Config)),
    ]
    sections = config.types_of(config.Config) | {"model": ModelConfig}
    del sections["seed"]
    for name, section in sections.items():
        texts = described(section)
        parts += [f"## {name}", table((f"{name}.{field}" for field in texts), texts)]
        for part, options in config.model_sections().items() if name == "model" else ():
            readers = {k: x for k, x in (MIXERS | CHANNEL_MIXERS).items() if x.section == part}
            texts = {}
            for kind in readers.values() or (Patches,):
                texts = described(kind) | texts
            of = f"Of {', '.join(f'`{reader}`' for reader in readers)}." if readers else ""
            parts += [f"### model.{part}", of or summary(Patches)]
            parts.append(table((f"model.{part}.{option}" for option in options), texts))
    return "\n\n".join(parts) + "\n"


def page_of_tasks() -> str:
    """Every task with its options."""
    parts = [
        "# Tasks and their options",
        "`config.data.task` names the task, and its options are the fields "
        "`config.data.options.NAME`, in a config or as flags.",
    ]
    told = set()
    for name, task in TASKS.items():
        module = inspect.getmodule(task)
        parts += [f"## {name}", summary(task)]
        if module not in told:
            parts.append(inspect.getdoc(module) or "")
        told.add(module)
        texts, kinds = described(task), task.annotations()
        defaults = zip(kinds, (field.default for field in dataclasses.fields(task)))
        parts.append(_table(((n, kinds[n], x, texts[n]) for n, x in defaults), f"{name}."))
    return "\n\n".join(parts) + "\n"


def page_of_names() -> str:
    """Models, mixers and optimizers, which a configuration names."""
    parts = ["# Models, mixers and optimizers"]
    for title, field, known in (
        ("Models", "model.name", models.MODELS),
        ("Mixers", "model.pattern", MIXERS),
        ("Channel mixers", "model.channel_mixer", CHANNEL_MIXERS),
        ("Optimizers", "optimizer.name", OPTIMIZERS),
    ):
        parts += [f"## {title}", f"The values of `{field}`."]
        rows = [(f"`{name}`", cell(summary(kind))) for name, kind in known.items()]  # type: ignore[attr-defined]
        parts.append(rows_of(("name", "what it is"), rows))
    return "\n\n".join(parts) + "\n"


# ---- what the source says


def described(kind: Any) -> dict[str, str]:
    """What a dataclass and its bases say about their fields, by the name of the field's option.

    A field is described by the comment at the end of its line or just above it, or under
    `Attributes` in its class's docstring. One without any shares the comment of the field above.
    """
    texts: dict[str, str] = {}
    options = {
        field.name: field.metadata.get("option", field.name) for field in dataclasses.fields(kind)
    }
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls) or "spectral_pod" not in cls.__module__:
            continue
        own = _comments(cls) | _attributes(cls)  # type: ignore[arg-type]
        texts |= {options[name]: text for name, text in own.items() if name in options}
    return {option: texts.get(option, "") for option in options.values()}


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ---"):
            comments[token.start[0]] = token.string.lstrip("# ")
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    before = ""
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            before = ""
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        at_end = comments.get(node.end_lineno or node.lineno, "")
        if text := " ".join([*above, *([at_end] if at_end else [])]):
            before = text
        if before:
            texts[node.target.id] = before
    return texts


@functools.cache
def _attributes(cls: type) -> dict[str, str]:
    block = re.search(r"^ *Attributes:\n((?: +.*\n?)*)", cls.__dict__.get("__doc__") or "", re.M)
    lines = textwrap.dedent(block[1]).splitlines() if block else []
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if line.startswith(" "):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            head, _, text = line.partition(": ")
            names = head.split(", ")
            texts |= dict.fromkeys(names, text)
    return texts


def summary(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


# ---- tables


def accepts(annotation: Any) -> str:
    """What values an annotation of `spectral_pod/fields.py` accepts, in Markdown."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        kind, *rules = get_args(annotation)
        places = [rule for rule in rules if isinstance(rule, Place)]
        if places:
            where = "folder" if places[0].local else "folder or gs:// URL"
            return "files, folder or gs:// URL; or empty" if places[0].optional else where
        return ", ".join([accepts(kind), *(rule.meaning for rule in rules)])
    if isinstance(annotation, types.UnionType):
        return " or ".join(accepts(one) for one in get_args(annotation))
    if annotation is type(None):
        return "`None`"
    if get_origin(annotation) is tuple:
        return f"`{annotation}`"
    return _NAMES.get(annotation, f"`{annotation}`")


def _table(fields: Iterable[tuple[str, Any, Any, str]], prefix: str = "") -> str:
    """Of (name, annotation, default, text); a field's anchor is its name after the prefix."""
    rows = [
        (f'<span id="{prefix}{name}">`{name}`</span>', f"`{default!r}`", accepts(kind), cell(text))
        for name, kind, default, text in fields
    ]
    return rows_of(("field", "default", "accepts", "meaning"), rows)


def rows_of(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
