#!/usr/bin/env bash
# On a worker: follow.sh LINE prints the log from that line on (0: the last hundred) until the
# trainer's supervisor ends. It first prints the number of the first line, so that a reader can
# continue after a lost connection, and finally that the log is complete.
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
