"""Stands in for `gcloud compute tpus`: as strict about arguments, with folders for workers.

What runs on a worker really runs, in a folder of its own that is its home. $GCLOUD_STANDIN is the
folder of the stand-in: `calls` records what was asked, `resources` and `scenario` (JSON) hold what
exists and what goes wrong:

    states           what describing a new resource says, one after the other; the last one stays
    refuse           what creating says instead of creating
    drop             how many connections to follow a log are lost after a moment
    fail_install     {"HOST": how many installations fail there}
    lose_at_install  how many slices are preempted when they are installed
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

# Positional arguments; flags with whether they take a value; flags that must be there.
RESOURCES, VMS = "compute tpus queued-resources", "compute tpus tpu-vm"
WIDE = {"--project": True, "--format": True, "--quiet": False, "--verbosity": True}
PLACE = {"--zone": True}
SSH = {"--worker": True}
SSH_ATTEMPTS = 2  # gcloud makes ten
COMMANDS = {
    f"{RESOURCES} create": (
        1,
        PLACE
        | {"--node-id": True, "--node-count": True, "--node-prefix": True, "--spot": False}
        | {"--accelerator-type": True, "--runtime-version": True, "--service-account": True}
        | {"--network": True, "--subnetwork": True},
        {"--zone", "--accelerator-type", "--runtime-version"},
    ),
    f"{RESOURCES} describe": (1, PLACE, {"--zone", "--format"}),
    f"{RESOURCES} delete": (1, PLACE | {"--force": False}, {"--zone", "--quiet"}),
    f"{VMS} describe": (1, PLACE, {"--zone", "--format"}),
    f"{VMS} ssh": (1, PLACE | SSH | {"--command": True}, {"--zone", "--command", "--quiet"}),
    f"{VMS} scp": (2, PLACE | SSH, {"--zone", "--quiet"}),
}


def main(argv: list[str]) -> int:
    command, positionals, flags = parse(argv)
    root = pathlib.Path(os.environ["GCLOUD_STANDIN"])
    with open(root / "calls", "a") as calls:
        calls.write(json.dumps(argv) + "\n")
    action = globals()[command.split()[-2].replace("-", "_") + "_" + command.split()[-1]]
    return action(Cloud(root), *positionals, **flags)


def parse(argv: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positional arguments and its flags; exits with 2 as gcloud does."""
    command = " ".join(argv[:4])
    if command not in COMMANDS:
        refuse(2, f"Invalid choice: {command!r}")
    count, own, required = COMMANDS[command]
    known, flags, positionals = WIDE | own, {}, []
    for argument in argv[4:]:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            positionals.append(argument)
        elif name not in known or known[name] != bool(equals) or name in flags:
            refuse(2, f"unrecognized arguments: {argument}")
        else:
            flags[name] = value
    if required - set(flags) or len(positionals) != count:
        refuse(2, f"argument {sorted(required - set(flags))}: Must be specified, {positionals}.")
    return command, positionals, {k.strip("-").replace("-", "_"): v for k, v in flags.items()}


def refuse(code: int, message: str) -> None:
    sys.exit(print(f"ERROR: (gcloud) {message}", file=sys.stderr) or code)


# --------------------------------------------------------------------------------- the commands


def queued_resources_create(cloud, name, *, accelerator_type, runtime_version, **flags):
    multislice = {
        "nodeCount": int(flags.get("node_count", 0)),
        "nodeIdPrefix": flags.get("node_prefix"),
    }
    if ("node_id" in flags) == ("node_count" in flags):
        refuse(2, "Exactly one of (--node-id | --node-count : --node-prefix) must be specified.")
    if "node_count" in flags and multislice["nodeCount"] < 2:
        refuse(2, "Node count must be greater than 1")
    with cloud.changing() as (resources, scenario):
        if "refuse" in scenario:
            refuse(1, scenario["refuse"])
        if name in resources:
            refuse(1, f"ALREADY_EXISTS: Resource '{name}' already exists")
        node = {"acceleratorType": accelerator_type, "runtimeVersion": runtime_version}
        spec = {"node": node} | ({"multisliceParams": multislice} if "node_count" in flags else {})
        states = scenario.get("states", ["WAITING_FOR_RESOURCES", "ACTIVE"])
        count, prefix = multislice["nodeCount"], multislice["nodeIdPrefix"]
        nodes = [f"{prefix}-{i}" for i in range(count)] or [flags["node_id"]]
        resources[name] = {
            "states": list(states),
            "nodes": dict.fromkeys(nodes, "READY"),
            "tpu": {"nodeSpec": [spec]},
        }
        for host in cloud.make_hosts(nodes, accelerator_type):
            failures = scenario.get("fail_install", {}).get(host.name, 0)
            (host / "failures").write_text(str(failures))
    return 0


