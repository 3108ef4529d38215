import pytest

from tests.launch.pod import Pod


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.cloud.switch_off(tmp_path)  # what a failed test left, too
