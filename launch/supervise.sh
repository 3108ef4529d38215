#!/usr/bin/env bash
# Runs a command and restarts it while its exit code says that this helps (exit_codes.sh):
#   launch/supervise.sh [--max_quick_restarts=10] [--max_restarts_per_hour=N]
#       [--] COMMAND [ARGUMENT ...]
# After a run of less than a minute the pause before the next doubles, from 1 s to 60 s; too many of
# them in a row end the supervision. TERM, HUP and INT are forwarded to the command, once each; its
# exit code is then that of the supervisor. --max_restarts_per_hour ends it as well when longer runs
# keep failing, for machines that cost much.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/exit_codes.sh"
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi

max_quick_restarts=10 max_per_hour=1000000
while [[ ${1:-} == --max_*=* ]]; do
    case $1 in
    --max_quick_restarts=*) max_quick_restarts=${1#*=} ;;
    --max_restarts_per_hour=*) max_per_hour=${1#*=} ;;
    *) break ;;
    esac
    shift
done
if [[ ${1:-} == -- ]]; then shift; fi
if [[ $# -eq 0 || ${1:-} == -* || ! "$max_quick_restarts $max_per_hour" =~ ^[0-9]+\ [0-9]+$ ]]; then
    echo "usage: launch/supervise.sh [--max_quick_restarts=N] [--max_restarts_per_hour=N] [--]" \
        "COMMAND [ARGUMENT ...]" >&2
    exit 2
fi

child='' # the command while it runs
pause='' # the sleep while it waits
asked='' # the last signal that arrived
sent=''  # whether a child has it

pass() { # SIGNAL
    asked=$1
    if [ "$child" ]; then
        sent=yes
        kill -s "$1" "$child" 2>/dev/null
    fi
    if [ "$pause" ]; then kill "$pause" 2>/dev/null; fi
}
# No $( ) from here on: bash 5.2 fails or loses the exit code if a trap runs while it expands one.
trap 'pass TERM' TERM HUP
trap 'pass INT' INT

run() { # the command; sets its exit $code
    # Job control gives it a process group, so that Ctrl-C reaches it only through `pass`, and once.
    # Without job control it would ignore SIGINT.
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    if [ "$asked" ] && [ ! "$sent" ]; then kill -s "$asked" "$child" 2>/dev/null; fi
    # A signal interrupts `wait`, whose result is then that of the signal, not of the child.
    while kill -0 "$child" 2>/dev/null; do wait "$child" 2>/dev/null; done
    wait "$child" 2>/dev/null
    code=$?
    # bash 5.2 may lose the code if a signal arrives as the command ends: 143 permits a restart.
    if [ "$code" -lt 0 ]; then code=143; fi
    kill -s KILL -- "-$child" 2>/dev/null # remaining child processes
    child=
}

say() { # with the time and the exit code
    local meaning
    name_exit "$code"
    TZ=UTC0 printf 'supervise: %(%Y-%m-%dT%H:%M:%SZ)T exit code %d (%s); %s\n' \
        -1 "$code" "$meaning" "$1" >&2
}

quick=0
restarts=() # when, in seconds; those of the last hour
while true; do
    started=$SECONDS
    run "$@"
    if [ "$asked" ] || ! exit_is_curable "$code"; then exit "$code"; fi
    if ((SECONDS - started < ${SUPERVISE_QUICK_SECONDS:-60})); then
        quick=$((quick + 1))
        delay=$((quick < 7 ? 1 << (quick - 1) : 60))
    else
        quick=0 delay=0
    fi
    if ((quick > max_quick_restarts)); then
        say "giving up: it ended within a minute $quick times in a row"
        exit "$code"
    fi
    restarts+=("$SECONDS")
    while ((SECONDS - restarts[0] > 3600)); do restarts=("${restarts[@]:1}"); done
    if ((${#restarts[@]} > max_per_hour)); then
        say "giving up: it ended ${#restarts[@]} times within an hour"
        exit "$code"
    fi
    say "starting again in $delay s"
    sleep "$delay" &
    pause=$!
    if [ ! "$asked" ]; then wait "$pause"; fi
    kill "$pause" 2>/dev/null
    pause=
    if [ "$asked" ]; then exit "$code"; fi
done
