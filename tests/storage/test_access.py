"""Problems with a gs:// URL are reported at start-up, in one line that says what to do."""

import json
import re
import sys

import pytest

from spectral_pod import storage
from tests import trainer

CHECK = """
import sys
from spectral_pod import storage
from spectral_pod.errors import UserError

storage._START_TIMEOUT = float(sys.argv[3])
try:
    storage.check_access(sys.argv[1], write=sys.argv[2] == "write")
except UserError as error:
    sys.exit(f"UserError: {error}")
"""
NO_VARIABLES = ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")


def check(url, intent, seconds=60):
    return [sys.executable, "-c", CHECK, url, intent, str(seconds)]


def message(command):
    """The single line that a failing command prints, in an interpreter of its own."""
    done = trainer.run(command, code=1, forked=False)
    (line,) = done.stderr.strip().splitlines()
    return line


def test_folders_need_no_check(tmp_path):
    storage.check_access(str(tmp_path / "absent"), write=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("intent", ["read", "write"])
def test_a_bucket_that_can_be_used_is_left_as_it_was(server, bucket, intent):
    bucket.write("run/config.json", b"{}")
    trainer.run(server.used_by(check(f"{bucket.url}/run", intent)))
    assert bucket.names() == ["run/config.json"]


def test_a_missing_bucket(server):
    said = message(server.used_by(check("gs://no-such-bucket/run", "write")))
    assert re.match(r"UserError: gs://no-such-bucket/run: there is no bucket 'no-such", said)
    assert "gcloud storage buckets create gs://no-such-bucket" in said


@pytest.mark.parametrize(
    ("intent", "faults", "parts"),
    [
        ("read", {"deny": 403}, ["may not read", "roles/storage.objectViewer", "gcloud auth"]),
        ("write", {"deny": 403}, ["may not write", "objectUser", "legacyBucketReader"]),
        ("write", {"deny": 403, "only": "^(POST|DELETE)"}, ["may not write", "objectUser"]),
        ("write", {"deny": 401}, ["credentials do not work", "gcloud auth application-default"]),
    ],
)
def test_a_bucket_that_may_not_be_used(proxy, bucket, intent, faults, parts):
    proxy.set(**faults)
    said = message(proxy.used_by(check(f"{bucket.url}/run", intent)))
    assert said.startswith(f"UserError: {bucket.url}/run: ")
    assert all(part in said for part in parts)


def alone(home, command, **variables):
    """A command that finds no credentials and does not use the network to look for them."""
    variables |= {"HOME": home, "NO_GCE_CHECK": "true"}
    unset = [word for name in NO_VARIABLES for word in ("-u", name)]
    return ["env", *unset, *(f"{name}={value}" for name, value in variables.items()), *command]


def test_no_credentials(tmp_path):
    said = message(alone(tmp_path, check("gs://bucket/run", "write")))
    assert re.match("UserError: gs://bucket/run: there are no Google Cloud credentials; log", said)
    assert "gcloud auth application-default login" in said


@pytest.mark.parametrize("intent", ["read", "write"])
def test_a_key_file_that_is_missing(tmp_path, intent):
    file = tmp_path / "key.json"
    command = alone(tmp_path, check("gs://bucket/run", intent), GOOGLE_APPLICATION_CREDENTIALS=file)
    assert re.search(f"there are no Google Cloud credentials; .*{file}", message(command))


def test_credentials_of_a_user_without_a_project(tmp_path):
    file = tmp_path / "user.json"
    secret = {"client_id": "a", "client_secret": "b", "refresh_token": "c"}
    file.write_text(json.dumps({"type": "authorized_user"} | secret))
    command = alone(
        tmp_path, check("gs://bucket/run", "write"), GOOGLE_APPLICATION_CREDENTIALS=file
    )
    assert "set GOOGLE_CLOUD_PROJECT" in message(command)


def test_outages_shorter_and_longer_than_the_start_timeout(proxy, bucket):
    proxy.set(outage_s=3)
    trainer.run(proxy.used_by(check(f"{bucket.url}/run", "write")))
    assert proxy.counts()["outage"] >= 1
    proxy.set(unavailable=1)
    said = message(proxy.used_by(check(f"{bucket.url}/run", "write", seconds=2)))
    assert "storage does not answer; check the network" in said


def test_the_trainer_says_so_before_anything_else(server):
    command = trainer.command("gs://no-such-bucket/run")
    done = trainer.run(server.used_by(command), code=2, forked=False)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("UserError: gs://no-such-bucket/run: there is no bucket")
    assert "Traceback" not in done.stderr
