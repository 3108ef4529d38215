"""Text generation by the command line, in separate processes.

The flags of several tools conflict within a process, so this file is also a script that tests them.
"""

import json
import sys

import pytest

from spectral_pod import SpectralGPT
from spectral_pod.errors import UserError
from tests import processes, trainer
from tests.multidevice import fake_devices
from tests.tiny_run import tiny_config, write_run


def generate(*arguments, code=0):
    """What the tool prints, (stdout, stderr), which must end with `code`."""
    command = [sys.executable, "-m", "tools.generate", *map(str, arguments)]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, timeout=300
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stderr.decode()}"
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, tiny_config(**{"model.num_layers": 1}))
    return workdir


@pytest.fixture(scope="module")
def expected(workdir):
    return SpectralGPT.from_checkpoint(str(workdir)).generate("é\n", max_length=60, top_k=200)


def test_a_batch(workdir, expected, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "\\u00e9\\n"}\n{"prompt": "another, longer one", "id": 1}\n')
    stdout, stderr = generate(
        f"--workdir={workdir}", f"--batch={prompts}", "--num_bytes=60", "--top_k=200"
    )
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["é\n", "another, longer one"]
    assert lines[0]["text"] == expected
    assert lines[1]["text"]
    assert stderr.splitlines()[-1].endswith("bytes/s")


def test_a_stream(workdir, expected):
    stop = next(c for c in expected[20:] if c.isascii() and c.isprintable())
    flags = f"--workdir={workdir}", "--prompt=é\n", "--num_bytes=60", "--top_k=200", "--stream"
    assert generate(*flags)[0] == expected + "\n"
    assert generate(*flags, f"--stop={stop}")[0] == expected.partition(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=/no/such/run", "--prompt=x"], "/no/such/run is no workdir"),
        (["--prompt=x"], "workdir"),
        (["--workdir=x", "--prompt=x", "--num_byte=3"], "Unknown command line flag 'num_byte'"),
    ],
)
def test_one_message(arguments, message):
    stdout, stderr = generate(*arguments, code=2)
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert stdout == ""


# ---- what the flags may be, in one process

BATCHES = {
    '{"prompt": "a"}\n{"prompt": "b"}': ["a", "b"],
    '{"prompt": "a"}\n{"prompt": ""}': "prompts.jsonl:2 is not",
    '{"prompt": 3}': "prompts.jsonl:1 is not",
    '["prompt"]': "prompts.jsonl:1 is not",
    '{"prompt"}': "prompts.jsonl:1 is not",
    '{"text": "a"}': "prompts.jsonl:1 is not",
    "": "holds no lines",
}
PROMPTS = {
    ("a\n", None): ["a\n"],
    ("", None): "--prompt is empty; give at least one byte",
    (None, None): "either --prompt=TEXT or --batch=FILE",
    ("a", "file"): "either --prompt=TEXT or --batch=FILE",
    (None, "file"): "--stream",
}
MESHES = {
    "": None,
    "tensor=2,fsdp=4": {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2},
    "data=2": {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1},
    "data=16": "needs 16 devices, and there are 8",
    "sequence=2": "'sequence=2' is not AXIS=SIZE",
    "data": "'data' is not AXIS=SIZE",
    "data=0": "'data=0' is not AXIS=SIZE",
}


def answers(folder):
    """Of every case what the function of the tool returns, or its message."""
    from tools import generate as tool
    from tools import trained_model

    def batch(text):
        with open(f"{folder}/prompts.jsonl", "w") as file:
            file.write(text)
        return prompt((None, f"{folder}/prompts.jsonl"), stream=False)

    def prompt(flags, stream=True):
        return [prompt.decode() for prompt in tool.read_prompts(*flags, stream=stream)]

    def mesh(text):
        mesh = trained_model.mesh_of(text)
        return mesh and dict(mesh.shape)

    def outcome(function, case):
        try:
            return function(case)
        except UserError as error:
            return str(error)

    cases = [(batch, BATCHES), (prompt, PROMPTS), (mesh, MESHES)]
    return [outcome(function, case) for function, table in cases for case in table]


def test_what_the_flags_may_be(tmp_path):
    expected = [*BATCHES.values(), *PROMPTS.values(), *MESHES.values()]
    for answer, want in zip(fake_devices.run(__file__, "answers", str(tmp_path)), expected):
        assert want in answer if isinstance(want, str) else want == answer


if __name__ == "__main__":
    fake_devices.main(answers)
