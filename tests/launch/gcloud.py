"""Stands in for gcloud: as strict about arguments, with folders for workers.

What runs on a worker really runs, in a folder of its own that is its home. $GCLOUD_STANDIN is the
folder of the stand-in: `calls` records what was asked, `resources` and `scenario` (JSON) hold what
exists and what goes wrong:

    states           what describing a new resource says, one after the other; the last one stays
    failure          why a resource FAILED: code and message
    refuse           what creating says instead of creating
    refuse_later     how often it says that there is no capacity, once it has created something
    answer           {"COMMAND": what it says instead of doing anything, or [message, how often]}
    drop             how many connections to follow a log are lost after a moment
    unreachable      {"HOST": how many connections to it fail}
    fail_install     {"HOST": how many installations fail there}
    lose_at_install  how many slices are preempted when they are installed
    metadata         what the metadata of workers say instead
    denied           a service account that may not delete its slice
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

# Positional arguments; flags with whether they take a value; flags that the launcher must give.
RESOURCES, VMS = "compute tpus queued-resources", "compute tpus tpu-vm"
WIDE = {"--project": True, "--format": True, "--quiet": False, "--verbosity": True}
PLACE = {"--zone": True}
SSH = {"--worker": True, "--internal-ip": False}
IAP = {"--tunnel-through-iap": False}
SSH_ATTEMPTS = 2  # gcloud makes ten
CREATE = (
    PLACE
    | {"--node-id": True, "--node-count": True, "--node-prefix": True, "--spot": False}
    | {"--accelerator-type": True, "--runtime-version": True, "--service-account": True}
    | {"--network": True, "--subnetwork": True, "--reserved": False, "--internal-ips": False}
    | {"--labels": True, "--metadata": True, "--metadata-from-file": True, "--data-disk": True}
    | {"--tags": True, "--scopes": True, "--valid-until-duration": True}
)
SSH_FLAGS = (
    1,
    PLACE | SSH | {"--command": True, "--ssh-flag": True},
    {"--zone", "--command", "--quiet", "--worker"},
)
SCP_FLAGS = (2, PLACE | SSH | {"--scp-flag": True}, {"--zone", "--quiet", "--worker"})
COMMANDS = {
    f"{RESOURCES} create": (
        1, CREATE, {"--zone", "--accelerator-type", "--runtime-version", "--valid-until-duration"}
    ),
    f"alpha {RESOURCES} create": (1, CREATE | {"--reservation": True}, {"--zone", "--reservation"}),
    f"{RESOURCES} describe": (1, PLACE, {"--zone", "--format"}),
    f"{RESOURCES} list": (0, PLACE, {"--zone", "--format"}),
    f"alpha {RESOURCES} list": (0, PLACE, {"--zone", "--format"}),
    f"{RESOURCES} delete": (1, PLACE | {"--force": False}, {"--zone", "--quiet"}),
    f"{VMS} list": (0, PLACE, {"--zone", "--format"}),
    f"{VMS} ssh": SSH_FLAGS,
    f"{VMS} scp": SCP_FLAGS,
    f"alpha {VMS} ssh": (1, SSH_FLAGS[1] | IAP, SSH_FLAGS[2] | {"--tunnel-through-iap"}),
    f"alpha {VMS} scp": (2, SCP_FLAGS[1] | IAP, SCP_FLAGS[2] | {"--tunnel-through-iap"}),
    f"{VMS} accelerator-types describe": (1, PLACE, {"--zone", "--format"}),
    f"{VMS} versions describe": (1, PLACE, {"--zone", "--format"}),
    "auth list": (0, {"--filter": True}, {"--format"}),
    "config get-value": (1, {}, set()),
    "storage buckets describe": (1, {}, {"--format"}),
    "storage ls": (1, {}, set()),
    "iam service-accounts describe": (1, {}, {"--format"}),
}  # fmt: skip
REPEATED = ("--data-disk", "--ssh-flag", "--scp-flag")


def main(argv: list[str]) -> int:
    command, positionals, flags = parse(argv)
    root = pathlib.Path(os.environ["GCLOUD_STANDIN"])
    with open(root / "calls", "a") as calls:
        calls.write(json.dumps(argv) + "\n")
    cloud = Cloud(root)
    cloud.answer(command)
    return action(command)(cloud, *positionals, **flags)


def action(command: str):
    name = command.removeprefix("alpha ").removeprefix("compute tpus ")
    return globals()[re.sub("[ -]", "_", name)]


def parse(argv: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positional arguments and its flags; exits with 2 as gcloud does."""
    words = next((n for n in range(6, 0, -1) if " ".join(argv[:n]) in COMMANDS), 0)
    command = " ".join(argv[:words])
    if command not in COMMANDS:
        refuse(2, f"Invalid choice: {argv[:5]!r}")
    count, own, required = COMMANDS[command]
    known, flags, positionals = WIDE | own, {}, []
    for argument in argv[words:]:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            positionals.append(argument)
        elif name not in known or known[name] != bool(equals):
            refuse(2, f"unrecognized arguments: {argument}")
        elif name in flags and name not in REPEATED:
            refuse(2, f"argument {name}: given twice")
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
    if not re.fullmatch(r"\d+s", flags["valid_until_duration"]):
        refuse(2, "argument --valid-until-duration: Failed to parse duration")
    if cloud.created() and cloud.take("refuse_later"):
        refuse(1, "RESOURCE_EXHAUSTED: There is no more capacity in the zone")
    with cloud.changing() as (resources, scenario):
        if "refuse" in scenario:
            refuse(1, scenario["refuse"])
        if name in resources:
            refuse(1, f"ALREADY_EXISTS: Resource '{name}' already exists")
        scenario["created"] = True
        node = {"acceleratorType": accelerator_type, "runtimeVersion": runtime_version}
        spec = {"node": node} | ({"multisliceParams": multislice} if "node_count" in flags else {})
        states = scenario.get("states", ["WAITING_FOR_RESOURCES", "ACTIVE"])
        if states and isinstance(states[0], list):  # of this creation, and of those to come
            scenario["states"] = states[1:] or [["ACTIVE"]]
            states = states[0]
        count, prefix = multislice["nodeCount"], multislice["nodeIdPrefix"]
        nodes = [f"{prefix}-{i}" for i in range(count)] or [flags["node_id"]]
        resources[name] = {
            "states": list(states),
            "nodes": dict.fromkeys(nodes, "READY"),
            "tpu": {"nodeSpec": [spec]},
        }
        metadata = dict(pair.split("=", 1) for pair in flags["metadata"].split(","))
        startup = dict(pair.split("=", 1) for pair in flags["metadata_from_file"].split(","))
        for host in cloud.make_hosts(nodes, accelerator_type):
            failures = scenario.get("fail_install", {}).get(host.name, 0)
            (cloud.home(host) / "failures").write_text(str(failures))
            (host / "metadata").mkdir()
            for key, text in (metadata | scenario.get("metadata", {})).items():
                (host / "metadata" / key).write_text(text)
            shutil.copy(startup["startup-script"], host / "startup")
    return 0


