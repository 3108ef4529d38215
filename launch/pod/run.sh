#!/usr/bin/env bash
# On a worker, started by start.sh: run.sh COMMAND [ARGUMENT ...] runs the command under the
# supervisor and records its exit code.
set -euo pipefail
pod=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$pod/common.sh"

exec 9>"$run/lock"
flock --timeout 10 9 # `is_running` briefly holds this lock, too
"$pod/../supervise.sh" --max_restarts_per_hour=6 -- "$@" 9>&- &
echo $! >"$run/pid"
result=0
wait $! || result=$?
echo "$result" >"$run/exit_code"
