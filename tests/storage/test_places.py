"""What users type is a place on disk or on gs://, or one message says what is wrong with it."""

import itertools
import os
import re
import sys

import pytest

from spectral_pod import storage
from spectral_pod.config import default
from spectral_pod.data import byte_store, store_lease
from spectral_pod.data.byte_store import Record
from spectral_pod.data.tasks import TASKS
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.validation import validate
from tests import trainer

PLACES = {
    "~/x": "/home/me/x",
    "~": "/home/me",
    "file:///x": "/x",
    "file:/x/": "/x",
    "FILE:///a%20b": "/a b",
    "/x//y/./": "/x/y",
    "//x": "/x",
    "./x": "x",
    "run:3": "./run:3",
    "./~": "./~",
    "./gs:": "./gs:",
    "x\u202fy": "x\u202fy",
    "GS://b/x": "gs://b/x",
    "gs://b/set/": "gs://b/set",
    "gs://b//a///./c//": "gs://b/a/c",
    "gs://b/a/../c": "gs://b/c",
}
REFUSED = {
    "": "must not be empty",
    "  ": "must not be empty",
    "~nobody-here/x": "no such home folder",
    "gs:/typo": "gs://BUCKET/FOLDER, with two slashes",
    "gs:typo": "with two slashes",
    "gs:///x": "with two slashes",
    "gs://Bucket/x": "a bucket has a name",
    "gs://b": "a whole bucket; name a folder below it, such as gs://b/run",
    "gs://b/": "a whole bucket",
    "gs://b/a/..": "a whole bucket",
    "gs://b/../x": "leaves its bucket",
    "/": "the whole disk",
    "file:///": "the whole disk",
    "file://x": "file:///FOLDER",
    "s3://b/x": "s3: is not supported; give a path on this disk, or gs://BUCKET/FOLDER",
    "host:/x": "host: is not supported",
    " x": "begins or ends with a space",
    "x /": "begins or ends with a space",
    "a\0b": "control character",
    "a\nb": "control character",
    "file:///a%00b": "control character",
    "a\udcff": "not UTF-8",
    "a" * 256: "a name in it is longer than 255 bytes",
    "gs://b/" + "a/" * 500: "longer than 800 bytes",
    None: "must be text",
    3: "must be text",
    b"x": "must be text",
}


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


def test_places(tmp_path):
    for text, place in PLACES.items():
        assert storage.place(text, "--workdir") == place
    assert storage.place(tmp_path, "workdir") == str(tmp_path)
    assert storage.place("gs://b", "--source", root=True) == "gs://b"


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_place_is_refused_by_the_name_of_its_flag(text):
    with pytest.raises(ConfigError, match="--workdir is ") as raised:
        storage.place(text, "--workdir")
    assert REFUSED[text] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_local_place():
    with pytest.raises(ConfigError, match="--json is 'gs://b/x'; it must be a path on this disk"):
        storage.place("gs://b/x", "--json", local=True)


def test_every_text_is_refused_or_a_place_that_stays_the_same():
    starts = ["", "~", "~/", "./", "../", "/", "//", "gs:", "gs://", "GS://b/", "file:", "file:///"]
    middles = ["", "a", "a/b", "a//b", "a/../b", "..", "a:b", "b-1", "%2F", "~", " ", "é"]
    ends = ["", "/", "//", "/.", "/..", " ", ":"]
    texts = {"".join(parts) for parts in itertools.product(starts, middles, ends)}
    accepted = 0
    for text in texts:
        try:
            place = storage.place(text, "--workdir")
        except ConfigError:
            continue
        accepted += 1
        assert storage.place(place, "--workdir") == place
        assert "//" not in place.removeprefix("gs://")
        assert not place.endswith("/")
        assert storage.is_remote(place) == text.lower().startswith("gs:")
    assert accepted > len(texts) / 4


