"""The JobSet that tools/gke.py writes: valid, of the right size, and it restarts what it should."""

import json
import os
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
RDMA = ("--gpu=nvidia-h200-141gb", "--num_nodes=2")
CONFIG = "--config=configs/quickstart.py"


def batch(rows):
    return [f"--config.train.{field}={rows}" for field in ("global_batch_size", "eval_batch_size")]


FLAGS = (CONFIG, *batch(3 * 512))  # which all slices here divide


def jobset(capsys, *options, flags=FLAGS, name="run", code=0):
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


ENV = ("--env=A=b", "--env=KEY", "--secret=keys")
OPTIONS = [TPU, GPU, RDMA, (*TPU, "--spot"), ("--topology=v6e-1",), (*GPU, *ENV)]


@pytest.mark.parametrize("options", OPTIONS)
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


TEXTS = ["a b.txt", '{"y": "$(HOME)"}', "$$name", "'é: 😀 #'", "- [*&!|>%@`", "\\n\n\t", "null"]


@pytest.mark.parametrize("options", [TPU, RDMA])
def test_arguments_arrive_as_they_were_given(capsys, options):
    """In two fields of the configuration, which take any text; the last value counts."""
    fields = ["train.wandb_project", "train.sample_prompt"]
    flags = [f"--config.{fields[i % 2]}={text}" for i, text in enumerate(TEXTS)]
    document = jobset(capsys, *options, flags=[*FLAGS, *flags])
    arrived = container(document)["args"]
    workdir = "--workdir=gs://bucket/run"
    assert [expanded(argument) for argument in arrived] == [workdir, *FLAGS, *flags]
    assert container(document)["command"][-3:] == ["python", "-m", "spectral_pod.main"]
    for word in (*arrived, *container(document)["command"]):
        assert not re.search(r"(?<!\$)(\$\$)*\$\(", word)


def test_gpu_nodes_find_their_coordinator(capsys):
    document = jobset(capsys, *GPU, "--gpus_per_node=4")
    (replicated,) = document["spec"]["replicatedJobs"]
    assert (replicated["replicas"], job(document)["completions"]) == (1, 2)
    assert container(document)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    env = variables(document)
    # JobSet's name of a pod, below a service with the JobSet's own name.
    host = f"{document['metadata']['name']}-{replicated['name']}-0-0.{document['metadata']['name']}"
    port = re.fullmatch(rf"{re.escape(host)}:(\d+)", env["JAX_COORDINATOR_ADDRESS"]["value"])[1]
    assert env["JAX_COORDINATOR_BIND_ADDRESS"]["value"] == f"0.0.0.0:{port}"
    assert env["JAX_NUM_PROCESSES"]["value"] == "2"
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    alone = variables(jobset(capsys, "--gpu=nvidia-a100-80gb"))
    assert [name for name in alone if name.startswith("JAX_")] == []


def variables(document):
    return {variable["name"]: variable for variable in container(document)["env"]}


@pytest.mark.parametrize("options", [GPU, RDMA, ("--gpu=nvidia-l4", "--gpus_per_node=1")])
def test_gpu_pods_find_the_driver(capsys, options):
    """Where GKE's device plugin mounts it."""
    path = variables(jobset(capsys, *options))["LD_LIBRARY_PATH"]["value"].split(":")
    assert path[0] == "/usr/local/nvidia/lib64"
    assert "LD_LIBRARY_PATH" not in variables(jobset(capsys, *TPU))


def test_nodes_with_rdma_use_it(capsys, tmp_path):
    document = jobset(capsys, *RDMA)
    annotations = job(document)["template"]["metadata"]["annotations"]
    interfaces = json.loads(annotations["networking.gke.io/interfaces"])
    assert interfaces[0] == {"interfaceName": "eth0", "network": "default"}
    assert [i["network"] for i in interfaces[1:]] == [f"rdma-{i}" for i in range(8)]
    mounts = {mount["mountPath"]: mount["name"] for mount in container(document)["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod(document)["volumes"]}
    gib = volumes[mounts["/usr/local/gib"]]
    assert gib == {"hostPath": {"path": "/home/kubernetes/bin/gib"}}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}}
    assert volumes.keys() == set(mounts.values())

    # The script's variables reach the trainer, which takes the place of the shell.
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/set_nccl_env.sh").write_text("export NCCL_NET=gIB\n")
    trainer = tmp_path / "python"
    trainer.write_text('#!/usr/bin/env bash\necho $$ "$NCCL_NET"; printf "%s\\0" "$@"; exit 75\n')
    trainer.chmod(0o755)
    words = [*container(document)["command"], "--config=a b"]
    command = [expanded(word).replace("/usr/local/gib", str(tmp_path)) for word in words]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    said, arguments = process.communicate()[0].split("\n")
    assert said == f"{process.pid} gIB"
    assert arguments == "-m\0spectral_pod.main\0--config=a b\0"
    assert process.returncode == 75

    # Without Google's installer on the node nothing starts, rather than over TCP.
    (tmp_path / "scripts/set_nccl_env.sh").unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "set_nccl_env.sh" in done.stderr


@pytest.mark.parametrize("options", [GPU, (*RDMA, "--tcp"), ("--gpu=nvidia-h200-141gb",)])
def test_other_nodes_do_not(capsys, options):
    document = jobset(capsys, *options)
    assert container(document)["command"] == ["python", "-m", "spectral_pod.main"]
    assert job(document)["template"]["metadata"]["annotations"] == {}
    assert len(pod(document)["volumes"]) == 1
    assert pod(document)["containers"][0]["securityContext"]["runAsNonRoot"]


