"""The stand-in for gcloud accepts what the real one does."""

import os
import re
import shutil
import subprocess
import tempfile

import pytest

from tests.launch import gcloud
from tests.launch.pod import ROOT

# --------------------------------------------------------------------- the stand-in is honest


@pytest.mark.parametrize("command", gcloud.COMMANDS)
def test_stand_in_accepts_what_gcloud_does(command):
    """Its flags are the real ones. The real program's own answer is that nobody is logged in."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed here: the stand-in's flags are not checked")
    with tempfile.TemporaryDirectory() as config:
        environment = os.environ | {"CLOUDSDK_CONFIG": config, "CLOUDSDK_CORE_PROJECT": "project-1"}
        count, own, _ = gcloud.COMMANDS[command]
        for flags in choices(own):
            argv = ["gcloud", *command.split(), *[POSITIONAL.get(command, "tpu")] * count]
            argv += [f"{flag}={VALUES.get(flag, 'a')}" if own[flag] else flag for flag in flags]
            if "scp" in command:
                argv[-len(flags) - 2 : -len(flags)] = ["file", "tpu:file"]
            done = subprocess.run(
                [*argv, "--quiet"], capture_output=True, text=True, env=environment
            )
            assert done.returncode != 2, done.stderr
            assert not re.search("unrecognized|Invalid|must be|Must be", done.stderr), done.stderr


POSITIONAL = {
    "storage ls": "gs://a/b", "storage buckets describe": "gs://a",
    "iam service-accounts describe": "a@b.iam.gserviceaccount.com", "config get-value": "project",
}  # fmt: skip
VALUES = {
    "--zone": "us-central2-b", "--node-count": "2", "--valid-until-duration": "86400s",
    "--ssh-flag": "-oConnectTimeout=20", "--scp-flag": "-oConnectTimeout=20",
    "--labels": "a=b,c=d", "--metadata": "a=b,c=d", "--data-disk": "source=a,mode=read-only",
    "--metadata-from-file": f"startup-script={ROOT / 'launch/pod/guard.sh'}",
    "--scopes": "https://www.googleapis.com/auth/cloud-platform", "--worker": "0,1",
    "--filter": "status:ACTIVE", "--command": "a b; c",
}  # fmt: skip


def choices(flags):
    """The flags, without those that exclude others: one choice for each of these."""
    alternatives = [{"--node-id"}, {"--node-count", "--node-prefix"}]
    if "--node-id" not in flags:
        return [
            [
                flag
                for flag in flags
                if flag != "--internal-ip" or "--tunnel-through-iap" not in flags
            ]
        ]
    return [[flag for flag in flags if flag not in other] for other in alternatives]