def queued_resources_describe(cloud, name, *, format, **flags):
    with cloud.changing() as (resources, _):
        resource = resources.get(name) or not_found(name)
        state = resource["states"][0]
        if "state.state" in format and len(resource["states"]) > 1:
            state = resource["states"].pop(0)
        failed = {"error": {"message": "no capacity"}} if state == "FAILED" else None
        return value(resource | {"state": {"state": state, "failedData": failed}}, format)


def queued_resources_delete(cloud, name, **flags):
    with cloud.changing() as (resources, _):
        resource = resources.get(name) or not_found(name)
        if "force" not in flags:
            refuse(1, "FAILED_PRECONDITION: the queued resource has nodes")
        for node in resource["nodes"]:
            for host in cloud.hosts(node):
                cloud.switch_off(host)
                shutil.rmtree(host)
        del resources[name]
    return 0


def tpu_vm_describe(cloud, node, *, format, **flags):
    return value({"state": cloud.node_state(node)}, format)


def tpu_vm_ssh(cloud, node, *, command, worker="0", **flags):
    if "install.sh" in command and cloud.take("lose_at_install"):
        cloud.lose(node)
    hosts = cloud.reach(node, worker)
    for _ in range(SSH_ATTEMPTS):
        dropped = "follow.sh" in command and cloud.take("drop")
        # gcloud splits at spaces and ssh joins with spaces; the login shell reads the result.
        remote = [cloud.start(host, " ".join(command.split(" ")), dropped) for host in hosts]
        if not dropped:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            remote[0].wait(0.3)
        os.killpg(remote[0].pid, signal.SIGKILL)
    codes = [process.wait() for process in remote]
    return next((code if code > 0 else 255 for code in codes if code), 0)


def tpu_vm_scp(cloud, source, destination, *, worker="0", **flags):
    node, _, path = destination.partition(":")
    for host in cloud.reach(node, worker):
        shutil.copy(source, host / path)
    return 0


def value(record, format):
    """Prints what --format=value(FIELD) asks for; nothing for a field that isn't set."""
    for part in re.findall(r"\w+", re.fullmatch(r"value\((.*)\)", format)[1]):
        record = record and (record[int(part)] if part.isdigit() else record.get(part))
    print("" if record is None else record)
    return 0


def not_found(name):
    refuse(1, f"NOT_FOUND: Resource '{name}' was not found")


# -------------------------------------------------------------------------------- what there is


class Cloud:
    def __init__(self, root: pathlib.Path):
        self.root = root

    @contextlib.contextmanager
    def changing(self):
        """The resources and the scenario, for one process at a time; changes are kept."""
        with open(self.root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = [self.root / "resources", self.root / "scenario"]
            contents = [json.loads(f.read_text()) if f.exists() else {} for f in files]
            yield contents
            for file, content in zip(files, contents):
                file.write_text(json.dumps(content))

    def make_hosts(self, nodes, accelerator_type):
        family, size = accelerator_type.rsplit("-", 1)
        per_host = 8 if family in ("v4", "v5p") else 4
        for node in nodes:
            for worker in range(max(int(size) // per_host, 1)):
                host = self.root / "hosts" / f"{node}-w-{worker}"
                host.mkdir(parents=True)
                yield host

    def hosts(self, node):
        found = [h for h in (self.root / "hosts").iterdir() if h.name.rsplit("-w-")[0] == node]
        return sorted(found, key=lambda host: int(host.name.rsplit("-")[-1]))

    def node_state(self, node):
        with self.changing() as (resources, _):
            for resource in resources.values():
                if node in resource["nodes"] and resource["states"] == ["ACTIVE"]:
                    return resource["nodes"][node]
        return not_found(node)

    def reach(self, node, worker):
        state = self.node_state(node)
        if state != "READY":
            refuse(1, f'This TPU has terminal state "{state}", so it cannot be used anymore.')
        hosts = self.hosts(node)
        return hosts if worker == "all" else [hosts[int(worker)]]

    def take(self, what):
        with self.changing() as (_, scenario):
            left = scenario.get(what, 0)
            scenario[what] = max(left - 1, 0)
        return left > 0

    def start(self, host, command, own_group):
        environment = {
            "HOME": str(host),
            "PATH": f"{self.root / 'worker_bin'}:/usr/bin:/bin",
            "HOST": host.name,
            "BUCKET": str(self.root / "bucket"),
        }
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=host,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0 if own_group else None,
        )

    def switch_off(self, host):
        """Ends what runs on a host: all whose working directory is in its folder."""
        for process in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit() and (process / "cwd").readlink().is_relative_to(host):
                    os.kill(int(process.name), signal.SIGKILL)

    def lose(self, name, node_state=None):
        """A preemption: all hosts go down, and the resource or its first node says so."""
        with self.changing() as (resources, _):
            nodes = resources[name]["nodes"]
            for node in nodes:
                for lost in self.hosts(node):
                    self.switch_off(lost)
            if node_state:
                nodes[next(iter(nodes))] = node_state
            else:
                resources[name]["states"] = ["SUSPENDED"]