def test_the_parent_of_a_link_is_that_of_its_target(tmp_path):
    (tmp_path / "target/below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "target/below")
    assert storage.place(f"{tmp_path}/link/../x", "--workdir") == f"{tmp_path}/target/x"


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in (".", "new", "new/below"):
        storage.check_access(f"{tmp_path}/{name}", write=True)
    for name, message in (
        ("file", "file is a file, and must be a folder"),
        ("file/run", f"file/run: {tmp_path}/file is a file"),
        ("link", "link is a link to '.*gone', which does not exist"),
        ("link/run", f"link/run: {tmp_path}/link is a link to"),
    ):
        with pytest.raises(UserError, match=message):
            storage.check_access(f"{tmp_path}/{name}", write=False)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    storage.check_access(f"{tmp_path}/new", write=False)
    with pytest.raises(UserError, match=f"new: {tmp_path} is a folder that you may not write to"):
        storage.check_access(f"{tmp_path}/new", write=True)


def test_fields_that_are_places():
    """All that are named so: a new one must state that it is a place."""
    for field in ("dir", "copies_dir"):
        for value, message in (("", "must not be empty"), ("s3://b", "s3: is not supported")):
            config = default()
            config.data.task = "listops"
            config.data[field] = value
            with pytest.raises(ConfigError, match=f"config.data.{field} is '.*{message}"):
                validate(config)
    config = default()
    config.data.task, config.data.stores = "listops", (("gs:/typo", 1.0),)
    with pytest.raises(ConfigError, match=r"config.data.stores is 'gs:/typo'"):
        validate(config)
    for task, option in [
        ("records", "train"), ("records", "validation"), ("records", "test"),
        *((name, "source") for name, task in TASKS.items() if "source" in task.annotations()),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"config.data.options.{option} is 's3://b/x'"):
            TASKS[task].from_options({option: "s3://b/x"})


@pytest.mark.parametrize("workdir", ["", "gs:/typo"])
def test_a_run_writes_nowhere_else(workdir):
    before = set(os.listdir(trainer.ROOT)), set(os.listdir("/"))
    done = trainer.run(trainer.command(workdir), code=2)
    (line,) = done.stderr.strip().splitlines()
    assert re.match(f"ConfigError: --workdir is '{workdir}'; ", line)
    assert (set(os.listdir(trainer.ROOT)), set(os.listdir("/"))) == before


EXPORTED = """
import sys
import jax, numpy as np
from spectral_pod import SpectralGPT
from tests.tiny_run import tiny_config, write_run
from tools import export

workdir, output = sys.argv[1:]
write_run(workdir, tiny_config(**{"model.num_layers": 1}))
arguments = [f"--workdir={workdir}", f"--output={output}/"]
assert export.main(arguments) == 0
models = SpectralGPT.from_checkpoint(workdir), SpectralGPT.from_export(output)
jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))
assert export.main(arguments) == 2  # it holds something already
assert export.main([*arguments[:1], f"--output={output}-2", "--upload=me/model"]) == 2
"""


@pytest.mark.slow
def test_a_model_is_exported_to_a_bucket(server, bucket, tmp_path):
    command = [sys.executable, "-c", EXPORTED, str(tmp_path / "run"), f"{bucket.url}/a/model"]
    trainer.run(server.used_by(command))
    names = ["a/model/README.md", "a/model/config.json", "a/model/model.safetensors"]
    assert bucket.names() == names
    assert not (trainer.ROOT / "gs:").exists()


def test_the_files_of_a_bucket_are_below_no_slash():
    assert storage.kvstore_spec("gs://b")["path"] == ""
    assert storage.kvstore_spec("gs://b/x")["path"] == "x/"


def test_a_store_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with store_lease.hold("new"):
        byte_store.write("new", {"train": [Record(b"x", 0)]}, classes=["a"], provenance={})
    assert len(byte_store.ByteStore("new").split("train")) == 1
