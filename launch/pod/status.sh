#!/usr/bin/env bash
# On a worker: prints one line, HOST STATE PID_OR_CODE LAST_PROGRESS_LINE.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
progress=$(tail -n 1000 "$run/log" 2>/dev/null | grep -a '^step ' | tail -n 1 || true)
echo "$(hostname) $(state) $progress"
