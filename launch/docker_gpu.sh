#!/usr/bin/env bash
# Trains in a container on all GPUs of this machine:
#   launch/docker_gpu.sh [--build] [--cuda=12|13] [--image=NAME:TAG] --workdir=DIR|gs://...
#       [--data=DIR] [--env=NAME[=VALUE] ...] [--dry_run]
#       -- --config=FILE [--config.FIELD=VALUE ...]
# --build    builds the image first; --image names it (spectral_pod:cuda)
# --cuda     CUDA's major version in the image that --build makes: 13 needs NVIDIA's driver 580 or
#            newer, 12 needs 525; by default the newest that the driver of this machine runs, or 13
# --workdir  the workdir of the run; a folder is mounted under its own path and belongs to you
# --data     a folder for data stores, mounted likewise; your files in it can be read
# --env      a variable of the trainer's environment, repeatable. Without =VALUE it is taken from the
#            environment of this command, and its value is printed nowhere: --env=WANDB_API_KEY
# --dry_run  prints the commands without running them
# After -- come the trainer's flags; `-- --help` prints those. Google's credentials are mounted
# read-only: the file that GOOGLE_APPLICATION_CREDENTIALS names, or else the one that `gcloud auth
# application-default login` wrote. For several nodes, start this on each, with
# --coordinator_address=HOST:PORT --num_processes=N --process_id=I after the --; the containers then
# use the host's network.
#
# --gpus=all needs the NVIDIA container toolkit on the host. --shm-size: NCCL exchanges data between
# GPUs through shared memory, of which a container has 64 MB by default; this is a limit and
# reserves nothing. --ulimit=memlock=-1: InfiniBand needs locked memory.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/usage.sh"
source "$root/launch/nvidia.sh"
if asks_for_help "$@"; then usage && exit; fi

fail() {
    echo "launch/docker_gpu.sh: $*; see --help" >&2
    exit 2
}

bind() { # SOURCE TARGET [OPTION]: --mount's value, in CSV, so that any path can be named
    local source=${1//\"/\"\"} target=${2//\"/\"\"}
    echo "type=bind,\"source=$source\",\"target=$target\"${3:+,$3}"
}

image=spectral_pod:cuda build='' cuda='' data='' workdir='' dry_run='' variables=()
while [ $# -gt 0 ]; do
    case $1 in
    --image=*) image=${1#*=} ;;
    --build) build=yes ;;
    --cuda=*) cuda=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --env=*) variables+=("${1#*=}") ;;
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
case $cuda in
'' | 12 | 13) ;;
*) fail "--cuda=$cuda; it is 12 or 13" ;;
esac
if [ "$cuda" ] && [ ! "$build" ]; then fail "--cuda is for --build"; fi
repository=${image%@*} tag=latest # as github.com/distribution/reference says
if [[ ${repository##*/} == *:* ]]; then tag=${repository##*:} repository=${repository%:*}; fi
if [[ ! $repository =~ ^[a-z0-9]([a-z0-9._/:-]{0,253}[a-z0-9])?$ ||
    ! $tag =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$ ]]; then
    fail "--image=$image; write NAME:TAG, the name in lower case, the tag of 128 characters at most"
fi

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
for variable in ${variables[@]+"${variables[@]}"}; do
    name=${variable%%=*}
    if [[ ! $name =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]]; then
        fail "--env=$variable; write --env=NAME=VALUE or --env=NAME"
    fi
    if [ "$name" = "$variable" ] && ! printenv "$name" >/dev/null; then
        fail "--env=$name, and $name is not in the environment; export it"
    fi
    options+=(--env="$variable") # Docker takes a NAME alone from its environment
done
credentials=${GOOGLE_APPLICATION_CREDENTIALS:-}
if [ "$credentials" ]; then
    if [ ! -r "$credentials" ]; then
        fail "GOOGLE_APPLICATION_CREDENTIALS is $credentials, which can't be read"
    fi
    credentials=$(realpath -- "$credentials")
else
    credentials=${CLOUDSDK_CONFIG:-$HOME/.config/gcloud}/application_default_credentials.json
fi
if [ -r "$credentials" ]; then
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

if [ ! "$cuda" ]; then cuda=$(cuda_of_driver "$(nvidia_driver)") || cuda=13; fi
build_command=(docker build --target=cuda --build-arg=CUDA="$cuda" --tag="$image" "$root")
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