def queued_resources_describe(cloud, name, *, format, **flags):
    assert format == "json"
    with cloud.changing() as (resources, scenario):
        resource = resources.get(name) or not_found(name)
        before = resource["states"][0]
        if len(resource["states"]) > 1:
            resource["states"].pop(0)
        state = {"state": before}
        if before == "FAILED":
            code, message = scenario.get("failure", [8, "no capacity"])
            state["failedData"] = {"error": {"code": code, "message": message}}
        if before.startswith("SUSPEND"):
            state["stateInitiator"] = resource.get("initiator", "SERVICE")
        booted = resource["states"] == ["ACTIVE"] and not resource.get("booted")
        resource["booted"] = resource.get("booted") or booted
        print(
            json.dumps(
                {"name": f"projects/p/locations/z/queuedResources/{name}"}
                | resource
                | {"state": state}
            )
        )
        nodes = list(resource["nodes"])
    if booted:
        cloud.boot(name, nodes)
    return 0


def queued_resources_list(cloud, **flags):
    return 0


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


def tpu_vm_list(cloud, *, format, **flags):
    assert format == "json"
    with cloud.changing() as (resources, _):
        nodes = [
            {
                "name": f"projects/p/locations/z/nodes/{node}",
                "state": state,
                "networkEndpoints": [{} for _ in cloud.hosts(node)],
            }
            for resource in resources.values()
            for node, state in resource["nodes"].items()
            if resource["states"] == ["ACTIVE"] and state
        ]
    print(json.dumps(nodes))
    return 0


