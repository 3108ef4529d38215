"""What can be known before anything is asked for, so that no slice is lost to it after hours."""

import os
import re
import subprocess
from collections.abc import Callable

from spectral_pod.errors import ConfigError

from .cloud import Cloud, CloudError, Trouble
from .code import ROOT, Code
from .options import Options
from .system import System

_KEY = "~/.ssh/google_compute_engine"  # gcloud's, for ssh


def before_renting(options: Options, cloud: Cloud, system: System, code: Code) -> None:
    """Checks all that the run will need, and says what was found and what it costs.

    Raises:
      ConfigError: something is missing or not allowed.
    """
    _check_config(options)
    account, project = account_and_project(cloud)
    if not options.dry_run:
        check_account(account, project)
    _ask(cloud.list_requests, f"the TPU API in project {project}, {options.zone}")
    _ask(lambda: cloud.offers("accelerator-types", options.type), f"--type in {options.zone}")
    _ask(
        lambda: cloud.offers("versions", options.runtime_version),
        f"--runtime_version in {options.zone}",
    )
    if options.service_account:
        email = options.service_account
        _ask(lambda: cloud.service_account(email), "--service_account", system)
    for flag in ("--workdir=", "--config.data.dir="):
        _check_bucket(options, cloud, system, flag)
    result = f"{options.workdir.rstrip('/')}/result.json"
    ended = _ask(lambda: "yes" if cloud.exists(result) else "", result, system)
    if ended:
        raise ConfigError(
            f"{result} is there: this run has ended. Another run needs another --workdir; to train "
            f"longer, let it begin with --config.train.start_from={options.workdir}"
        )
    _check_tree(code, system)
    topology = options.topology
    costs = options.costs(60)
    who = "" if options.dry_run else f"{account} in project {project}: "
    system.say(
        f"{who}{topology}, {topology.num_chips} chips"
        + (f", about {costs} an hour on demand" if costs else "")
        + "; --price_per_chip_hour states another price"
    )
    if options.max_run_hours:
        costs = options.costs(60 * options.max_run_hours)
        system.say(
            f"at most {options.max_run_hours:g} hours on one slice" + f", {costs}" * bool(costs)
        )


def account_and_project(cloud: Cloud) -> tuple[str, str]:
    """Those that gcloud uses; empty or "(unset)" where it has none."""
    return _ask(cloud.account, "gcloud"), _ask(cloud.project, "--project")


def check_account(account: str, project: str) -> None:
    """Raises a ConfigError, with the command that helps, where gcloud lacks one of them."""
    if not account:
        raise ConfigError("gcloud has no account: gcloud auth login")
    if project in ("", "(unset)"):
        raise ConfigError("no --project, and gcloud has no default: gcloud config set project ID")


def _check_config(options: Options) -> None:
    name = options.flag("--config=").partition(":")[0]
    file = (ROOT / name).resolve()
    if not file.is_file() or not file.is_relative_to(ROOT):
        raise ConfigError(
            f"--config={name}: the working tree, which the slice gets, has no such file"
        )


def _ask(question: Callable[[], object], what: str, system: System | None = None) -> str:
    """The answer. With `system`, one that cannot be had is only reported."""
    try:
        return str(question() or "")
    except CloudError as error:
        if system and error.kind in (Trouble.DENIED, Trouble.UNAVAILABLE):
            system.say(f"{what}: not checked: {error.line}")
            return ""
        raise ConfigError(f"{what}: {error.line}") from error


def _check_bucket(options: Options, cloud: Cloud, system: System, flag: str) -> None:
    """The bucket of one of the trainer's flags exists, in the region of the TPUs."""
    match = re.match("(gs://[^/]+)", options.flag(flag))
    if not match:
        return
    bucket = match[1]
    place = _ask(lambda: cloud.bucket_location(bucket), f"{flag}{options.flag(flag)}", system)
    region = options.zone.rpartition("-")[0]
    continent = {"europe": "eu"}.get(region.split("-")[0], region.split("-")[0])
    if place and place.lower() not in (region, continent):
        system.say(
            f"{bucket} is in {place.lower()}, the TPUs in {region}: reading there is slower, and "
            "traffic between regions is billed"
        )


def _check_tree(code: Code, system: System) -> None:
    if code.changes:
        names = ", ".join(line[3:] for line in code.changes[:5])
        more = f" and {len(code.changes) - 5} more" if len(code.changes) > 5 else ""
        system.say(
            f"the working tree is installed as it is, with what is not committed: {names}{more}"
        )


def ssh_environment() -> dict[str, str]:
    """Variables under which gcloud's ssh to several workers works without asking anybody.

    gcloud refuses to connect while an ssh agent lists other keys and not its own. It can do without
    an agent if its key has no passphrase.

    Raises:
      ConfigError: the key has a passphrase, and the agent does not list it.
    """
    key = os.path.expanduser(_KEY)
    if not os.path.exists(key):
        return {"SSH_AUTH_SOCK": ""}  # gcloud will make one, without a passphrase
    listed, public = _output("ssh-add", "-l"), _output("ssh-keygen", "-lf", key)
    if public and public.split()[1] in listed:
        return {}
    if _output("ssh-keygen", "-y", "-P", "", "-f", key):
        return {"SSH_AUTH_SOCK": ""}
    raise ConfigError(f"gcloud's key has a passphrase, and no agent knows it: ssh-add {_KEY}")


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ConfigError(f"there is no {argv[0]} here; install OpenSSH's client") from None
    return done.stdout if done.returncode == 0 else ""
