"""The JobSet that tools/gke.py writes: valid, of the right size, and it restarts what it should."""

import re
import subprocess

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from spectral_pod.analysis import hardware
from tests.trainer import ROOT
from tools import gke

TPU = ("--topology=v5p:4x4x4", "--num_slices=2")
GPU = ("--gpu=nvidia-h100-80gb", "--num_nodes=2")


def jobset(capsys, *options, flags=("--config=configs/quickstart.py",), name="run", code=0):
    """The JobSet that the command writes; where `code` is not 0, its complaint."""
    command = [f"--name={name}", "--image=pkg.dev/me/image:1", "--workdir=gs://bucket/run"]
    assert gke.main([*command, *options, "--", *flags]) == code
    written = capsys.readouterr()
    return written.err if code else yaml.safe_load(written.out)


def job(document):
    (replicated,) = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod(document):
    return job(document)["template"]["spec"]


def container(document):
    (only,) = pod(document)["containers"]
    return only


@pytest.mark.parametrize("options", [TPU, GPU, (*TPU, "--spot"), ("--topology=v6e-1",)])
def test_it_is_a_jobset_by_the_schema(capsys, options):
    """These models drop fields that JobSets, Jobs and Pods don't have, and fail at wrong types."""
    document = jobset(capsys, *options)
    assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


SLICES = [
    # name in GKE, chips along each side, hosts of a slice, chips of a host
    ("v4-8", 1, ("tpu-v4-podslice", "2x2x1", 1, 4)),
    ("v4-128", 3, ("tpu-v4-podslice", "4x4x4", 16, 4)),
    ("v5litepod-1", 1, ("tpu-v5-lite-podslice", "1x1", 1, 1)),
    ("v5e:2x2", 1, ("tpu-v5-lite-podslice", "2x2", 1, 4)),
    ("v5e:2x4", 1, ("tpu-v5-lite-podslice", "2x4", 1, 8)),
    ("v5e:2x4", 2, ("tpu-v5-lite-podslice", "2x4", 2, 4)),
    ("v5e-256", 2, ("tpu-v5-lite-podslice", "16x16", 64, 4)),
    ("v5p:2x2x2", 1, ("tpu-v5p-slice", "2x2x2", 2, 4)),
    ("v6e:4x4", 1, ("tpu-v6e-slice", "4x4", 4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "num_slices", "expected"), SLICES)
def test_a_slice_is_a_job_and_a_host_a_pod(capsys, topology, num_slices, expected):
    document = jobset(capsys, f"--topology={topology}", f"--num_slices={num_slices}")
    (replicated,) = document["spec"]["replicatedJobs"]
    spec, selector = job(document), pod(document)["nodeSelector"]
    assert replicated["replicas"] == num_slices
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    chips = container(document)["resources"]["limits"]["google.com/tpu"]
    assert (*selector.values(), spec["completions"], chips) == expected
    total = hardware.parse(topology, num_slices).num_chips
    assert num_slices * spec["completions"] * chips == total
    (exclusive,) = document["metadata"]["annotations"].items()
    assert exclusive == (
        "alpha.jobset.sigs.k8s.io/exclusive-topology", "cloud.google.com/gke-nodepool"
    )  # fmt: skip


def curable():
    """The exit codes that launch/exit_codes.sh calls curable."""
    script = "source launch/exit_codes.sh; for ((c = 1; c < 256; c++)); do "
    script += 'if exit_is_curable "$c"; then echo "$c"; fi; done'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=True)
    return set(map(int, done.stdout.split()))