def tpu_vm_ssh(cloud, node, *, command, worker="0", **flags):
    node = node.rpartition("@")[2]
    if "install.sh" in command and cloud.take("lose_at_install"):
        cloud.lose(node)
    hosts = cloud.reach(node, worker)
    missed = [host for host in hosts if cloud.take("unreachable", host.name)]
    hosts = [host for host in hosts if host not in missed]
    for host in missed:
        print(f"ERROR: (gcloud) [{host.name}]: Connection timed out", file=sys.stderr)
    codes = [255 for host in missed]
    for _ in range(SSH_ATTEMPTS):
        dropped = "follow.sh" in command and cloud.take("drop")
        # gcloud splits at spaces and ssh joins with spaces; the login shell reads the result.
        remote = [cloud.start(host, " ".join(command.split(" ")), dropped) for host in hosts]
        if not dropped:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            remote[0].wait(0.3)
        os.killpg(remote[0].pid, signal.SIGKILL)
    codes += [process.wait() for process in remote]
    return next((code if code > 0 else 255 for code in codes if code), 0)


def tpu_vm_scp(cloud, source, destination, *, worker="0", **flags):
    node, _, path = destination.rpartition("@")[2].partition(":")
    for host in cloud.reach(node, worker):
        shutil.copy(source, cloud.home(host) / path)
    return 0


def tpu_vm_accelerator_types_describe(cloud, name, **flags):
    return 0


def tpu_vm_versions_describe(cloud, name, **flags):
    return 0


def auth_list(cloud, **flags):
    return print("me@example.com") or 0


def config_get_value(cloud, name, **flags):
    return print("project-1") or 0


def storage_buckets_describe(cloud, url, **flags):
    return print("US-CENTRAL2") or 0


def storage_ls(cloud, url, **flags):
    if not (
        cloud.root / "bucket" / "objects" / url.removeprefix("gs://").replace("/", "_")
    ).exists():
        refuse(1, "One or more URLs matched no objects.")
    return print(url) or 0


def iam_service_accounts_describe(cloud, email, **flags):
    return print(email) or 0


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
            for file, content in zip(files, contents):  # as a whole, also if this process is killed
                new = file.with_suffix(".new")
                new.write_text(json.dumps(content))
                new.replace(file)

    def make_hosts(self, nodes, accelerator_type):
        family, size = accelerator_type.rsplit("-", 1)
        per_host = 8 if family in ("v4", "v5p") else 4
        for node in nodes:
            for worker in range(max(int(size) // per_host, 1)):
                host = self.root / "hosts" / f"{node}-w-{worker}"
                self.home(host).mkdir(parents=True)
                yield host

    def home(self, host):
        return host / "home" / "me"

    def created(self):
        with self.changing() as (_, scenario):
            return scenario.get("created")

    def hosts(self, node):
        found = [h for h in (self.root / "hosts").iterdir() if h.name.rsplit("-w-")[0] == node]
        return sorted(found, key=lambda host: int(host.name.rsplit("-")[-1]))

    def answer(self, command):
        """Exits with what the scenario has a command say, if it does."""
        name = command.removeprefix("alpha ").removeprefix("compute tpus ")
        with self.changing() as (_, scenario):
            answers = scenario.get("answer", {})
            message = answers.get(name, answers.get("*"))
            if isinstance(message, list):
                key = name if name in answers else "*"
                message, left = message
                answers[key] = [message, max(left - 1, 0)]
                message = message if left > 0 else None
        if message:
            refuse(1, message)

    def boot(self, name, nodes):
        """The hosts of a resource start, and with them their startup scripts."""
        for node in nodes:
            for host in self.hosts(node):
                metadata = host / "metadata"
                worker = host.name.rsplit("-")[-1]
                (metadata / "agent-worker-number").write_text(worker)
                with open(host / "serial", "w") as log:
                    subprocess.Popen(
                        ["bash", host / "startup"],
                        cwd=host,
                        env=self.environment(host),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )

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
        return hosts if worker == "all" else [hosts[int(one)] for one in worker.split(",")]

    def take(self, what, host=None):
        with self.changing() as (_, scenario):
            counts, key = (scenario.get(what, {}), host) if host else (scenario, what)
            left = counts.get(key, 0)
            counts[key] = max(left - 1, 0)
        return left > 0

    def start(self, host, command, own_group):
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.home(host),
            env=self.environment(host),
            stdin=subprocess.DEVNULL,
            process_group=0 if own_group else None,
        )

    def environment(self, host):
        return {
            "HOME": str(self.home(host)),
            "PATH": f"{self.root / 'worker_bin'}:/usr/bin:/bin",
            "HOST": host.name,
            "CLOUD": str(self.root),
            "BUCKET": str(self.root / "bucket"),
            "GUARD_STATE": str(host / "guard"),
            "GUARD_HOMES": str(host / "home"),
            "GUARD_SECONDS": "0.2",
            "GUARD_GRACE": "6",
        }

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
