#!/usr/bin/env bash
# Trains on this machine, on its GPUs if it has any:
#   launch/local.sh [--config=FILE] [--workdir=DIR] [--config.FIELD=VALUE ...]
# Without arguments: the quickstart, in runs/quickstart. The same command continues where it stopped.
# The first start installs into .venv (launch/setup.sh).
#
# All arguments are the trainer's. Its flags: .venv/bin/python -m spectral_pod.main --help; the
# fields of a config: spectral_pod/config.py; the configs: configs/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
if asks_for_help "$@"; then usage && exit; fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=--config=$root/configs/quickstart.py
workdir=--workdir=$root/runs/quickstart
for argument in "$@"; do
    case $argument in
    --config=* | --config) config= ;;
    --workdir=* | --workdir) workdir= ;;
    esac
done
# By default glibc maps and zeroes the memory of every step anew: a sixth of a step on CPUs.
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
exec "$python" -m spectral_pod.main ${config:+"$config"} ${workdir:+"$workdir"} "$@"
