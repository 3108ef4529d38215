#!/usr/bin/env bash
# On a worker: start.sh [TRAINER FLAG ...] starts the supervised trainer unless it is running.
#
# No flag names its peers: JAX reads them from the TPU's metadata, also with several slices. For a
# queued resource of several nodes the platform puts MEGASCALE_COORDINATOR_ADDRESS,
# MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID into the metadata (tpu-env) of each, where libtpu and
# jax._src.clusters.cloud_tpu_cluster read them.
#
# setsid rather than systemd-run: with either the trainer outlives the connection, but setsid does
# not need root and keeps the environment. After a reboot tpu_pod.sh starts it again.
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
rm -f "$run/pid" "$run/exit_code"
echo "$command" >"$run/command"
cd "$code"
setsid nohup "$pod/run.sh" "$venv/bin/python" -m spectral_pod.main "$@" \
    </dev/null >>"$run/log" 2>&1 8>&- &
for _ in {1..150}; do
    if [ -s "$run/pid" ]; then break; fi
    sleep 0.1
done
[ -s "$run/pid" ] # otherwise it did not start: the log says why
echo "$(hostname): started"
