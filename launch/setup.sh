#!/usr/bin/env bash
# Creates .venv from requirements.txt, and updates it when that changes. The other launchers do this
# when they start, and add JAX's CUDA plugin where there is a driver of NVIDIA, unless JAX_PLATFORMS
# leaves GPUs out. By itself:
#   launch/setup.sh [--cuda=12|13]
# --cuda  the plugin of this major version also where there is no GPU: on a login node, for example,
#         if those with GPUs have no internet. CUDA 13 needs the driver 580 or newer, CUDA 12 525.
#
# Sourced, it sets $root (the repository) and $python (the interpreter of the environment).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
source "$root/launch/usage.sh"
source "$root/launch/nvidia.sh"

set_up() { # [12|13]: installs what is missing, one process at a time
    local cuda=${1:-} stamp=$root/.venv/requirements.installed plugin
    plugin=$(missing_plugin "$cuda")
    if [ ! "$plugin" ] && cmp -s "$root/requirements.txt" "$stamp"; then return; fi
    mkdir -p "$root/.venv"
    (
        if ! flock --nonblock 9; then
            echo "Waiting for another process that installs into $root/.venv" >&2
            flock 9 || echo "Without locks on this file system: start one at a time" >&2
        fi
        if ! cmp -s "$root/requirements.txt" "$stamp"; then install_requirements "$stamp"; fi
        plugin=$(missing_plugin "$cuda") # perhaps not any more
        if [ "$plugin" ]; then install_plugin "$plugin"; fi
    ) 9>"$root/.venv/lock"
}

install_requirements() { # STAMP: a copy of what is installed
    local base
    for base in python3 python3.13 python3.12 python3.11; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        base=
    done
    if [ -z "$base" ]; then
        echo "launch/setup.sh: no Python 3.11 or newer is on PATH; install one and run again" >&2
        exit 1
    fi
    echo "Installing requirements.txt into $root/.venv (about 2 GB, some minutes, once)"
    "$base" -m venv "$root/.venv"
    pip install -r "$root/requirements.txt"
    cp "$root/requirements.txt" "$1"
}

# An installed plugin of an older CUDA stays where the driver can run it: the nodes of a cluster,
# which share an environment, may have different drivers.
missing_plugin() { # [12|13]: prints the requirement that is missing, such as jax[cuda13]==0.10.2
    local cuda=${1:-} jax installed driver
    jax=$(sed -n 's/^jax\(==[0-9.]*\).*/\1/p' "$root/requirements.txt")
    installed=$(cat "$root/.venv/cuda.installed" 2>/dev/null || true)
    if [ ! "$cuda" ]; then
        case ${JAX_PLATFORMS:-cuda} in *cuda* | *gpu*) ;; *) return ;; esac
        driver=$(nvidia_driver)
        if [ ! "$driver" ]; then return; fi
        if ! cuda=$(cuda_of_driver "$driver"); then
            echo "launch/setup.sh: NVIDIA's driver $driver is older than 525, which CUDA 12 needs;" \
                "without CUDA, this runs on CPUs" >&2
            return
        fi
        if [[ $installed == "jax[cuda12]$jax" ]]; then return; fi
    fi
    if [[ $installed != "jax[cuda$cuda]$jax" ]]; then echo "jax[cuda$cuda]$jax"; fi
}

install_plugin() { # REQUIREMENT
    local driver
    driver=$(nvidia_driver)
    echo "Installing $1 into $root/.venv for NVIDIA's driver${driver:+ $driver} (about 3 GB, once)"
    rm -f "$root/.venv/cuda.installed"
    pip uninstall --yes jax-cuda{12,13}-{plugin,pjrt} # where both are, JAX loads both
    pip install "$1"
    echo "$1" >"$root/.venv/cuda.installed"
}

pip() {
    local quiet=(--quiet --quiet)
    if [ -t 1 ]; then quiet=(); fi # who waits at a terminal sees pip's own progress
    if ! "$python" -m pip "${quiet[@]}" --disable-pip-version-check "$@"; then
        echo "launch/setup.sh: pip failed on ${HOSTNAME:-this machine}; if it has no internet, run" \
            "launch/setup.sh (--help) on one that has, with the same file system" >&2
        exit 1
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case $* in
    '') set_up ;;
    --help | -h) usage ;;
    --cuda=12 | --cuda=13) set_up "${1#*=}" ;;
    *)
        echo "launch/setup.sh: unexpected $*; see --help" >&2
        exit 2
        ;;
    esac
else
    set_up
    if ! cmp -s "$root/requirements.txt" "$root/.venv/requirements.installed"; then
        exit 1 # also where the caller is in a condition, in which `set -e` has no effect
    fi
fi
