#!/usr/bin/env bash
# On a worker: follow.sh LINE prints the log from that line on (0: the last hundred lines) until the
# trainer's supervisor ends. The first line of output gives the number of the first log line, so that
# a client can continue after a lost connection; the last line marks the end of the log.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
from=$1
touch "$run/log"
if [ "$from" -eq 0 ]; then
    from=$(($(wc -l <"$run/log") - 99))
    if [ "$from" -lt 1 ]; then from=1; fi
fi
echo "spectral_pod log from line $from"
if is_running; then
    tail --lines=+"$from" --follow=name --sleep-interval=0.2 --pid="$(cat "$run/pid")" "$run/log"
else
    tail --lines=+"$from" "$run/log"
fi
echo "spectral_pod log ends"
