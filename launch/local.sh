#!/usr/bin/env bash
# Trains on this machine: launch/local.sh [--config=FILE] [--workdir=DIR] [--config.FIELD=VALUE ...]
# Without arguments: the quickstart, into runs/quickstart. Run again, it continues where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=--config=$root/configs/quickstart.py
workdir=--workdir=$root/runs/quickstart
for argument in "$@"; do
    case $argument in
    --config=* | --config) config= ;;
    --workdir=* | --workdir) workdir= ;;
    esac
done
exec "$python" -m spectral_pod.main ${config:+"$config"} ${workdir:+"$workdir"} "$@"
