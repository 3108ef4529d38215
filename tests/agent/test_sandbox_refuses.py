"""Where code cannot be confined as asked for, there is no sandbox, and it says why."""

import pathlib

import pytest

from spectral_pod.agent import sandbox
from spectral_pod.agent.sandbox import Limits, Sandbox, SandboxError
from spectral_pod.errors import ConfigError


def test_without_bubblewrap_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"not installed; install bubblewrap.*'rlimits'"):
        Sandbox()
    with pytest.raises(ConfigError, match="sandbox is 'none'; known are"):
        Sandbox("none")


def test_where_bubblewrap_does_not_work_it_refuses(monkeypatch, tmp_path):
    program = tmp_path / "bwrap"
    program.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(
        SandboxError, match="No permissions to create new namespace; install bubble"
    ):
        Sandbox()


@pytest.mark.parametrize("machine", ["riscv64", "i686"])
def test_without_a_filter_of_system_calls_it_refuses(monkeypatch, tmp_path, machine):
    source = sandbox._PROGRAM.read_text().replace("platform.machine()", repr(machine))
    (tmp_path / "confined.py").write_text(source)
    monkeypatch.setattr(sandbox, "_PROGRAM", pathlib.Path(tmp_path / "confined.py"))
    with pytest.raises(SandboxError, match=f"'rlimits' does not work here.*{machine}"):
        Sandbox("rlimits")


@pytest.mark.parametrize("field", ["seconds", "memory_mb", "output_bytes", "file_mb"])
def test_limits_are_checked(field):
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        Limits(**{field: 0})


def test_times_are_bounded():
    with pytest.raises(ConfigError, match=r"seconds is 10000000000\.0; it must be below 1e9"):
        Limits(seconds=1e10)


def test_too_little_to_start():
    with pytest.raises(SandboxError, match=r"no time to start: .* after 0.001 s; give it more"):
        Sandbox("rlimits", Limits(seconds=0.001))
    with pytest.raises(SandboxError, match="does not work here"):
        Sandbox("rlimits", Limits(memory_mb=1))
