r"""Trains on a Cloud TPU slice, or on several: creates it, installs this checkout, trains,
continues after preemptions, and deletes it at the end.

  launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v4-32 [options] -- \
      --config=configs/lra_listops.py --workdir=gs://BUCKET/RUN [more flags of the trainer]
  launch/tpu_pod.sh status|logs|stop|delete --name=NAME --zone=ZONE [--project=PROJECT]

The same command again continues: what exists is kept, and a running trainer is only watched.
Ctrl-C gives up a request that waits and a slice on which nothing trains yet; a running trainer goes
on, and is watched again by the same command. The working tree is installed as it is, with what is
not committed.

The slice
  --name              of the request; its nodes are NAME, or NAME-0, NAME-1 ...
  --zone --project    where; the project is gcloud's unless given
  --type              v4-N, v5e-N (v5litepod-N), v5p-N, v6e-N or tpu7x-N, as Google Cloud counts
  --num_slices        number of slices, connected by the data centre's network (1)
  --spot              cheaper, may be preempted at any time
  --reserved          from your reservation; --reservation=NAME from that one (gcloud alpha)
  --runtime_version   follows from the type
  --service_account   the workers' identity: see below
  --network --subnetwork --tags
  --internal_ips      no external addresses; the workers need Cloud NAT to install
  --ssh               external, iap (gcloud alpha; the default with --internal_ips), or internal,
                      if this machine is in the same network
  --labels --metadata KEY=VALUE,...
  --data_disk         source=DISK[,mode=read-only]; may be repeated

The run
  --env NAME=VALUE    a variable for the trainer, such as LIBTPU_INIT_ARGS; may be repeated.
                      --env=NAME takes its value from here: no secret stands in a command line, a
                      log or metadata. On the workers it is a file that only you and root can read
  --no_preflight      do not compile the step first: for machines without libtpu, such as macOS
  --force             continue although preflight reports that the run does not fit
  --keep              do not delete the slice when the run ends (billing continues)
  --dry_run           print every command, ready to paste, and run none

What it may cost
  --wait_minutes      how long to wait for TPUs, each time (1440); waiting is not billed
  --keep_minutes      how long a slice is kept on which nothing trains: while installing fails, and
                      when nobody watches (30)
  --max_run_hours     the longest that a slice lives; then the run is saved, and can be continued
  --max_recreations   how often to ask again after a preemption (100)
  --price_per_chip_hour   for what it says about costs; list prices on demand unless given

Without a launcher, and on machines that are switched off, a slice ends itself: when nothing has run
on it for --keep_minutes, or after --max_run_hours. Its service account must be allowed to; the
launcher says so if it is not. A preempted slice is only replaced while a launcher watches: leave it
in tmux, or on a small VM. docs/pods.md says more, also what each message means.

Exits with the trainer's code: 0 done, 1 a bug, 2 a user error, 3 non-finite numbers, 75 stopped,
78 --stop_after_minutes is over; its own failures are 1, errors in this command 2, Ctrl-C 130.

Needs the APIs tpu, compute and, for the guard, cloudresourcemanager (.googleapis.com). Least
privilege:
  you               roles/tpu.admin, roles/iam.serviceAccountUser on the service account, and
                    either roles/compute.osLogin (where OS Login is on) or
                    compute.projects.get (roles/compute.viewer) for ssh; port 22 open to you;
                    with iap roles/iap.tunnelResourceAccessor; roles/storage.objectViewer on the
                    bucket, to know whether a run has ended
  --service_account roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket,
                    roles/tpu.admin so that the slice can delete itself; optionally
                    roles/logging.logWriter, roles/monitoring.metricWriter
"""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from spectral_pod.errors import ConfigError

from . import checks
from .cloud import Cloud, CloudError, Node, Worker
from .code import ROOT, Code
from .launcher import Launcher
from .options import Options, parse
from .phases import End
from .system import DryRun, System
from .workers import Log, Workers, script


def main(argv: Sequence[str]) -> int:
    system = System()
    for number in _SIGNALS:
        signal.signal(number, _end)
    try:
        options = parse(argv)
        system = DryRun() if options.dry_run else System(checks.ssh_environment())
        cloud = Cloud(options, system)
        return (
            _up(options, cloud, system) if options.action == "up" else _act(options, cloud, system)
        )
    except ConfigError as error:
        system.say(str(error))
        return 2
    except End as end:
        system.say(str(end))
        return end.code
    except CloudError as error:
        system.say(error.line)
        return 1
    except FileNotFoundError as error:
        if error.filename != "gcloud":
            raise
        system.say("there is no gcloud here: cloud.google.com/sdk/docs/install")
        return 2
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        system.end()


