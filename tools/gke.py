"""Writes the JobSet that trains on Google Kubernetes Engine, on TPU slices or GPU nodes.

    python -m tools.gke --name=RUN --image=IMAGE --topology=v5p:4x4x4 --num_slices=2 \\
        --workdir=gs://BUCKET/RUN --service_account=ACCOUNT \\
        -- --config=configs/lra_text.py --config.data.dir=gs://BUCKET/data > jobset.yaml
    python -m tools.gke --name=RUN --image=IMAGE --gpu=nvidia-h100-80gb --gpus_per_node=8 \\
        --num_nodes=2 --workdir=gs://BUCKET/RUN -- --config=configs/lra_text.py ...
    kubectl apply -f jobset.yaml

The image is the Dockerfile's target `cpu` for TPUs, `cuda` for GPUs. Topologies are named as for
`tools.preflight`, which reports whether the run fits in memory. Flags after -- are the trainer's,
and are checked here as the trainer checks them: every flag and field of the config, and that the
mesh takes this number of chips or GPUs and divides the batches. What is not checked: the image,
the bucket, and that the image has the same config file.

Pods share no disk, so data are read from gs:// as well. The account is a Kubernetes service account
that may write there (Workload Identity). All hosts restart together: always after a preemption, up
to --max_restarts times after other failures that a restart can fix, and never after the rest.

Environment variables: --env=NAME=VALUE, or --env=NAME --secret=SECRET for those that the manifest
must not show, from a Kubernetes secret:

    kubectl create secret generic SECRET --from-literal=WANDB_API_KEY=...

Several GPU nodes with H200 or B200 communicate by Google's NCCL plug-in gIB, whose networks and
installer the cluster must have; others over TCP. docs/gpus.md has the commands that set up a
cluster. None of this has been run on GKE.
"""

import argparse
import json
import math
import pathlib
import re
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

from spectral_pod import storage
from spectral_pod.analysis import hardware
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive

from . import shell
from .exit_codes import is_curable

_TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
_PORT = 8476  # of the coordinator of GPU nodes
# Where GKE mounts NVIDIA's driver in pods with GPUs; the image cannot know it.
# cloud.google.com/kubernetes-engine/docs/how-to/gpus#cuda
_DRIVER = "/usr/local/nvidia/lib64"
# A3 Ultra and A4 exchange data between nodes by RDMA, with Google's NCCL plug-in gIB. Its networks,
# folders and script are those of
# cloud.google.com/ai-hypercomputer/docs/create/gke-ai-hypercompute-custom and of
# github.com/GoogleCloudPlatform/container-engine-accelerators, gpudirect-rdma/nccl-test.yaml
_GIB_GPUS = ("nvidia-h200-141gb", "nvidia-b200")
_GIB = "/usr/local/gib"
_GIB_NETWORKS = {"eth0": "default"} | {f"eth{i + 2}": f"rdma-{i}" for i in range(8)}
# The plug-ins of A3 Mega and A3 High need a second container in every pod, and their own NCCL.
_OTHER_PLUGINS = {"nvidia-h100-mega-80gb": "GPUDirect-TCPXO", "nvidia-h100-80gb": "GPUDirect-TCPX"}
_BANDWIDTH = "cloud.google.com/kubernetes-engine/docs/how-to/gpu-bandwidth-gpudirect-tcpx"
_COMMAND = ["python", "-m", "spectral_pod.main"]
# {name: (path in the container, the volume there)}
_VOLUMES = {"shared-memory": ("/dev/shm", {"emptyDir": {"medium": "Memory"}})}  # 64 MB without
_GIB_VOLUMES = {
    "driver": ("/usr/local/nvidia", {"hostPath": {"path": "/home/kubernetes/bin/nvidia"}}),
    "gib": (_GIB, {"hostPath": {"path": "/home/kubernetes/bin/gib"}}),
}


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("gke", __doc__)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", type=_word("--image"), required=True, help="REGISTRY/NAME:TAG")
    parser.add_place("--workdir", required=True, help="gs://BUCKET/FOLDER")
    parser.add_argument("--topology", help="a TPU slice, such as v4-128 or v5e:16x16")
    parser.add_value("--num_slices", Positive, 1, "such slices (1)")
    parser.add_argument(
        "--gpu", type=_word("--gpu"), help="a GPU as GKE calls it, such as nvidia-h100-80gb"
    )
    parser.add_value("--gpus_per_node", Positive, 8, "(8)")
    parser.add_value("--num_nodes", Positive, 1, "such nodes (1)")
    parser.add_argument("--spot", action="store_true", help="on nodes that may be preempted")
    parser.add_argument(
        "--service_account", type=_object("--service_account"), default="default", help="(default)"
    )
    parser.add_argument(
        "--tcp", action="store_true", help="GPU nodes communicate over TCP even where gIB is"
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        type=_variable,
        metavar="NAME[=VALUE]",
        help="a variable of the trainer's environment; repeatable",
    )
    parser.add_argument(
        "--secret", type=_object("--secret"), help="has the values of every --env=NAME, by NAME"
    )
    parser.add_value("--max_restarts", NonNegative, 50, "not counting preemptions (50)")
    parser.add_argument("flags", nargs="+", metavar="-- FLAG", help="the trainer's flags")
    return shell.run(parser, write, argv)


