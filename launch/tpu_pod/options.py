"""The command line: its options, and checks that need nothing but them."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from spectral_pod.analysis import hardware
from spectral_pod.errors import ConfigError

ACTIONS = ("up", "status", "logs", "stop", "delete")

# cloud.google.com/tpu/docs/runtimes
_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "tpu7x": "v2-alpha-tpu7-ubuntu2404",
}
# Dollars per chip and hour on demand, in the cheapest region: cloud.google.com/tpu/pricing, 2025.
_PRICES = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}

_NUMBER = r"[0-9]{1,6}"
_WORD = r"[A-Za-z0-9][\w.:/@-]*"
_PAIRS = r"[a-z][\w-]*=[^,=]*(,[a-z][\w-]*=[^,=]*)*"
_VALUES = {  # option: what its value looks like, and how to say that
    "name": (r"[a-z]([-a-z0-9]{0,58}[a-z0-9])?", "up to 60 lower-case letters, digits and hyphens"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-central2-b"),
    "project": (r"[a-z][-a-z0-9.:]{4,60}[a-z0-9]", "a project's id"),
    "type": (r"(v4|v5e|v5litepod|v5p|v6e|tpu7x)-\d{1,5}", "v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N"),
    "num_slices": (r"[1-9][0-9]{0,2}", "a number, at least 1"),
    "runtime_version": (_WORD, "a version of gcloud compute tpus versions list"),
    "service_account": (r"[^@\s]+@[^@\s]+", "an email address"),
    "network": (_WORD, "a network's name"),
    "subnetwork": (_WORD, "a subnetwork's name"),
    "reservation": (_WORD, "a reservation's name"),
    "ssh": ("external|internal|iap", "external, internal or iap"),
    "tags": (r"[a-z][-a-z0-9]*(,[a-z][-a-z0-9]*)*", "names with commas between them"),
    "labels": (_PAIRS, "KEY=VALUE,..."),
    "metadata": (_PAIRS, "KEY=VALUE,..."),
    "data_disk": (r"source=[^,\s]+(,mode=(read-only|read-write))?", "source=DISK[,mode=read-only]"),
    "wait_minutes": (_NUMBER, "a number"),
    # Installation alone takes some minutes.
    "keep_minutes": (r"1[5-9]|[2-9][0-9]|[1-9][0-9]{2,4}", "a number, at least 15"),
    "max_run_hours": (r"[0-9]{1,4}(\.[0-9]+)?", "a number"),
    "max_recreations": (_NUMBER, "a number"),
    "price_per_chip_hour": (r"[0-9]+(\.[0-9]+)?", "an amount"),
    "slice": (_NUMBER, "a number"),
    "worker": (_NUMBER, "a number"),
    "env": (r"[A-Za-z_]\w*(=[\s\S]*)?", "NAME=VALUE, or NAME to take its value from here"),
}  # fmt: skip
_SWITCHES = ("spot", "reserved", "internal_ips", "no_preflight", "force", "keep", "dry_run")
_REPEATED = ("data_disk", "env")
_PASSED_ON = ("service_account", "network", "subnetwork", "reservation", "tags", "labels")
RESERVED_METADATA = ("startup-script", "startup-script-url", "spectral-pod")


@dataclasses.dataclass(frozen=True)
class Options:
    """What one command asks for."""

    action: str
    name: str
    zone: str
    trainer: tuple[str, ...] = ()  # its flags
    project: str = ""
    type: str = ""  # as gcloud calls it: v5litepod-256
    num_slices: int = 1
    runtime_version: str = ""
    service_account: str = ""
    reservation: str = ""
    metadata: str = ""
    ssh: str = "external"
    create_flags: tuple[str, ...] = ()  # of gcloud
    environment: tuple[tuple[str, str], ...] = ()  # of the trainer, with secrets
    wait_minutes: int = 1440
    keep_minutes: int = 30
    max_run_hours: float = 0.0  # 0: no limit
    max_recreations: int = 100
    price_per_chip_hour: float = 0.0  # 0: not known
    slice: int = 0
    worker: int = 0
    preflight: bool = True
    force: bool = False
    keep: bool = False
    dry_run: bool = False

    @property
    def nodes(self) -> list[str]:
        """The names of the slices."""
        if self.num_slices == 1:
            return [self.name]
        return [f"{self.name}-{i}" for i in range(self.num_slices)]

    @property
    def topology(self) -> hardware.Topology:
        return hardware.parse(self.type, self.num_slices)

    @property
    def workdir(self) -> str:
        return self.flag("--workdir=")

    def flag(self, start: str) -> str:
        """The value of the trainer's last flag that starts so; empty without one."""
        values = [flag[len(start) :] for flag in self.trainer if flag.startswith(start)]
        return values[-1] if values else ""

    def costs(self, minutes: float) -> str:
        """What the TPUs cost in so many minutes, or an empty text."""
        if not self.price_per_chip_hour or not self.type:
            return ""
        chips = self.topology.num_chips
        return f"${chips * self.price_per_chip_hour * minutes / 60:,.2f}"

    def hint(self, action: str) -> str:
        """The command that does something else with the same slice."""
        project = f" --project={self.project}" if self.project else ""
        return f"launch/tpu_pod.sh {action} --name={self.name} --zone={self.zone}{project}"


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
      ConfigError: an option is unknown, misspelt, missing, or at odds with another.
    """
    ours, trainer = list(argv), tuple[str, ...]()
    if "--" in ours:
        ours, trainer = ours[: ours.index("--")], tuple(ours[ours.index("--") + 1 :])
    action = ours.pop(0) if ours and ours[0] in ACTIONS else "up"
    given: dict[str, list[str]] = {}
    for argument in ours:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or (name not in _SWITCHES and name not in _VALUES):
            _fail(f"unknown argument {argument}; see --help: --flag=VALUE, the trainer's after --")
        if name in _SWITCHES and equals:
            _fail(f"--{name} takes no value")
        if name in _VALUES:
            pattern, meaning = _VALUES[name]
            if not equals:
                _fail(f"--{name}=VALUE: the value must be {meaning}")
            if not re.fullmatch(pattern, value):
                shown = name if name == "env" else f"{name}={value}"  # which may be a secret
                _fail(f"--{shown}: must be {meaning}")
        given.setdefault(name, []).append(value)
    for name in ("name", "zone"):
        if name not in given:
            _fail(f"--{name} is missing: {_VALUES[name][1]}")
    one = {name: values[-1] for name, values in given.items() if name not in _REPEATED}
    if action == "up":
        return _run(one, given, trainer)
    if trainer:
        _fail(f"{action} takes no flags after --")
    return Options(
        action=action,
        name=one["name"],
        zone=one["zone"],
        project=one.get("project", ""),
        ssh=_ssh(one),
        slice=int(one.get("slice", 0)),
        worker=int(one.get("worker", 0)),
        dry_run="dry_run" in given,
    )


def _run(one: dict[str, str], given: dict[str, list[str]], trainer: tuple[str, ...]) -> Options:
    """The options of `up`, from those that have one value, all, and the trainer's flags."""
    if "type" not in one:
        _fail(f"--type is missing: {_VALUES['type'][1]}")
    kind, _, size = one["type"].partition("-")
    kind = {"v5e": "v5litepod"}.get(kind, kind)
    topology = hardware.parse(f"{kind}-{size}", int(one.get("num_slices", 1)), "--type")
    if "spot" in given and given.keys() & {"reserved", "reservation"}:
        _fail("--spot excludes --reserved and --reservation")
    metadata = one.get("metadata", "")
    for pair in metadata.split(","):
        if pair.partition("=")[0].startswith(RESERVED_METADATA):
            _fail(f"--metadata={pair}: this key is the launcher's own")
    flags = [f"--{name.replace('_', '-')}={one[name]}" for name in _PASSED_ON if name in one]
    flags += [f"--data-disk={disk}" for disk in given.get("data_disk", [])]
    for switch in ("spot", "reserved", "internal_ips"):
        if switch in given:
            flags.append(f"--{switch.replace('_', '-')}")
    options = Options(
        action="up",
        name=one["name"],
        zone=one["zone"],
        trainer=trainer,
        project=one.get("project", ""),
        type=f"{kind}-{size}",
        num_slices=int(one.get("num_slices", 1)),
        runtime_version=one.get("runtime_version", _RUNTIMES[kind]),
        service_account=one.get("service_account", ""),
        reservation=one.get("reservation", ""),
        metadata=metadata,
        ssh=_ssh(one | dict.fromkeys(given.keys() & {"internal_ips"}, "")),
        create_flags=tuple(flags),
        environment=tuple(_variable(text) for text in given.get("env", [])),
        wait_minutes=int(one.get("wait_minutes", 1440)),
        keep_minutes=int(one.get("keep_minutes", 30)),
        max_run_hours=float(one.get("max_run_hours", 0)),
        max_recreations=int(one.get("max_recreations", 100)),
        price_per_chip_hour=float(
            one.get("price_per_chip_hour", _PRICES.get(topology.chip.family, 0))
        ),
        preflight="no_preflight" not in given,
        force="force" in given,
        keep="keep" in given,
        dry_run="dry_run" in given,
    )
    if len(options.nodes[-1]) > 63:
        longest = 63 - len(options.nodes[-1]) + len(options.name)
        _fail(f"--name={options.name} is too long: {longest} letters at most for so many slices")
    if not options.flag("--config="):
        _fail("no --config=FILE after --")
    if not re.match("gs://[^/]+/.", options.workdir):
        _fail("no --workdir=gs://BUCKET/RUN after --: a slice's disks go away with it")
    return options


def _ssh(one: dict[str, str]) -> str:
    return one.get("ssh", "iap" if "internal_ips" in one else "external")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        _fail(f"--env={name}: there is no variable {name} here; set it, or give --env={name}=VALUE")
    return name, value if equals else os.environ[name]


def _fail(message: str) -> NoReturn:
    raise ConfigError(message)
