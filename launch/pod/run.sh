#!/usr/bin/env bash
# On a worker, started by start.sh: run.sh COMMAND [ARGUMENT ...] supervises it and notes its end.
set -euo pipefail
pod=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$pod/common.sh"

exec 9>"$run/lock"
flock --timeout 10 9 # `is_running` takes it for a moment, too
"$pod/../supervise.sh" -- "$@" 9>&- &
echo $! >"$run/pid"
result=0
wait $! || result=$?
echo "$result" >"$run/exit_code"
