"""Curves of a run in object storage."""

import shlex

from spectral_pod.train.event_files import how_to_view
from tests import trainer
from tests.train.test_writers import write


def test_the_closing_hint_shows_them(server, bucket, tmp_path):
    write(tmp_path, 0, range(1, 10))
    for file in filter(lambda file: file.is_file(), tmp_path.rglob("*")):
        bucket.write(f"runs/a/{file.relative_to(tmp_path)}", file.read_bytes())
    command = shlex.split(how_to_view(f"{bucket.url}/runs/a").splitlines()[0])
    # Without TensorFlow, whose access to storage cannot be directed to this server.
    tags = trainer.tensorboard_tags(
        server.used_by(command), ("train", "validation"), env=trainer.environment()
    )
    assert tags.keys() == {"train", "validation"}
    assert tags["train"].keys() == {"metrics/loss", "speed/steps_per_second"}
    assert tags["validation"].keys() == {"metrics/loss"}