def write(arguments: argparse.Namespace) -> None:
    text = render(arguments)
    check_trainer(arguments)
    if arguments.gpu and arguments.num_nodes > 1 and not _uses_gib(arguments):
        plugin = _OTHER_PLUGINS.get(arguments.gpu)
        known = f"; for {plugin}, which is not set up here, see {_BANDWIDTH}" if plugin else ""
        shell.say(f"Note: {arguments.num_nodes} nodes will communicate over plain TCP{known}")
    sys.stdout.write(text)


def check_trainer(arguments: argparse.Namespace) -> None:
    """Checks the trainer's flags as the trainer will, on as many devices as it will have.

    Raises:
      ConfigError: it would end with the same message.
    """
    from spectral_pod import command_line  # this and what follows imports JAX
    from spectral_pod.parallel.mesh import check_slices
    from spectral_pod.validation import validate, validate_mesh

    workdir = f"--workdir={arguments.workdir}"
    trainer = command_line.parse_trainer([workdir, *arguments.flags])
    if trainer.workdir.value != arguments.workdir:
        raise ConfigError(f"--workdir={trainer.workdir.value} after --, and {workdir} before it")
    validate(trainer.config.value)
    if arguments.topology:
        topology = hardware.parse(arguments.topology, arguments.num_slices)
        check_slices(validate_mesh(trainer.config.value, topology.num_devices), topology.num_slices)
    else:
        validate_mesh(trainer.config.value, arguments.gpus_per_node * arguments.num_nodes)


