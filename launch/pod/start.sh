#!/usr/bin/env bash
# On a worker: start.sh [TRAINER FLAG ...] starts the supervised trainer, unless it is running.
#
# No flag names the peers: JAX reads them from the TPU's metadata, also with several slices. For a
# queued resource of several nodes, the platform puts MEGASCALE_COORDINATOR_ADDRESS,
# MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID into each node's metadata (tpu-env), where libtpu and
# jax._src.clusters.cloud_tpu_cluster look for them.
#
# setsid rather than systemd-run: the trainer outlives the connection either way, but setsid needs
# no root and keeps the user's environment. After a reboot, tpu_pod.sh starts the trainer again.
set -euo pipefail
pod=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$pod/common.sh"
command=$(printf '%q ' "$@")

exec 8>"$run/start.lock" # one start at a time
flock 8
if is_running; then
    if [ "$command" = "$(cat "$run/command")" ]; then
        echo "$(hostname): runs already"
        exit
    fi
    echo "$(hostname): runs another command; stop it first: $(cat "$run/command")" >&2
    exit "$busy"
fi
rm -f "$run/pid" "$run/exit_code" "$run/stopped"
echo "$command" >"$run/command"
cd "$code"
# shellcheck source=/dev/null # it exists on workers only
source "$base/environment"
setsid nohup "$pod/run.sh" "$venv/bin/python" -m spectral_pod.main "$@" \
    </dev/null >>"$run/log" 2>&1 8>&- &
for _ in {1..150}; do
    if [ -s "$run/pid" ]; then break; fi
    sleep 0.1
done
[ -s "$run/pid" ] # without a pid it did not start, and the log says why
echo "$(hostname): started"
