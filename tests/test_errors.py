"""Errors of storage and of limits, whatever raises them: told from bugs, with what to do."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts

from spectral_pod.errors import (
    ConfigError,
    NonFiniteError,
    StorageError,
    UserError,
    naming,
    storage_error,
)
from tests.processes import ROOT


def raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


OF_STORAGE = [
    "ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "EROFS", "ENOENT",
    "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG", "EIO", "ENXIO", "ENODEV", "ESTALE",
    "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_STORAGE)
def test_an_error_of_storage_names_file_cause_and_cure(name):
    number = getattr(errno, name)
    text = os.strerror(number)
    for error in (
        OSError(number, text),  # as `write` raises it, without the file
        OSError(number, text, "/disk/file"),
        ValueError(f"DATA_LOSS: Error writing \"/disk/file\": {text} [os_error_code='{number}']"),
        RuntimeError(f"/disk/file; {text}"),  # as TensorFlow's file system does
        raised(ValueError("the save failed"), OSError(number, text, "/disk/file")),
        ExceptionGroup("tasks", [ValueError("one"), OSError(number, text)]),
    ):
        found = storage_error(error, "/disk/file")
        assert isinstance(found, StorageError)
        assert found.exit_code == UserError.exit_code
        assert str(found).count("/disk/file") == 1
        assert text in str(found)
        assert str(found).endswith(", and start again")
        with pytest.raises(OSError, match="/disk/file"), naming("/disk/file"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes (2,) and (3,)"), KeyError("step"), OSError(errno.EBADF, "a bug"),
        OSError(errno.EINVAL, "Invalid argument"), AssertionError(), RecursionError("too deep"),
        raised(ValueError("no"), KeyError("x")), ExceptionGroup("tasks", [TypeError("x")]),
    ],
)  # fmt: skip
def test_a_bug_is_no_error_of_storage(error):
    assert storage_error(error, "/disk/file") is None
    with pytest.raises(type(error)) as caught, naming("/disk/file"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [ConfigError("no such field"), NonFiniteError("step 3")])
def test_an_error_with_its_own_exit_code_keeps_it(error):
    with pytest.raises(type(error)) as caught, naming("/disk/file"):
        raise error
    assert caught.value is error


def test_what_tensorstore_raises_is_recognised(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/array/"}}
    array = ts.open(spec, create=True, dtype=ts.uint8, shape=[1 << 16]).result()
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = f"{tmp_path}.*File too large.*ulimit -f"
        with pytest.raises(StorageError, match=message), naming(tmp_path):
            array.write(noise).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("module", ["spectral_pod.main", "tools.records", "launch.tpu_pod"])
def test_a_python_without_the_packages(module):
    """Trainer and tools say how they are installed; the launcher of TPUs needs none of them."""
    command = [sys.executable, "-S", "-m", module]  # -S: without site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert ("launch/setup.sh" in line) == (module != "launch.tpu_pod")