_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: Any) -> None:
    _ignore_signals()  # often several arrive; what is being deleted must not stay half deleted
    raise KeyboardInterrupt(number)


def _up(options: Options, cloud: Cloud, system: System) -> int:
    code = Code(options.environment)
    if options.dry_run:
        _plan(options, cloud, system, code)
        return 0
    checks.before_renting(options, cloud, system, code)
    if options.preflight:
        _preflight(options, system)
    launcher = Launcher(options, cloud, system, code, _poll())
    try:
        return launcher.up()
    except End as end:
        system.say(str(end))
        return end.code
    finally:
        _ignore_signals()
        system.end()
        launcher.leave()


def _poll() -> float:
    """Seconds between looks at the slice."""
    return float(os.environ.get("TPU_POD_POLL_SECONDS", 30))


def _preflight(options: Options, system: System) -> None:
    """Compiles the run's steps for the slice, in the environment that the launchers share."""
    run = 'source launch/setup.sh && exec "$python" -m tools.preflight "$@"'
    argv = ["bash", "-c", run, "preflight", *_of_preflight(options)]
    code = subprocess.run(argv, cwd=ROOT).returncode
    where = f"{options.type} x {options.num_slices}"
    if code == 1 and not options.force:  # tools/preflight.py has these codes
        raise ConfigError(f"preflight: it doesn't fit {where}; --force tries it all the same")
    if code == 2:
        system.say("preflight: a collective grows with the slice, as the report says; going on")
    if code > 2:
        raise ConfigError(
            f"preflight: the configuration cannot run on {where}, or could not be compiled here; "
            "--no_preflight goes on without"
        )


def _of_preflight(options: Options) -> list[str]:
    config = [flag for flag in options.trainer if flag.startswith(("--config=", "--config."))]
    return [*config, f"--topology={options.type}", f"--num_slices={options.num_slices}"]


def _plan(options: Options, cloud: Cloud, system: System, code: Code) -> None:
    """Prints the commands of a run without failures."""
    if options.preflight:
        system.show(shlex.join(["python", "-m", "tools.preflight", *_of_preflight(options)]))
    checks.before_renting(options, cloud, system, code)
    Launcher(options, cloud, system, code).plan()


def _act(options: Options, cloud: Cloud, system: System) -> int:
    """status, logs, stop or delete."""
    workers, action = Workers(cloud, system), options.action
    if options.dry_run:
        nodes = [Node(name, "READY", 2) for name in options.nodes]
    else:
        try:
            found = cloud.request()
        except CloudError:  # that of gcloud without a project is about the name of a request
            checks.check_account(*checks.account_and_project(cloud))
            raise
        if found is None:
            project = options.project or cloud.project()
            raise End(1, f"there is no {options.name} in {options.zone}, project {project}")
        system.say(f"{options.name} is {found.state}")
        options = dataclasses.replace(options, num_slices=found.num_slices)
        cloud = Cloud(options, system)
        nodes = cloud.nodes() if found.state == "ACTIVE" else []
    workers.belong_to(nodes)
    if action == "logs":
        return _logs(options, cloud, system, nodes)
    if action == "status":
        for node in nodes if not options.dry_run else []:
            system.show(f"{node.name} {node.state}")
        for one in workers.reports().values():
            system.show(f"{one.host} {one.state} {one.detail} {one.progress}")
    try:
        if nodes and action in ("stop", "delete"):
            system.say("letting the trainers save, which takes up to 5 minutes")
            workers.run(script("stop.sh"), workers.all, limit=300.0)
    finally:
        if action == "delete":
            system.say(f"deleting {options.name}")
            cloud.delete()
            system.say(f"deleted {options.name}")
    return 0


def _logs(options: Options, cloud: Cloud, system: System, nodes: Sequence[Node]) -> int:
    if options.slice >= len(nodes):
        raise End(2, f"--slice={options.slice}: {options.name} has {len(nodes)} slices")
    worker = Worker(nodes[options.slice].name, options.worker)
    if options.dry_run:
        system.run(cloud.reaching(worker.node, str(worker.index), script("follow.sh", "0")), 0)
    else:
        Log(cloud, system, worker).follow(_poll())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