def render(arguments: argparse.Namespace) -> str:
    """The JobSet, in YAML.

    Raises:
      ConfigError: an option is missing, or names something that GKE does not have.
    """
    if not storage.is_remote(arguments.workdir):
        raise ConfigError(f"--workdir={arguments.workdir}; pods share no disk: give a gs:// URL")
    if (arguments.topology is None) == (arguments.gpu is None):
        raise ConfigError("give either --topology, for TPUs, or --gpu, for GPUs")
    if arguments.gpu and arguments.num_slices > 1:
        raise ConfigError("--num_slices is for TPUs; GPU nodes are counted by --num_nodes")
    if arguments.topology and arguments.tcp:
        raise ConfigError("--tcp is for GPUs")
    if arguments.topology and arguments.num_nodes > 1:
        raise ConfigError("--num_nodes is for GPUs; a --topology says how many hosts there are")
    accelerator = _gpus(arguments) if arguments.gpu else _tpus(arguments)
    _check_name(arguments.name, accelerator["num_slices"], accelerator["num_hosts"])
    tolerations = []
    if arguments.spot:
        accelerator["node_selector"]["cloud.google.com/gke-spot"] = "true"
        tolerations = [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]
    flags = [f"--workdir={arguments.workdir}", *arguments.flags]
    env = {variable["name"]: variable for variable in accelerator["env"]} | _environment(arguments)
    defaults = {"pod_annotations": {}, "command": _COMMAND, "volumes": _VOLUMES}
    values = defaults | accelerator
    volumes = values["volumes"].items()
    values |= {
        "name": arguments.name,
        "image": arguments.image,
        "service_account": arguments.service_account,
        "max_restarts": arguments.max_restarts,
        "tolerations": tolerations,
        "curable_exit_codes": [code for code in range(256) if is_curable(code)],
        "env": [*env.values()],
        "volumes": [{"name": name} | source for name, (_, source) in volumes],
        "mounts": [{"name": name, "mountPath": path} for name, (path, _) in volumes],
        "arguments": list(map(_literal, flags)),
    }
    template = string.Template(_TEMPLATE.read_text().partition("\n")[2])
    return template.substitute(
        {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    )


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """The variables that --env names."""
    variables = {}
    for name, value in arguments.env:
        variables[name] = {"name": name}
        if value is not None:
            variables[name]["value"] = _literal(value)
        elif arguments.secret:
            key = {"name": arguments.secret, "key": name}
            variables[name]["valueFrom"] = {"secretKeyRef": key}
        else:
            raise ConfigError(
                f"--env={name} has no value: name the Kubernetes secret that has it by --secret, "
                f"or write --env={name}=VALUE, which the manifest will show"
            )
    return variables


def _literal(text: str) -> str:
    """As Kubernetes takes it, which expands $(NAME)."""
    return text.replace("$", "$$")


def _tpus(arguments: argparse.Namespace) -> dict[str, Any]:
    """The template's values for TPU slices."""
    topology = hardware.parse(arguments.topology, arguments.num_slices)
    if topology.chip.family not in _ACCELERATORS:
        raise ConfigError(f"--topology={arguments.topology} is no TPU slice")
    chips = math.prod(topology.shape)
    # Nodes of v5e and v6e with eight chips are whole slices; multislice runs use nodes of four.
    alone = topology.shape == (2, 4) and topology.num_slices == 1
    per_host = chips if alone else min(chips, topology.chip.chips_per_host)
    if topology.num_slices > 1 and chips == per_host:
        raise ConfigError(
            f"--num_slices={topology.num_slices}: GKE joins slices of several hosts only, and a "
            f"{topology.chip} slice of {chips} chips is one host; take a larger --topology"
        )
    # JAX needs only what GKE sets in pods that request google.com/tpu: TPU_WORKER_ID,
    # TPU_WORKER_HOSTNAMES and, for several slices, MEGASCALE_*.
    return {
        "num_slices": topology.num_slices,
        "num_hosts": chips // per_host,
        # One slice is one node pool.
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
        "node_selector": {
            "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[topology.chip.family],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
        },
        "limits": {"google.com/tpu": per_host},
        "env": [],
        "security_context": {"privileged": True, "runAsUser": 0},  # libtpu locks memory
        "host_network": topology.num_slices
        > 1,  # slices communicate directly, not over the pods' network
        "dns_policy": "ClusterFirstWithHostNet" if topology.num_slices > 1 else "ClusterFirst",
    }


def _gpus(arguments: argparse.Namespace) -> dict[str, Any]:
    """The template's values for GPU nodes: one process on each, with all its GPUs."""
    process_id = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    joining = [
        # The name that JobSet gives to the first pod of the first job.
        {
            "name": "JAX_COORDINATOR_ADDRESS",
            "value": f"{arguments.name}-slice-0-0.{arguments.name}:{_PORT}",
        },
        # That name may not resolve yet when the pod starts to listen.
        {"name": "JAX_COORDINATOR_BIND_ADDRESS", "value": f"0.0.0.0:{_PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(arguments.num_nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": process_id}}},
    ]
    values = {
        "num_slices": 1,
        "num_hosts": arguments.num_nodes,
        "annotations": {},
        "node_selector": {"cloud.google.com/gke-accelerator": arguments.gpu},
        "limits": {"nvidia.com/gpu": arguments.gpus_per_node},
        "env": [
            {"name": "LD_LIBRARY_PATH", "value": _DRIVER},
            *(joining if arguments.num_nodes > 1 else []),
        ],
        "security_context": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
        "host_network": False,
        "dns_policy": "ClusterFirst",
    }
    if not _uses_gib(arguments):
        return values
    libraries = {"name": "LD_LIBRARY_PATH", "value": f"{_DRIVER}:{_GIB}/lib64"}
    interfaces = [{"interfaceName": i, "network": n} for i, n in _GIB_NETWORKS.items()]
    source = f'source {_GIB}/scripts/set_nccl_env.sh && exec "$@"'
    return values | {
        "env": [libraries, *joining],
        "security_context": {"allowPrivilegeEscalation": False, "runAsUser": 0},  # as Google's pods
        "pod_annotations": {
            "networking.gke.io/default-interface": "eth0",
            "networking.gke.io/interfaces": json.dumps(interfaces),
        },
        "command": ["bash", "-c", _literal(source), "trainer", *_COMMAND],
        "volumes": _VOLUMES | _GIB_VOLUMES,
    }


def _uses_gib(arguments: argparse.Namespace) -> bool:
    return arguments.gpu in _GIB_GPUS and arguments.num_nodes > 1 and not arguments.tcp


def _variable(text: str) -> tuple[str, str | None]:
    """The name and the value, which may be missing, of --env."""
    name, given, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ConfigError(f"--env is {text!r}; write --env=NAME=VALUE or --env=NAME")
    return name, value if given else None


def _word(flag: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", text, re.ASCII):
            raise ConfigError(f"{flag} is {text!r}, which is no name of one")
        return text

    return parse


def _object(flag: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", text):
            raise ConfigError(
                f"{flag} is {text!r}; names in Kubernetes have lower-case letters, digits, hyphens "
                "and dots, 253 at most"
            )
        return text

    return parse


def _check_name(name: str, num_slices: int, num_hosts: int) -> None:
    pod = f"{name}-slice-{num_slices - 1}-{num_hosts - 1}-abcde"  # Kubernetes appends the end
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"--name={name}; a name has lower-case letters, digits and hyphens, and starts with a "
            "letter"
        )
    if len(pod) > 63:
        raise ConfigError(f"--name={name} is too long: {63 - len(pod) + len(name)} letters at most")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
