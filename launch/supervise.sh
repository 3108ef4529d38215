#!/usr/bin/env bash
# Runs a command, and again for as long as its exit code says that this helps (exit_codes.sh):
#   launch/supervise.sh [--max_quick_restarts=10] [--] COMMAND [ARGUMENT ...]
# A start that ends within a minute is a quick one: the pause before the next doubles, from 1 s to
# 60 s, and too many of them in a row end the supervision. TERM, HUP and INT go to the command, once
# each; its exit code is then the supervisor's.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/exit_codes.sh"

max_quick_restarts=10
if [[ ${1:-} == --max_quick_restarts=* ]]; then
    max_quick_restarts=${1#*=}
    shift
fi
if [[ ${1:-} == -- ]]; then shift; fi
if [[ $# -eq 0 || ${1:-} == -* || ! $max_quick_restarts =~ ^[0-9]+$ ]]; then
    echo "usage: launch/supervise.sh [--max_quick_restarts=N] [--] COMMAND [ARGUMENT ...]" >&2
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
# No $( ) from here on: bash 5.2 fails, or forgets its code, when a trap runs while it expands one.
trap 'pass TERM' TERM HUP
trap 'pass INT' INT

run() { # the command; leaves its exit code in $code
    # Job control gives it a process group: Ctrl-C reaches it through `pass` only, and once. Without
    # job control, SIGINT would be ignored in it.
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    if [ "$asked" ] && [ ! "$sent" ]; then kill -s "$asked" "$child" 2>/dev/null; fi
    # A signal interrupts `wait`, whose result is then the signal's and not the child's.
    while kill -0 "$child" 2>/dev/null; do wait "$child" 2>/dev/null; done
    wait "$child" 2>/dev/null
    code=$?
    # bash 5.2 may lose the code where a signal comes as the command ends: 143 lets others restart.
    if [ "$code" -lt 0 ]; then code=143; fi
    kill -s KILL -- "-$child" 2>/dev/null # processes of its own that it left
    child=
}

say() { # with the time and the exit code
    local meaning
    name_exit "$code"
    TZ=UTC0 printf 'supervise: %(%Y-%m-%dT%H:%M:%SZ)T exit code %d (%s); %s\n' \
        -1 "$code" "$meaning" "$1" >&2
}

quick=0
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
    say "starting again in $delay s"
    sleep "$delay" &
    pause=$!
    if [ ! "$asked" ]; then wait "$pause"; fi
    kill "$pause" 2>/dev/null
    pause=
    if [ "$asked" ]; then exit "$code"; fi
done
