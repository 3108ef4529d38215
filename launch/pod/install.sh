#!/usr/bin/env bash
# On a worker: install.sh REVISION creates ~/spectral_pod/{code,environment,venv} from
# ~/spectral_pod-REVISION.tar.gz. Skips what is up to date, and refuses to replace the code of a
# running trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
revision=$1
export PIP_BREAK_SYSTEM_PACKAGES=1 # newer images refuse `pip install --user` otherwise

exec 8>"$base/install.lock" # one launcher at a time
flock 8
trap 'rm -f "$HOME"/spectral_pod-*.tar.gz' EXIT # which have the environment in them

persist() { # a command, tried again for some minutes: package indexes fail for a while
    local delay
    for delay in 10 20 40 80 160; do
        touch "$base/launcher" # it is still being worked on here
        if "$@"; then return; fi
        echo "$(hostname): $1 failed; trying again in $delay s" >&2
        sleep "$delay"
    done
    "$@"
}

if [ "$(cat "$code/.revision" 2>/dev/null)" != "$revision" ]; then
    if is_running; then
        echo "$(hostname): a trainer of another revision runs here; stop it first" >&2
        exit "$busy"
    fi
    rm -rf "$base/code.new"
    mkdir "$base/code.new"
    tar -xzf "$HOME/spectral_pod-$revision.tar.gz" -C "$base/code.new"
    mv "$base/code.new/spectral_pod_environment" "$base/environment"
    chmod 600 "$base/environment"
    echo "$revision" >"$base/code.new/.revision"
    rm -rf "$code"
    mv "$base/code.new" "$code"
fi

# TPU VM images ship Python 3.10, which is too old, so uv installs an interpreter. requirements.txt
# pins the libtpu that jax[tpu] of this JAX asks for, with which preflight compiles as well.
if ! cmp -s "$code/requirements.txt" "$venv/requirements.installed"; then
    persist python3 -m pip install --quiet --user uv==0.13.9
    uv=$HOME/.local/bin/uv
    persist "$uv" venv --quiet --clear --python 3.11 "$venv"
    persist "$uv" pip install --quiet --python "$venv/bin/python" -r "$code/requirements.txt"
    cp "$code/requirements.txt" "$venv/requirements.installed"
fi

# JAX recommends this on v5e and newer; without it the TPU runtime starts and stops slowly.
sudo --non-interactive sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' ||
    echo "$(hostname): transparent hugepages stay as they are; the TPU starts more slowly" >&2
echo "$(hostname): installed ${revision:0:12}"
