"""The command line of everything that takes `--config=FILE.py`, and that of the trainer."""

import copy
import dataclasses
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spectral_pod import fields
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class TrainerFlags:
    """The flags of `spectral_pod.main`."""

    config: flags.FlagHolder
    workdir: flags.FlagHolder
    eval_only: flags.FlagHolder
    stop_after_minutes: flags.FlagHolder
    coordinator_address: flags.FlagHolder
    coordinator_bind_address: flags.FlagHolder
    num_processes: flags.FlagHolder
    process_id: flags.FlagHolder


class _Minutes(flags.ArgumentParser):
    def parse(self, argument: str) -> float:
        return fields.parse(fields.PositiveTime, argument, "--stop_after_minutes")


def trainer_flags(values: flags.FlagValues = flags.FLAGS) -> TrainerFlags:
    """Defines the trainer's flags in `values`."""
    texts = {
        "workdir": "Folder or gs:// URL of the run.",
        "coordinator_address": "host:port of process 0.",
        "coordinator_bind_address": "ip:port that process 0 listens on.",
    }
    numbers = {
        "num_processes": "Processes of this run.",
        "process_id": "Index of this process.",
    }
    defined = TrainerFlags(
        config=config_flag(values),
        eval_only=flags.DEFINE_bool(
            "eval_only", False, "Evaluate the newest sound checkpoint.", flag_values=values
        ),
        stop_after_minutes=flags.DEFINE(
            _Minutes(),
            "stop_after_minutes",
            None,
            "Save and end this many minutes after the start, to be continued elsewhere.",
            flag_values=values,
        ),
        **{n: flags.DEFINE_string(n, None, text, flag_values=values) for n, text in texts.items()},
        **{n: flags.DEFINE_integer(n, None, t, flag_values=values) for n, t in numbers.items()},
    )
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)
    return defined


def config_flag(values: flags.FlagValues) -> flags.FlagHolder:
    """Defines --config in `values`."""
    return config_flags.DEFINE_config_file("config", None, "A file in configs/.", values)


def parse_trainer(arguments: Sequence[str]) -> TrainerFlags:
    """Parses the arguments of a trainer that is to run elsewhere, as the trainer itself does.

    Raises:
      ConfigError: the trainer would end with the same message.
    """
    values = flags.FlagValues()
    trainer = trainer_flags(values)
    for module in (app, logging):
        for flag in flags.FLAGS.get_flags_for_module(module):
            values[flag.name] = copy.deepcopy(flag)
    refuse_positional(parser(trainer.config, values)(["main", *arguments])[1:])
    return trainer


def refuse_positional(arguments: Sequence[str]) -> None:
    """Raises a ConfigError if anything is left of a command line."""
    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r}; every option starts with --")


def parser(
    config: flags.FlagHolder, values: flags.FlagValues = flags.FLAGS
) -> Callable[[list[str]], list[str]]:
    """Parses a command line and loads its config file, for `app.run`.

    Any option of the task can be set as `--config.data.options.NAME=VALUE`, whether or not the
    config file mentions it. Whatever is wrong becomes a `ConfigError` of one message.

    Args:
      config: the flag of the config file, defined in `values`.
    """

    def parse(argv: list[str]) -> list[str]:
        whole = sys.argv
        try:
            argv = argv[:1] + values.read_flags_from_files(argv[1:], force_gnu=False)
            argv, texts = _take_options([find_config(arg) for arg in argv], config.name)
            sys.argv = argv  # config_flags looks there for the fields to set
            rest = values(argv)
            _ = config.value.seed  # config_flags doesn't report a missing file before its first use
            if texts:
                _set_options(config.value.data, texts)
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(_format_error(error, argv)) from error
        finally:
            sys.argv = whole
        return rest

    return parse


def find_config(argument: str) -> str:
    """Replaces a `configs/NAME.py` that the working folder lacks by the one that is installed."""
    match = re.fullmatch(r"(--?config=)?(configs/[^:]*)(:.*)?", argument)
    if match and not os.path.exists(match[2]):
        package = pathlib.Path(__file__).parent
        for folder in (package, package.parent):  # of a wheel, of the repository
            if (folder / match[2]).is_file():
                return f"{match[1] or ''}{folder / match[2]}{match[3] or ''}"
    return argument


def _take_options(argv: list[str], flag: str) -> tuple[list[str], dict[str, str | None]]:
    """The other arguments, and the text of every option of the task; None where it has none."""
    pattern = re.compile(rf"--?(no)?{flag}\.data\.options\.(\w+)(?:=(.*))?", re.DOTALL)
    others: list[str] = []
    texts: dict[str, str | None] = {}
    remaining = argv[::-1]
    while remaining:
        argument = remaining.pop()
        match = pattern.fullmatch(argument)
        if not match:
            others.append(argument)
            continue
        negated, name, text = match.groups()
        if negated:  # as absl spells it
            text = "False"
        elif text is None and remaining and not remaining[-1].startswith("--"):
            text = remaining.pop()
        texts[name] = text
    return others, texts


def _set_options(data: Any, texts: Mapping[str, str | None]) -> None:
    """Sets options of the task in `config.data`.

    Raises:
      ConfigError: there is no such task or option, or a text stands for no value that it can have.
    """
    fields.one_of("config.data.task", data.task, tasks.TASKS)
    annotations = tasks.TASKS[data.task].annotations()
    options = data.options.to_dict()
    for name, text in texts.items():
        annotation, field = annotations.get(name, Any), f"config.data.options.{name}"
        if text is None and annotation not in (bool, Any):
            raise ConfigError(f"--{field} has no value; write --{field}=VALUE")
        options[name] = fields.parse(annotation, "True" if text is None else text, field)
    tasks.make(data.task, options)  # an unknown option is an error here
    data.options = ConfigDict(options)


def _format_error(error: BaseException, argv: list[str]) -> str:
    """One message that names the argument, or the line of the config file, that is wrong."""
    while "Traceback" in str(error) and error.__context__:  # a quote of what the config file raised
        error = error.__context__
    if isinstance(error, flags.Error):
        return str(error)
    if isinstance(error, OSError):
        return f"the config file cannot be read: {str(error).splitlines()[-1].strip()}"
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    # A mistake in a preset is raised by recipes.py, for the config file that takes it.
    others = "site-packages|<frozen|/(command_line|recipes).py$"
    ours = [f for f in frames if not re.search(others, f[0])]
    if ours:
        return f"{ours[-1][0]}:{ours[-1][1]}: {type(error).__name__}: {error}"
    field = re.findall(r"\w+", str(error))[0]
    for argument in argv:
        if field in argument.partition("=")[0].split("."):
            near = re.search('Did you mean "(.*)" instead', str(error))
            hint = f"; did you mean {near[1]!r}?" if near else ""
            return f"{argument}: the configuration has no field {field!r}{hint}"
    return f"--config: {error}"
