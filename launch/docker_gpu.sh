#!/usr/bin/env bash
# Trains in a container on all GPUs of this machine:
#   launch/docker_gpu.sh [--build] [--image=TAG] [--data=DIR] --workdir=DIR|gs://... [--dry_run]
#       -- --config=FILE [--config.FIELD=VALUE ...]
# --build    builds the image first; --image names it (spectral_pod:cuda)
# --workdir  the workdir of the run; a folder is mounted under its own path and belongs to you
# --data     a folder for data stores, mounted likewise; your files in it can be read
# --dry_run  prints the commands without running them
# The file that GOOGLE_APPLICATION_CREDENTIALS names is mounted read-only. For several nodes, start
# this on each, with --coordinator_address=HOST:PORT --num_processes=N --process_id=I after the --;
# the containers then use the host's network.
#
# --gpus=all needs the NVIDIA container toolkit on the host. --shm-size: NCCL exchanges data between
# GPUs through shared memory, of which a container has 64 MB by default; this is a limit and
# reserves nothing. --ulimit=memlock=-1: InfiniBand needs locked memory.
set -euo pipefail

fail() {
    echo "launch/docker_gpu.sh: $*; its first lines say how to call it" >&2
    exit 2
}

bind() { # SOURCE TARGET [OPTION]: --mount's value, in CSV, so that any path can be named
    local source=${1//\"/\"\"} target=${2//\"/\"\"}
    echo "type=bind,\"source=$source\",\"target=$target\"${3:+,$3}"
}

image=spectral_pod:cuda build='' data='' workdir='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
    --image=*) image=${1#*=} ;;
    --build) build=yes ;;
    --data=*) data=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) break ;;
    *) fail "unexpected argument $1" ;;
    esac
    shift
done
if [ $# -lt 2 ]; then fail "the trainer's flags are missing; they come after --"; fi
shift
if [ -z "$workdir" ]; then fail "--workdir is missing"; fi

# Libraries look up the names of users and groups, which the image does not know.
names=$HOME/.cache/spectral_pod/names
# With the default of 10 seconds to stop, the container would be killed while it saves.
options=(--rm --gpus=all --shm-size=16g --ulimit=memlock=-1 --stop-timeout=120
    --user="$(id -u):$(id -g)"
    --mount="$(bind "$names/passwd" /etc/passwd readonly)"
    --mount="$(bind "$names/group" /etc/group readonly)")
folders=("$names")
if [[ $workdir != gs://* ]]; then
    workdir=$(realpath -m -- "$workdir")
    options+=(--mount="$(bind "$workdir" "$workdir")")
    folders+=("$workdir")
fi
flags=(--workdir="$workdir")
if [ "$data" ]; then
    data=$(realpath -m -- "$data")
    options+=(--mount="$(bind "$data" "$data")")
    folders+=("$data")
    flags+=(--config.data.dir="$data")
fi
if [ "${GOOGLE_APPLICATION_CREDENTIALS:-}" ]; then
    if [ ! -r "$GOOGLE_APPLICATION_CREDENTIALS" ]; then
        fail "GOOGLE_APPLICATION_CREDENTIALS is $GOOGLE_APPLICATION_CREDENTIALS, which can't be read"
    fi
    credentials=$(realpath -- "$GOOGLE_APPLICATION_CREDENTIALS")
    options+=(--mount="$(bind "$credentials" "$credentials" readonly)"
        --env=GOOGLE_APPLICATION_CREDENTIALS="$credentials")
fi
for flag in "$@"; do
    case $flag in
    --coordinator_address | --coordinator_address=*)
        options+=(--network=host)
        if [ -d /dev/infiniband ]; then options+=(--device=/dev/infiniband); fi
        ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_command=(docker build --target=cuda --tag="$image" "$root")
run_command=(docker run "${options[@]}" "$image" "${flags[@]}" "$@")
if [ "$dry_run" ]; then
    if [ "$build" ]; then echo "${build_command[@]@Q}"; fi
    echo "${run_command[@]@Q}"
    exit
fi
mkdir -p -- "${folders[@]}" # Docker would make them for root
printf '%s:x:%d:%d::/home/trainer:/bin/sh\n' root 0 0 trainer "$(id -u)" "$(id -g)" >"$names/passwd"
for group in $(id -G); do echo "group$group:x:$group:"; done >"$names/group"
if [ "$build" ]; then "${build_command[@]}"; fi
exec "${run_command[@]}" # so that it receives signals and forwards them to the trainer