TCP = [
    (GPU, r"2 nodes will communicate over plain TCP; for GPUDirect-TCPX, .* see cloud.google.com/"),
    (("--gpu=nvidia-h100-mega-80gb", "--num_nodes=3"), "3 nodes.*GPUDirect-TCPXO"),
    ((*RDMA, "--tcp"), "plain TCP$"),
    (("--gpu=nvidia-l4", "--num_nodes=2"), "plain TCP$"),
    (RDMA, ""),
    (("--gpu=nvidia-h100-80gb",), ""),
    (TPU, ""),
]


@pytest.mark.parametrize(("options", "warning"), TCP)
def test_slow_networks_are_announced(capsys, options, warning):
    command = ["--name=run", "--image=i", "--workdir=gs://b/r", *options]
    assert gke.main([*command, "--", CONFIG, *batch(768)]) == 0
    said = capsys.readouterr().err
    assert bool(said) == bool(warning)
    assert re.search(warning, said.strip())


def test_environment(capsys):
    options = ["--env=A=b=$(c)", "--env=EMPTY=", "--env=WANDB_API_KEY", "--secret=keys"]
    env = variables(jobset(capsys, *GPU, *options, "--env=LD_LIBRARY_PATH=/mine"))
    assert expanded(env["A"]["value"]) == "b=$(c)"
    assert "$(" not in env["A"]["value"].replace("$$", "")
    assert env["EMPTY"]["value"] == ""
    assert env["WANDB_API_KEY"] == {
        "name": "WANDB_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY"}},
    }
    assert env["LD_LIBRARY_PATH"]["value"] == "/mine"  # in place of our own


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
    (("--topology=v4-100",), "the nearest: v4-"),
    (("--topology=cpu-8",), "no TPU slice"),
    (("--topology=v6e-4", "--num_slices=2"), "larger --topology"),
    ((*TPU, "--workdir=/runs/1"), "gs://"),
    ((*TPU, "--name=Run_1"), "lower-case"),
    ((*TPU, "--num_nodes=2"), "--num_nodes"),
    (("--gpu=nvidia-l4", "--num_slices=2"), "--num_slices"),
    (("--gpu=nvidia-l4", "--gpus_per_node=0"), "--gpus_per_node"),
    ((*TPU, "--tcp"), "--tcp"),
    ((*TPU, "--env=1x=2"), "--env"),
    ((*TPU, "--env=KEY"), "--secret"),
    ((*TPU, "--secret=Keys"), "lower-case"),
    ((*TPU, f"--service_account={254 * 'a'}"), "253 at most"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "complaint"), MISTAKES)
def test_mistakes_are_named(capsys, options, complaint):
    assert complaint in jobset(capsys, *options, code=2)


TRAINER = [
    # Flags of the trainer; they are on the 128 chips of TPU.
    (["--confg=x.py"], "flag 'confg'"),
    ([CONFIG, "--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
    ([CONFIG, "config.train.total_steps=1"], "unexpected argument"),
    (["--config=configs/quikstart.py"], "the config file cannot be read"),
    ([CONFIG, "--config.train.totl_steps=5"], "did you mean 'total_steps'"),
    ([CONFIG, "--config.train.total_steps=five"], "invalid literal for int"),
    ([CONFIG, "--config.data.options.trian=5"], "data.options.trian is unknown"),
    ([CONFIG, "--config.model.name=spectral_gtp"], "'spectral_gpt'"),
    ([CONFIG], "global_batch_size is 16, not divisible by mesh.data x mesh.fsdp"),
    ([CONFIG, *batch(128), "--config.mesh.data=64"], "64 devices, and there are 128"),
    ([CONFIG, *batch(128), "--config.mesh.data=1", "--config.mesh.fsdp=128"], "not divisible"),
    ([CONFIG, *batch(128), "--workdir=gs://bucket/other"], "--workdir=gs://bucket/other after --"),
]


@pytest.mark.parametrize(("flags", "complaint"), TRAINER)
def test_the_trainers_flags_are_checked_as_it_does(capsys, flags, complaint):
    assert complaint in jobset(capsys, *TPU, flags=flags, code=2)


def test_a_mesh_must_hold_the_slices(capsys):
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=16"]
    options = ["--topology=v5e:2x4", "--num_slices=2"]
    assert "2 slices" in jobset(capsys, *options, flags=[CONFIG, *batch(16), *mesh], code=2)
    jobset(capsys, "--topology=v5e:4x4", flags=[CONFIG, *batch(16), *mesh])


def test_gpus_are_counted(capsys):
    flags = [CONFIG, *batch(12)]
    jobset(capsys, *GPU, "--gpus_per_node=6", flags=flags)
    assert "= 16" in jobset(capsys, *GPU, flags=flags, code=2)


def test_what_the_trainer_takes_is_accepted(capsys):
    """Flags of its libraries too, and a config of another task."""
    flags = ["--config=configs/lra_listops.py", *batch(128), "--verbosity=1", "--noeval_only"]
    jobset(capsys, *TPU, flags=flags)
    preset = ["--config=configs/lm_shakespeare.py:gpu", *batch(128)]
    jobset(capsys, *TPU, flags=preset)