def outcome(document, code, conditions=()):
    """What becomes of the JobSet when a pod fails so: Kubernetes' rules, then JobSet's."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert job(document)["backoffLimit"] == 0
    assert pod(document)["restartPolicy"] == "Never"
    for rule in job(document)["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            on = rule["onExitCodes"]
            assert (on["containerName"], on["operator"]) == (container(document)["name"], "NotIn")
            why = f"failed with exit code {code}" if code not in on["values"] else ""
        else:
            on = [c["type"] for c in rule["onPodConditions"] if c["status"] == "True"]
            why = "".join(f"has condition {c}" for c in conditions if c in on)
        if why:
            assert rule["action"] == "FailJob"
            reason, message = "PodFailurePolicy", f"Pod default/run-slice-0-0-xyzzy {why} matching"
            break
    for rule in document["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("options", [TPU, GPU])
def test_what_restarts(capsys, options):
    document = jobset(capsys, *options, "--max_restarts=7")
    restarts = {code for code in range(1, 256) if outcome(document, code) == "RestartJobSet"}
    assert restarts == curable()
    assert {75, 76, 77, 134, 137, 139, 143} < restarts
    assert {outcome(document, code) for code in (1, 2, 3, 127, 130)} == {"FailJobSet"}
    preempted = {outcome(document, code, ["DisruptionTarget"]) for code in range(1, 256)}
    assert preempted == {"RestartJobSetAndIgnoreMaxRestarts"}
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod(document)["terminationGracePeriodSeconds"] >= 60


def expanded(argument):
    """As Kubernetes does with arguments where no variable is defined: $$ is $."""
    return argument.replace("$$", "$")


def test_arguments_arrive_as_they_were_given(capsys):
    flags = [
        "--config=a b.py", '--config.x={"y": "$(HOME)"}', "--config.z=$$name",
        "--config.u='é: 😀 #'", "--config.v=- [*&!|>%@`", "--config.w=\\n\n\t", "--config.n=null",
    ]  # fmt: skip
    document = jobset(capsys, *TPU, flags=flags)
    assert container(document)["command"] == ["python", "-m", "spectral_pod.main"]
    arrived = container(document)["args"]
    assert [expanded(argument) for argument in arrived] == ["--workdir=gs://bucket/run", *flags]
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", argument) for argument in arrived)


def test_gpu_nodes_find_their_coordinator(capsys):
    document = jobset(capsys, *GPU, "--gpus_per_node=4")
    (replicated,) = document["spec"]["replicatedJobs"]
    assert (replicated["replicas"], job(document)["completions"]) == (1, 2)
    assert container(document)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    env = {variable["name"]: variable for variable in container(document)["env"]}
    # JobSet's name of a pod, below a service with the JobSet's own name.
    host = f"{document['metadata']['name']}-{replicated['name']}-0-0.{document['metadata']['name']}"
    port = re.fullmatch(rf"{re.escape(host)}:(\d+)", env["JAX_COORDINATOR_ADDRESS"]["value"])[1]
    assert env["JAX_COORDINATOR_BIND_ADDRESS"]["value"] == f"0.0.0.0:{port}"
    assert env["JAX_NUM_PROCESSES"]["value"] == "2"
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert not container(jobset(capsys, "--gpu=nvidia-a100-80gb"))["env"]


def test_spot_nodes_and_accounts(capsys):
    document = jobset(capsys, *TPU, "--spot", "--service_account=trainer")
    assert pod(document)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [t["key"] for t in pod(document)["tolerations"]] == ["cloud.google.com/gke-spot"]
    assert pod(document)["serviceAccountName"] == "trainer"


def test_the_longest_name(capsys):
    longest = "a" * (63 - len("-slice-1-15-abcde"))
    assert jobset(capsys, *TPU, name=longest)["metadata"]["name"] == longest
    complaint = jobset(capsys, *TPU, name=f"{longest}a", code=2)
    assert f"{len(longest)} letters at most" in complaint


MISTAKES = [
    ((), "--topology"),
    ((*TPU, *GPU), "--topology"),
    (("--topology=v4-100",), "did you mean v4-"),
    (("--topology=cpu-8",), "no TPU slice"),
    (("--topology=v6e-4", "--num_slices=2"), "larger --topology"),
    ((*TPU, "--workdir=/runs/1"), "gs://"),
    ((*TPU, "--name=Run_1"), "lower-case"),
    ((*TPU, "--num_nodes=2"), "--num_nodes"),
    (("--gpu=nvidia-l4", "--num_slices=2"), "--num_slices"),
    (("--gpu=nvidia-l4", "--gpus_per_node=0"), "--gpus_per_node"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "complaint"), MISTAKES)
def test_mistakes_are_named(capsys, options, complaint):
    assert complaint in jobset(capsys, *options, code=2)
