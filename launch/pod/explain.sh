#!/usr/bin/env bash
# On a worker: prints the end of the log of a failed trainer whose log was not being followed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../exit_codes.sh"
ended=$(cat "$run/exit_code")
if [ "$ended" -ne 0 ] && ! exit_is_curable "$ended"; then
    echo "$(hostname) ended with $ended ($(exit_meaning "$ended")):"
    tail -n 10 "$run/log" | sed "s/^/$(hostname): /"
fi
