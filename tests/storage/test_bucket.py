"""tools.bucket against a storage server: created buckets, and uploads that are resumed."""

import http.server
import json
import sys
import threading

import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from tests import trainer


def tool(name, *arguments):
    return [sys.executable, "-m", f"tools.{name}", *arguments]


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    splits = {"train": [Record(bytes([i]) * 50, i % 2) for i in range(20)]}
    byte_store.write(str(path), splits, classes=["a", "b"], provenance={})
    return path


def test_upload(server, bucket, store):
    target = f"{bucket.url}/sets/one"
    command = server.used_by(tool("bucket", "upload", str(store), target))
    num_files = len([path for path in store.rglob("*") if path.is_file()])
    assert f"{num_files} files" in trainer.run(command).stdout
    assert bucket.download("sets/one", store.parent / "back")
    byte_store.verify(str(store.parent / "back"))
    done = trainer.run(server.used_by(tool("records", "verify", target)))
    assert "is sound: 20 records" in done.stdout

    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"a"', '"c"'))  # of the same size
    bucket.write("sets/one/train/00000/labels/zarr.json", b"torn")
    assert "2 files, " in (output := trainer.run(command).stdout)
    assert f"{num_files - 2} were there" in output
    assert bucket.read("sets/one/manifest.json") == manifest.read_bytes()


def test_create(server):
    command = tool("bucket", "create", "gs://my-runs", "--location=us-central2", "--project=p")
    assert "gs://my-runs in us-central2" in trainer.run(server.used_by(command)).stdout
    assert json.loads(server.call("/storage/v1/b/my-runs"))["name"] == "my-runs"
    again = trainer.run(server.used_by(command), code=2)
    assert "gs://my-runs exists already" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_is_asked_of_storage():
    """The requests themselves, as the server of the other tests ignores locations and rules."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(asked[-1]).encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        command = tool("bucket", "create", "gs://b-1", "--location=eu", "--project=p")
        url = f"STORAGE_EMULATOR_HOST=http://127.0.0.1:{listener.server_port}"
        more = ["GOOGLE_AUTH_TOKEN_FOR_TESTING=x", "NO_GCE_CHECK=true"]
        trainer.run(["env", url, *more, *command, "--delete=scratch/:30"])
        listener.shutdown()
    (body,) = asked
    assert (body["name"], body["location"].lower()) == ("b-1", "eu")
    rule = {"action": {"type": "Delete"}, "condition": {"age": 30, "matchesPrefix": ["scratch/"]}}
    assert body["lifecycle"]["rule"] == [rule]
    assert body["iamConfiguration"]["uniformBucketLevelAccess"]["enabled"] is True
    assert body["iamConfiguration"]["publicAccessPrevention"] == "enforced"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "my-runs", "--location=eu"), "'my-runs' is no gs:// URL"),
        (("create", "gs://b", "--location=eu", "--project=p", "--delete=30"), "--delete=30; it is"),
        (("upload", "/no/such/file", "gs://b/x"), "/no/such/file does not exist"),
    ],
)
def test_mistakes(server, arguments, said):
    done = trainer.run(server.used_by(tool("bucket", *arguments)), code=2)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
