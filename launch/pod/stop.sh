#!/usr/bin/env bash
# On a worker: asks the trainer to save its state and exit, and waits until it has.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
touch "$run/stopped"
if is_running; then kill -TERM "$(cat "$run/pid")" 2>/dev/null || true; fi
while is_running; do sleep 0.2; done
echo "$(hostname) $(state)"
