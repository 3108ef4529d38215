#!/usr/bin/env bash
# On a worker: install.sh REVISION creates ~/spectral_pod/{code,venv} from ~/spectral_pod.tar.gz.
# Repeats nothing that is done already, and does not touch a running trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
revision=$1

if [ "$(cat "$code/.revision" 2>/dev/null)" != "$revision" ]; then
    if is_running; then
        echo "$(hostname): a trainer of another revision runs here; stop it first" >&2
        exit "$busy"
    fi
    rm -rf "$base/code.new"
    mkdir "$base/code.new"
    tar -xzf "$HOME/spectral_pod.tar.gz" -C "$base/code.new"
    echo "$revision" >"$base/code.new/.revision"
    rm -rf "$code"
    mv "$base/code.new" "$code"
fi

# TPU VM images have Python 3.10, which is too old: uv installs an interpreter. requirements.txt pins
# the libtpu that preflight compiles with; jax[tpu] would require an older one.
if ! cmp -s "$code/requirements.txt" "$venv/requirements.installed"; then
    python3 -m pip install --quiet --user uv==0.13.9
    uv=$HOME/.local/bin/uv
    "$uv" venv --quiet --clear --python 3.11 "$venv"
    "$uv" pip install --quiet --python "$venv/bin/python" -r "$code/requirements.txt"
    cp "$code/requirements.txt" "$venv/requirements.installed"
fi

# Recommended by JAX on v5e and newer: without it the TPU runtime starts and stops slowly.
sudo --non-interactive sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' ||
    echo "$(hostname): transparent hugepages stay as they are; the TPU starts more slowly" >&2
echo "$(hostname): installed ${revision:0:12}"
