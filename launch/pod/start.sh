#!/usr/bin/env bash
# On a worker: start.sh [TRAINER FLAG ...] starts the supervised trainer, unless it runs already.
#
# No flag says who its peers are: JAX reads that from the TPU's metadata. That includes several
# slices: for a queued resource of several nodes the platform itself puts
# MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID into the metadata
# (tpu-env) of each, where libtpu and jax._src.clusters.cloud_tpu_cluster look for them.
#
# setsid, and not systemd-run: the trainer outlives the connection either way, and this needs no
# root and keeps the user's environment. After a reboot tpu_pod.sh starts it again.
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
