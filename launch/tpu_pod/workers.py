"""The hosts of a run: what runs on them is in launch/pod, and is started there over ssh."""

import dataclasses
import re
import shlex
from collections.abc import Iterable, Sequence

from .cloud import Cloud, CloudError, Node, Trouble, Worker
from .system import System

BUSY = 4  # exit code of install.sh and start.sh where they would disturb another run
POD = "spectral_pod/scripts/launch/pod"  # below the home of a worker
_STATES = ("running", "installing", "ended", "lost", "idle")
_BATCH = 64  # connections that one gcloud opens; more at once are prone to fail
_MARK = re.compile(r"spectral_pod: (\S+) (\d+)\.")  # printed last: the host, and its exit code


@dataclasses.dataclass(frozen=True)
class Report:
    """The trainer of one host."""

    host: str
    state: str  # running, installing, ended, lost (the host went down), idle (never started)
    detail: str  # pid or exit code
    progress: str


class Workers:
    """All hosts of the nodes of a run."""

    def __init__(self, cloud: Cloud, system: System):
        self._cloud, self._system = cloud, system
        self.all: list[Worker] = []

    def belong_to(self, nodes: Sequence[Node]) -> None:
        self.all = [Worker(n.name, i) for n in nodes for i in range(max(n.num_workers, 1))]

    def copy(self, file: str, target: str, workers: Sequence[Worker], limit: float) -> None:
        """Copies a file into the home of each, within `limit` seconds.

        A worker that it does not reach will fail to be installed.
        """

        def send(batch: tuple[str, str]) -> CloudError | None:
            try:
                self._cloud.copy(*batch, file, target, limit)
            except CloudError as error:
                return error
            return None

        self._complain(self._system.map(send, self._batches(workers)))

    def run(
        self, command: str, workers: Sequence[Worker], limit: float = 180.0
    ) -> dict[Worker, int]:
        """Runs a command on each, within `limit` seconds, and shows what it prints.

        Returns:
          The exit codes of those that answered.
        """
        codes: dict[Worker, int] = {}
        for batch, text in self._ask(command, workers, limit):
            for host, code in _MARK.findall(text):
                if (worker := self._worker(host, *batch)) is not None:
                    codes[worker] = int(code)
            for line in _MARK.sub("", text).splitlines():
                if line.strip():
                    self._system.show(line)
        return codes

    def reports(self) -> dict[Worker, Report]:
        """What the trainers do, by those that answered; nothing where nothing is installed."""
        found = {}
        for batch, text in self._ask(script("status.sh"), self.all, limit=180.0):
            for host, code in _MARK.findall(text):
                if (worker := self._worker(host, *batch)) is not None and code == "127":
                    found[worker] = Report(host, "idle", "-", "")
            for line in _MARK.sub("", text).splitlines():
                words = line.split(maxsplit=3)
                if len(words) < 3 or words[1] not in _STATES:
                    continue
                if (worker := self._worker(words[0], *batch)) is not None:
                    host, state, detail, *progress = words
                    found[worker] = Report(host, state, detail, " ".join(progress))
        return found

    def follow(self, worker: Worker) -> "Log":
        return Log(self._cloud, self._system, worker)

    def _ask(
        self, command: str, workers: Sequence[Worker], limit: float
    ) -> list[tuple[tuple[str, str], str]]:
        """The answer of each batch, without those that failed."""
        marked = f'{{ {command}; }} 2>&1; code=$?; echo "spectral_pod: $(hostname) $code."'

        def ask(batch: tuple[str, str]) -> str | CloudError:
            try:
                return self._cloud.reach(*batch, marked, limit)
            except CloudError as error:
                return error

        batches = self._batches(workers)
        answers = self._system.map(ask, batches)
        self._complain(one for one in answers if isinstance(one, CloudError))
        return [(batch, one) for batch, one in zip(batches, answers) if isinstance(one, str)]

    def _batches(self, workers: Sequence[Worker]) -> list[tuple[str, str]]:
        """Nodes, and which of their workers, as gcloud's --worker names them."""
        batches = []
        for node in dict.fromkeys(worker.node for worker in workers):
            there = [w.index for w in self.all if w.node == node]
            chosen = [w.index for w in workers if w.node == node]
            if len(chosen) == len(there) <= _BATCH:
                batches.append((node, "all"))
            else:
                parts = (chosen[i : i + _BATCH] for i in range(0, len(chosen), _BATCH))
                batches += [(node, ",".join(map(str, part))) for part in parts]
        return batches

    def _worker(self, host: str, node: str, workers: str) -> Worker | None:
        """Which worker a host is: TPU VMs are named after their number, t1v-n-1a2b3c4d-w-7."""
        if match := re.search(r"-w-(\d+)(\.|$)", host):
            return Worker(node, int(match[1]))
        chosen = [one.index for one in self.all if one.node == node]
        if workers != "all":
            chosen = [int(one) for one in workers.split(",")]
        return Worker(node, chosen[0]) if len(chosen) == 1 else None

    def _complain(self, errors: Iterable[CloudError | None]) -> None:
        """Shows each message once; credentials that have expired are for the caller to handle."""
        seen = {error.line: error for error in errors if error}
        for error in seen.values():
            if error.kind is Trouble.CREDENTIALS:
                raise error
        for line in seen:
            self._system.say(line)


class Log:
    """The log of one worker, each line once across connections that are lost."""

    def __init__(self, cloud: Cloud, system: System, worker: Worker):
        self._cloud, self._system, self._worker = cloud, system, worker
        self._next = 0  # the number of the next line to show
        self.wanted = True

    def follow(self, pause: float) -> None:
        """Shows the log until the trainer has ended, or nobody wants it any more."""
        while not self._connect() and self.wanted:
            self._system.say(f"the connection to {self._worker} was lost; trying again")
            self._system.sleep(pause)

    def _connect(self) -> bool:
        """Shows what is new; whether that was the end."""
        number = 0
        command = script("follow.sh", str(self._next))
        argv = self._cloud.reaching(self._worker.node, str(self._worker.index), command)
        for line in self._system.lines(argv):
            if start := re.fullmatch(r"spectral_pod log from line (\d+)", line):
                number = int(start[1])
            elif line == "spectral_pod log ends":
                return True
            else:
                if number >= self._next:
                    self._system.show(line)
                    self._next = number + 1
                number += 1
        return False


def script(name: str, *arguments: str) -> str:
    """A script of launch/pod, quoted for the shell of the worker, to which gcloud passes it.

    gcloud splits the text at spaces, and ssh joins it with spaces again.
    """
    return " ".join([f"{POD}/{name}", *map(shlex.quote, arguments)])
