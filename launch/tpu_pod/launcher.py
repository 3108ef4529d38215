"""The life of a run on TPUs: asks for them, installs, trains, begins again when they are lost.

What is billed is either of use or ended. Three things see to that: the launcher deletes what it
asked for as soon as nothing can come of it; every request expires if it is not met in time; and the
guard on every worker (launch/pod/guard.sh) deletes a slice on which nothing has run for a while and
of which no launcher has been heard, or that has lived for longer than allowed.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from tools.exit_codes import is_curable, meaning, worse

from .cloud import Cloud, CloudError, Node, Request, Trouble, Worker
from .code import ROOT, Code
from .options import Options
from .phases import End, Phase
from .states import Then, node, request
from .system import System
from .workers import BUSY, Workers, script

T = TypeVar("T")

_REPORTS = 4  # every fourth look at the slice asks all its workers as well
# In looks at the slice, which are half a minute apart:
_ASK_AGAIN = 10  # between requests that are refused for want of capacity
_REMIND = 60  # between repetitions of the same complaint
_DELETE_FOR = 20  # for which a deletion that fails is tried again
_SAY_AGAIN = 20  # between lines about a request that waits as before
_SILENT = 3  # reports in a row that some worker does not give, before something is done about it
_SLICES = 2  # on which nothing would train, before it is the run's own fault
_INSTALL = 1800.0  # seconds that an installation may take at most
_PASSING_CODES = (0, 4, 8, 10, 13, 14)  # of google.rpc.Code: a later request may be met


class _Lost(Exception):
    """The slice is gone: the message says how."""


class Launcher:
    def __init__(
        self, options: Options, cloud: Cloud, system: System, code: Code, poll: float = 30.0
    ):
        self._options, self._cloud, self._system, self._code = options, cloud, system, code
        self._workers = Workers(cloud, system)
        self._poll = poll  # seconds between looks at the slice
        self._phase = Phase.NOTHING
        self._said: dict[str, float] = {}  # complaints, and when they were last made
        self._since: dict[str, tuple[str, float]] = {}  # states of nodes, and since when
        self._unsure = False  # whether a request of ours may have been received without an answer
        self._unanswered = 0  # reports in a row that some worker did not give
        self._idle_since: float | None = None  # since when some worker that answers does not train
        self._progress: list[str] = []  # of the last reports
        self._gave_up = 0  # slices in a row on which nothing would train

    # ---------------------------------------------------------------------------- the whole run

    def up(self) -> int:
        """Trains until the run ends, and returns the trainer's exit code."""
        recreations = 0
        while True:
            try:
                self._acquire(first=recreations == 0)
                self._deploy()
                result = self._watch()
                break
            except _Lost as lost:
                self._say(str(lost))
            recreations += 1
            if recreations > self._options.max_recreations:
                limit = self._options.max_recreations
                self._phase = Phase.IDLE
                raise End(1, f"lost its TPUs more often than --max_recreations={limit}")
            self._say(f"asking for others ({recreations}); the run will continue")
            self._phase = Phase.IDLE  # what is left of it is of no use
            self._delete()
        self._phase = Phase.OVER
        self._say(f"the trainer ended with {result} ({meaning(result)})")
        return result

    def plan(self) -> None:
        """The steps of a run without failures, for a system that only prints them."""
        self._workers.belong_to([Node(name, "READY", 2) for name in self._options.nodes])
        everyone = self._workers.all
        log = script("follow.sh", "0")
        for step in (
            self._cloud.request,
            lambda: self._cloud.create(self._guard()),
            self._cloud.nodes,
            lambda: self._install(everyone),
            self._start,
            self._tell_about_guard,
            lambda: self._cloud.reach(everyone[0].node, "0", log),
            self._workers.reports,
            lambda: None if self._options.keep else self._cloud.delete(),
        ):
            with contextlib.suppress(CloudError):  # nothing answers
                step()

    # ---------------------------------------------------------------------- asking for the TPUs

    def _acquire(self, first: bool) -> None:
        """Returns when all nodes are ready. `first`: this call has not had any TPUs yet."""
        started = self._system.now()
        refusals, seen = 0, False
        self._said.clear()
        while True:
            found = self._patiently(self._cloud.request)
            pause = self._poll
            if found is None:
                if seen:  # it was there, and not we have deleted it
                    self._gone()
                pause = self._ask(first) or pause
            else:
                self._check_same(found)
                seen = request(found.state).then is not Then.GONE
                if self._phase is Phase.NOTHING:
                    self._phase = Phase.FOUND
                    self._say(f"{self._name} is there: {found.state}")
                then, why = self._judge(found)
                if then is Then.USE:
                    return
                if then is Then.ASK_AGAIN:
                    refusals += 1
                    no_quota = first and "quota" in found.failure.lower()
                    if no_quota or found.failure_code not in _PASSING_CODES:
                        self._phase = Phase.ASKED
                        raise End(1, why)
                    pause = self._poll * min(_ASK_AGAIN, 2**refusals)
                if then in (Then.ASK_AGAIN, Then.REPLACE):
                    self._say(f"{why}; asking again")
                    self._phase = Phase.ASKED  # by now it is of no use to anybody
                    self._delete()
                    seen = False
                elif self._often(why, _SAY_AGAIN):
                    self._say(f"{why}, {self._minutes(started):.0f} min")
            if self._minutes(started) >= self._options.wait_minutes:
                raise End(1, f"no TPUs within --wait_minutes={self._options.wait_minutes}")
            self._system.sleep(pause)

    def _ask(self, first: bool) -> float:
        """Asks for the TPUs, or returns after how many seconds to do so again."""
        self._phase = Phase.ASKED  # also if no answer arrives
        try:
            self._cloud.create(self._guard())
        except CloudError as error:
            if error.kind is Trouble.EXISTS:  # ours, if an answer was lost; else another launcher's
                self._phase = Phase.ASKED if self._unsure else Phase.FOUND
                return 0.0
            if error.kind in (Trouble.UNAVAILABLE, Trouble.CREDENTIALS):
                self._unsure = True
                self._complain(error)
                return self._poll
            self._phase = Phase.NOTHING
            # Another slice of ours, not gone yet, may count against the quota.
            if error.kind is Trouble.EXHAUSTED and not (first and "quota" in error.line.lower()):
                self._complain(error)
                return self._poll * _ASK_AGAIN
            raise End(1, f"{self._name} cannot be asked for: {error.line}") from error
        return 0.0

    def _guard(self) -> list[str]:
        """The flags that put the guard onto every worker, and tell it what to do."""
        options = self._options
        tell = {
            "spectral-pod-name": options.name,
            "spectral-pod-keep-seconds": 0 if options.keep else options.keep_minutes * 60,
            "spectral-pod-max-run-seconds": round(options.max_run_hours * 3600),
        }
        pairs = [f"{key}={value}" for key, value in tell.items()]
        pairs += [options.metadata] if options.metadata else []
        file = ROOT / "launch" / "pod" / "guard.sh"
        return [f"--metadata={','.join(pairs)}", f"--metadata-from-file=startup-script={file}"]

    def _check_same(self, found: Request) -> None:
        options = self._options
        if found.type != options.type:
            raise End(
                2, f"{self._name} is a {found.type}, not a {options.type}; choose another --name"
            )
        if found.num_slices != options.num_slices:
            raise End(
                2, f"{self._name} has {found.num_slices} slices, not {options.num_slices}; "
                "choose another --name",
            )  # fmt: skip

    def _judge(self, found: Request) -> tuple[Then, str]:
        """What to do with the request as it is, by the tables of `states`, and why."""
        row = request(found.state)
        why = f"{self._name} is {found.state}"
        if found.failure:
            why += f": {found.failure}"
        if row.then is not Then.USE:
            self._since.clear()
            return row.then, why
        nodes = self._patiently(self._cloud.nodes)
        worst, now = (Then.USE, why), self._system.now()
        for one in nodes:
            state, since = self._since.get(one.name, ("", now))
            if state != one.state:
                since = now
            self._since[one.name] = one.state, since
            then = node(one.state).after((now - since) / 60)
            if then is not Then.USE:
                why = f"{one.name} is {one.state}: it {node(one.state).meaning}"
                if worst[0] is not Then.REPLACE:
                    worst = then, why
        if worst[0] is Then.USE:
            self._workers.belong_to(nodes)
        return worst

    # ------------------------------------------------------------------ installing and starting

    def _deploy(self) -> None:
        """Installs and starts on all workers, for --keep_minutes with growing pauses."""
        workers = self._workers
        if self._phase is Phase.FOUND:
            self._find_out()
        else:
            self._phase = Phase.IDLE
        keep = self._options.keep_minutes
        costs = self._options.costs(keep)
        started, pause = self._system.now(), self._poll / 2
        missing: Sequence[Worker] = workers.all
        while True:
            left = (keep - self._minutes(started)) * 60
            missing = self._install(missing, min(left, _INSTALL)) or self._start()
            if not missing:
                break
            names = ", ".join(map(str, missing[:3])) + (" and others" if missing[3:] else "")
            if self._minutes(started) + pause / 60 >= keep:
                raise End(1, f"{names} could not be installed or started in --keep_minutes={keep}")
            self._say(
                f"{names}: not installed or started; trying again in {pause:.0f} s, until "
                f"{keep} min have passed" + (f" (which cost {costs})" if costs else "")
            )
            self._system.sleep(pause)
            pause = min(2 * pause, 8 * self._poll)
            self._fail_if_lost()
        if self._phase is not Phase.TRAINING:
            self._phase = Phase.TRAINING
            self._tell_about_guard()

    def _find_out(self) -> None:
        """Whether a run of an earlier call trains on the slice; until it is known, it may.

        Another launcher may be installing there, whose slice this is then.
        """
        started = self._system.now()
        while True:
            reports = self._patiently(self._workers.reports)
            states = {one.state for one in reports.values()}
            if "running" in states:
                self._phase = Phase.TRAINING
                return
            if "installing" in states:
                unknown = "another launcher installs on it"
            elif len(reports) == len(self._workers.all):
                self._phase = Phase.IDLE
                return
            else:
                unknown = "some worker does not answer, and may train"
            keep = self._options.keep_minutes
            if self._minutes(started) >= keep:
                why = f"{self._name}: {unknown}, for {keep} min"
                raise _Lost(why) if reports else End(1, why)
            if self._often(unknown):
                self._say(f"{self._name}: {unknown}; trying again")
            self._system.sleep(self._poll)
            self._fail_if_lost()

    def _install(self, workers: Sequence[Worker], limit: float = _INSTALL) -> list[Worker]:
        """The workers that lack the code afterwards."""
        archive = f"spectral_pod-{self._code.revision}.tar.gz"  # in the home of a worker
        started = self._system.now()
        with self._code.archive() as file:
            self._patiently(lambda: self._workers.copy(file, archive, workers, limit))
        unpack = (
            "mkdir -p spectral_pod/scripts && "
            f"tar -xzf {archive} -C spectral_pod/scripts launch && "
        )
        command = unpack + script("install.sh", self._code.revision)
        limit = max(limit - (self._system.now() - started), 60.0)
        codes = self._patiently(lambda: self._workers.run(command, workers, limit))
        return self._without(codes, workers)

    def _start(self) -> list[Worker]:
        """The workers whose trainer does not run afterwards."""
        workers, command = self._workers, script("start.sh", *self._options.trainer)
        codes = self._patiently(lambda: workers.run(command, workers.all))
        return self._without(codes, workers.all)

    def _without(self, codes: dict[Worker, int], workers: Sequence[Worker]) -> list[Worker]:
        if BUSY in codes.values():
            self._phase = Phase.TRAINING
            raise End(2, f"another run is on {self._name}; to end it: {self._options.hint('stop')}")
        return [worker for worker in workers if codes.get(worker) != 0]

    def _tell_about_guard(self) -> None:
        """Says whether the slice can end itself."""
        first = [worker for worker in self._workers.all if worker.index == 0]
        codes = self._patiently(lambda: self._workers.run(script("guarded.sh"), first))
        if not self._options.dry_run and any(codes.get(worker) != 0 for worker in first):
            self._say(
                "the slice cannot delete itself (above): without this launcher it is billed until "
                f"you delete it: {self._options.hint('delete')}"
            )

    # -------------------------------------------------------------------------------- watching

    def _watch(self) -> int:
        """The trainer's exit code."""
        log = self._workers.follow(self._workers.all[0])
        looks, result = 0, None
        self._unanswered, self._idle_since = 0, None
        try:
            while result is None:
                follows = self._system.in_background(lambda: log.follow(self._poll))
                while result is None and follows():
                    self._system.sleep(self._poll)
                    self._fail_if_lost()
                    looks += 1
                    if looks % _REPORTS == 0:
                        result = self._result()
                if result is None:  # the log has ended
                    self._system.sleep(self._poll)
                    self._fail_if_lost()
                    result = self._result()
            for _ in range(100):  # its last lines
                if not follows():
                    break
                self._system.sleep(self._poll / 100)
        finally:
            log.wanted = False
        return result

    def _fail_if_lost(self) -> None:
        found = self._patiently(self._cloud.request)
        if found is None:
            self._gone()
        then, why = self._judge(found)
        if then is Then.REPLACE and found.by_user:
            self._delete()
            self._gone()
        if then is Then.GONE:
            self._gone()
        if then in (Then.REPLACE, Then.ASK_AGAIN):
            raise _Lost(why)
        if then is Then.WAIT and self._often(why):
            self._say(f"{why}; waiting")

    def _gone(self) -> NoReturn:
        """Somebody has deleted the request or its nodes, or the guard has."""
        self._phase = Phase.NOTHING
        result = f"{self._options.workdir.rstrip('/')}/result.json"
        with contextlib.suppress(CloudError):
            if self._cloud.exists(result):
                raise End(
                    0, f"{self._name} was deleted, after the run had ended: {result} is there"
                )
        raise End(1, f"somebody deleted {self._name}, or its guard did")

    def _result(self) -> int | None:
        """The exit code of a run that has ended on all workers; else None.

        Starts again what a reboot has ended, and stops what cannot continue alone.
        """
        reports = self._patiently(self._workers.reports)
        silent = len(reports) < len(self._workers.all)
        self._unanswered = self._unanswered + 1 if silent else 0
        running = [one for one in reports.values() if one.state == "running"]
        ended = [one for one in reports.values() if one.state == "ended"]
        idle = ("lost", "idle", "installing")
        lost = [one for one in reports.values() if one.state in idle]
        progress = [one.progress for one in reports.values() if one.progress]
        moves, self._progress = progress != self._progress, progress
        if reports:
            self._give_up_if_idle(trains=len(running) == len(reports) and (moves or not silent))
        code = 0
        for one in ended:
            code = worse(code, int(one.detail))
        failed = next((one for one in ended if int(one.detail) == code != 0), None)
        if silent and not (failed and self._unanswered >= _SILENT):
            if self._unanswered % _SILENT == 0:
                self._revive("some worker does not answer, or")
            return None
        if failed and silent and is_curable(code):
            raise _Lost(f"some worker of {self._name} does not answer, others ended with {code}")
        if failed and running:
            self._say(f"{failed.host} ended with {code} ({meaning(code)}); stopping the others")
            self._stop_all()
        elif lost and not failed:
            self._revive(lost[0].host)
            return None
        elif running:
            return None
        if failed:
            self._patiently(lambda: self._workers.run(script("explain.sh"), self._workers.all))
        return code

    def _give_up_if_idle(self, trains: bool) -> None:
        """Another slice is asked for if, for --keep_minutes, not all workers trained here.

        Not if no worker answered: then it is this machine that has lost its connection.
        """
        if trains:
            self._idle_since, self._gave_up = None, 0
        elif self._idle_since is None:
            self._idle_since = self._system.now()
        elif self._minutes(self._idle_since) >= self._options.keep_minutes:
            self._gave_up += 1
            why = f"not all workers of {self._name} train, for {self._options.keep_minutes} min"
            if self._gave_up > _SLICES:
                self._phase = Phase.IDLE
                raise End(1, f"{why}, on {self._gave_up} slices in a row")
            raise _Lost(why)

    def _revive(self, whom: str) -> None:
        self._say(f"{whom} has lost its trainer; installing and starting where that is needed")
        if not self._install(self._workers.all):
            self._start()

    def _stop_all(self) -> None:
        """Asks all trainers to save and end, and waits for them."""
        self._patiently(lambda: self._workers.run(script("stop.sh"), self._workers.all))

    # ------------------------------------------------------------------------------ at the end

    def leave(self) -> None:
        """What is to be done whenever the launcher ends, for whatever reason."""
        options, phase = self._options, self._phase
        if phase is Phase.FOUND:
            self._say(f"the request for {self._name} stays: {options.hint('delete')}")
        elif phase is Phase.TRAINING:
            self._say(
                f"detached; {self._name} goes on AND IS BILLED: "
                f"{options.hint('{status,logs,stop,delete}')}; the same command again watches it"
            )
        elif phase in (Phase.IDLE, Phase.OVER) and options.keep:
            self._say(f"{self._name} is kept AND IS BILLED: {options.hint('delete')}")
        elif phase in (Phase.ASKED, Phase.IDLE, Phase.OVER):
            self._delete()

    def _delete(self) -> bool:
        """Deletes the request, again and again if that fails; whether it is gone."""
        started = self._system.now()
        self._say(f"deleting {self._name}")
        while True:
            try:
                self._cloud.delete()
            except CloudError as error:
                self._say(error.line)
                if self._system.now() - started >= _DELETE_FOR * self._poll:
                    self._say(
                        f"COULD NOT DELETE {self._name}; it may still be billed, until its guard "
                        f"deletes it: {self._options.hint('delete')}"
                    )
                    return False
                self._system.sleep(self._poll)
                continue
            self._since.clear()
            self._unsure = False
            self._say(f"deleted {self._name}")
            return True

    # ------------------------------------------------------------------------------------ tools

    @property
    def _name(self) -> str:
        return self._options.name

    def _minutes(self, since: float) -> float:
        return (self._system.now() - since) / 60

    def _say(self, line: str) -> None:
        self._system.say(line)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The answer to a question, which is asked until it is answered."""
        while True:
            try:
                return ask()
            except CloudError as error:
                if error.kind is Trouble.DENIED or error.kind is Trouble.INVALID:
                    raise End(1, error.line) from error
                self._complain(error)
            self._system.sleep(self._poll)

    def _complain(self, error: CloudError) -> None:
        if self._often(error.kind.value):
            self._say(error.line)
            if error.kind is Trouble.CREDENTIALS:
                self._say(
                    "your credentials have expired: `gcloud auth login` in another terminal. What "
                    "trains goes on meanwhile; this launcher looks again and again"
                )

    def _often(self, what: str, looks: int = _REMIND) -> bool:
        """Whether something is to be said: not again for so many looks at the slice."""
        last = self._said.get(what)
        now = self._system.now()
        if last is not None and now - last < looks * self._poll:
            return False
        self._said[what] = now
        return True
