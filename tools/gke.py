"""Writes the JobSet that trains on Google Kubernetes Engine, on TPU slices or GPU nodes.

    python -m tools.gke --name=RUN --image=IMAGE --topology=v5p:4x4x4 --num_slices=2 \\
        --workdir=gs://BUCKET/RUN --service_account=ACCOUNT \\
        -- --config=configs/lra_text.py --config.data.dir=gs://BUCKET/data > jobset.yaml
    python -m tools.gke --name=RUN --image=IMAGE --gpu=nvidia-h100-80gb --gpus_per_node=8 \\
        --num_nodes=2 --workdir=gs://BUCKET/RUN -- --config=configs/lra_text.py ...
    kubectl apply -f jobset.yaml

The image is the Dockerfile's target `cpu` for TPUs, `cuda` for GPUs. Topologies are named as for
`tools.preflight`, which reports whether the run fits. Flags after -- are the trainer's; pods
share no disk, so data are read from gs:// as well. The account is a Kubernetes service account that
may write there (Workload Identity). All hosts restart together: always after a preemption, up to
--max_restarts times after other failures that a restart can fix, and never after the rest.
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

_TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
_PORT = 8476  # of the coordinator of GPU nodes
# As exit_is_curable in launch/exit_codes.sh: preempted, lost a peer, stalled, or killed by a signal
# other than Ctrl-C's. A shell's code for signal N is 128 + N.
CURABLE_EXIT_CODES = [75, 76, 77, *(code for code in range(129, 193) if code != 130)]


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
        "--service_account", type=_word("--service_account"), default="default", help="(default)"
    )
    parser.add_value("--max_restarts", NonNegative, 50, "not counting preemptions (50)")
    parser.add_argument("flags", nargs="+", metavar="-- FLAG", help="the trainer's flags")
    return shell.run(parser, write, argv)


def write(arguments: argparse.Namespace) -> None:
    sys.stdout.write(render(arguments))


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
    if arguments.topology and arguments.num_nodes > 1:
        raise ConfigError("--num_nodes is for GPUs; a --topology says how many hosts there are")
    accelerator = _gpus(arguments) if arguments.gpu else _tpus(arguments)
    _check_name(arguments.name, accelerator["num_slices"], accelerator["num_hosts"])
    tolerations = []
    if arguments.spot:
        accelerator["node_selector"]["cloud.google.com/gke-spot"] = "true"
        tolerations = [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]
    flags = [f"--workdir={arguments.workdir}", *arguments.flags]
    values = accelerator | {
        "name": arguments.name,
        "image": arguments.image,
        "service_account": arguments.service_account,
        "max_restarts": arguments.max_restarts,
        "tolerations": tolerations,
        "curable_exit_codes": CURABLE_EXIT_CODES,
        "arguments": [flag.replace("$", "$$") for flag in flags],  # Kubernetes expands $(NAME)
    }
    template = string.Template(_TEMPLATE.read_text().partition("\n")[2])
    return template.substitute(
        {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    )


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
    env = [
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
    return {
        "num_slices": 1,
        "num_hosts": arguments.num_nodes,
        "annotations": {},
        "node_selector": {"cloud.google.com/gke-accelerator": arguments.gpu},
        "limits": {"nvidia.com/gpu": arguments.gpus_per_node},
        "env": env if arguments.num_nodes > 1 else [],
        "security_context": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
        "host_network": False,
        "dns_policy": "ClusterFirst",
    }


def _word(flag: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", text, re.ASCII):
            raise ConfigError(f"{flag} is {text!r}, which is no name of one")
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
