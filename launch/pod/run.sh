#!/usr/bin/env bash
# On a worker, started by start.sh: run.sh COMMAND [ARGUMENT ...] supervises it and records its exit code.
set -euo pipefail
pod=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$pod/common.sh"

exec 9>"$run/lock"
flock --timeout 10 9 # `is_running` also holds it for a moment
"$pod/../supervise.sh" -- "$@" 9>&- &
echo $! >"$run/pid"
result=0
wait $! || result=$?
echo "$result" >"$run/exit_code"
