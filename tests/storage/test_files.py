"""Files that several libraries read and write, on disk and on gs://."""

import os
import sys

import pytest
from etils import epath

from spectral_pod import storage
from tests import trainer

# A file that tensorstore writes after a listing must be visible; gcsfs would cache the listing.
PEERS = """
import sys
from spectral_pod import storage
import tensorstore
from etils import epath

folder = epath.Path(sys.argv[1])
storage.write_whole(folder / "a", "1")
assert [path.name for path in folder.iterdir()] == ["a"]
bucket, _, path = sys.argv[1].removeprefix("gs://").partition("/")
spec = {"driver": "gcs", "bucket": bucket, "path": path + "/"}
kvstore = tensorstore.KvStore.open(spec, context=tensorstore.Context(storage.context())).result()
for name in "ab":
    kvstore.write(name, b"12345").result()
assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
assert (folder / "a").stat().length == 5
assert (folder / "b").read_text() == "12345"
"""


def test_what_another_library_writes_is_seen(server, bucket):
    command = [sys.executable, "-c", PEERS, f"{bucket.url}/folder"]
    trainer.run(server.used_by(command))
    assert bucket.names() == ["folder/a", "folder/b"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "config.json"
    storage.write_whole(file, "first")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(storage.failures()):
            storage.write_whole(file, "second")
    assert file.read_text() == "first"
    storage.write_whole(file, "second")
    assert file.read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
