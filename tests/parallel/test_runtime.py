"""How processes join, and how their facts are compared, without starting any."""

import pytest
from jax._src import cloud_tpu_init

from spectral_pod.errors import CheckpointError, ConfigError
from spectral_pod.parallel import backend, runtime

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip
NUMBERED = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}


@pytest.fixture
def joined(monkeypatch):
    """The arguments that `initialize` passes to JAX in an environment; None if it joins no one."""

    def ask(variables, *arguments, tpu=False, **options):
        asked = []
        monkeypatch.setattr(
            runtime.jax.distributed, "initialize", lambda *a, **k: asked.append((a, k))
        )
        monkeypatch.setattr(runtime, "_client", lambda: Unheard())
        monkeypatch.setattr(runtime, "_watch_key", lambda *_: None)
        monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", tpu)
        for name in (*SLURM, *NUMBERED, *ADDRESS, "JAX_COORDINATOR_BIND_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("JAX_PLATFORMS", "tpu" if tpu else "cpu")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        runtime.initialize(*arguments, **options)
        return asked[0] if asked else None

    return ask


class Unheard:
    def key_value_set(self, *_, **__):
        pass


def test_one_process_joins_nobody(joined):
    assert joined({}) is None
    assert joined({}, None, 1, 0) is None
    assert joined(NUMBERED | ADDRESS, None, 1, 0) is None  # as a tool does, next to a run


def test_flags_go_before_the_environment(joined):
    (address, count, index), options = joined(NUMBERED | ADDRESS)
    assert (address, count, index) == ("10.0.0.1:1234", 4, 2)
    assert options["coordinator_bind_address"] == "10.0.0.1:1234"  # that interface only
    (address, count, index), options = joined(NUMBERED | ADDRESS, "h:1", 2, 0, "10.0.0.9:1")
    assert (address, count, index) == ("h:1", 2, 0)
    assert options["coordinator_bind_address"] == "10.0.0.9:1"


def test_platforms_are_asked_by_jax(joined):
    assert joined(SLURM)[0] == (None, None, None)
    assert joined({}, tpu=True)[0] == (None, None, None)
    assert joined(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert joined({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}) is None  # no srun


@pytest.mark.parametrize(
    ("variables", "arguments", "named"),
    [
        ({}, (None, 2, 0), "--coordinator_address"),
        ({}, ("h:1", None, 0), "--num_processes=None"),
        ({}, ("h:1", 2, 2), "--process_id=2"),
        ({"JAX_NUM_PROCESSES": "two"}, (), "JAX_NUM_PROCESSES"),
    ],
)
def test_contradictions_are_named(joined, variables, arguments, named):
    with pytest.raises(ConfigError, match=named):
        joined(variables, *arguments)


def test_the_odd_one_out_is_named():
    facts = {i: {"seed": "0", "code": "a"} for i in range(5)}
    facts[3] = {"seed": "0", "code": "b"}
    facts[4] = {"code": "a"}
    assert runtime.differences(facts, str) == [
        "  [3]: code is b, not a",
        "  [4]: seed is nothing, not 0",
    ]
    assert runtime.differences({0: {"a": "x"}, 1: {"a": "y"}}, str) == ["  [1]: a is y, not x"]
    assert runtime.differences({0: {"a": "x"}, 1: {"a": "x"}}, str) == []


def test_another_platform_than_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")  # JAX would fall back to the second
    with pytest.raises(ConfigError, match="asks for cuda"):
        backend.check_platform()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    backend.check_platform()
    monkeypatch.delenv("JAX_PLATFORMS")
    backend.check_platform()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error: Connection reset by peer",
            True,
        ),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: save", True),
        ("UNAVAILABLE: Error reading gs://b/o: Connection reset by peer", False),
        ("RESOURCE_EXHAUSTED: Out of memory", False),
        ("'NoneType' object has no attribute 'shape'", False),
    ],
)
def test_a_lost_peer_is_not_confused_with_other_errors(monkeypatch, text, lost):
    monkeypatch.setattr(runtime, "num_processes", lambda: 2)
    assert runtime.is_peer_loss(ValueError(text)) == lost
    assert runtime.is_peer_loss(CheckpointError(f"cannot write step 3: {text}")) == lost
    monkeypatch.setattr(runtime, "num_processes", lambda: 1)
    assert not runtime.is_peer_loss(ValueError(text))


def test_only_several_processes_must_ask_together_whether_to_stop(monkeypatch):
    preemption, asked = runtime.Preemption(), []
    for received in (False, True):
        assert [preemption.reached(together=together) for together in (True, False)] == [
            received,
            received,
        ]
        preemption.received.set()
    monkeypatch.setattr(runtime, "num_processes", lambda: 2)
    monkeypatch.setattr(
        runtime.multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or True
    )
    assert not preemption.reached(together=False)
    assert preemption.reached()
    assert preemption.reached()
    assert asked == [1, 2]
