"""The client of `tools/peers/peers.py`, which runs other libraries in their own interpreter.

The peer process inherits the pinning and waits on its standard input between requests, so its
repetitions interleave with those of this process on the same cores.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from spectral_pod.errors import ConfigError

from .timing import Case, Seconds

_SERVER = Path(__file__).parents[1] / "peers" / "peers.py"


class Peers:
    """A running peer process; `python` is an interpreter with `tools/peers/requirements.txt`."""

    def __init__(self, python: str, threads: int):
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        try:
            self._process = subprocess.Popen(
                [python, str(_SERVER), f"--threads={threads}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise ConfigError(f"--peers={python} cannot be started: {error}") from error
        self.versions: dict[str, str] = self._answer("the start")

    def case(self, peer: str, what: str, sizes: dict[str, Any], **fields: Any) -> Case:
        """A case that the peer of that name runs."""
        shape = " ".join(f"{name}={size}" for name, size in sizes.items())
        return Case(peer, what, shape, lambda: self._run(peer, sizes), **fields)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _run(self, peer: str, sizes: dict[str, Any]) -> Seconds:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"peer": peer, "sizes": sizes}) + "\n")
        self._process.stdin.flush()
        answer = self._answer(peer)
        return Seconds(wall=answer["wall_ms"] / 1e3, cpu=answer["cpu_ms"] / 1e3)

    def _answer(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(
                f"the peer process ended at {what}, see above; --peers wants an interpreter with "
                "the packages of tools/peers/requirements.txt"
            )
        return json.loads(line)
