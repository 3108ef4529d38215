#!/usr/bin/env bash
# Trains on Cloud TPU slices; launch/tpu_pod.sh --help says how. It is launch/tpu_pod, and needs
# gcloud and Python 3.11 or newer, nothing else.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/usage.sh"
if asks_for_help "$@"; then # which needs no Python either
    sed -n '1,/^"""$/{ s/^r*"""//; p; }' "$root/launch/tpu_pod/__main__.py"
    exit
fi
for python in python3 python3.13 python3.12 python3.11 none; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
done
if [ "$python" = none ]; then
    echo "launch/tpu_pod.sh: no Python 3.11 or newer is on PATH" >&2
    exit 2
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m launch.tpu_pod "$@"
