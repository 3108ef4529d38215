# Sourced by tpu_pod.sh: calls of gcloud for $name in $place (the flags of zone and project).
# With $dry_run, commands are printed instead.
# shellcheck disable=SC2034,SC2154 # tpu_pod.sh sets these variables and reads $over

pod=spectral_pod/code/launch/pod # on the workers, from their home

say() { echo "tpu_pod: $1" >&2 || true; } # a closed terminal must not end the script

fail() { # CODE MESSAGE
    over=yes
    say "$2"
    exit "$1"
}

run() { # a command, or with --dry_run its text
    if [ "$dry_run" ]; then
        local text
        text=$(printf '%q ' "$@")
        echo "${text% }"
    else
        "$@"
    fi
}

tpus() { run gcloud compute tpus "$@" "${place[@]}"; }

nodes() {
    if [ "$num_slices" -eq 1 ]; then
        echo "$name"
    else
        local i
        for ((i = 0; i < num_slices; i++)); do echo "$name-$i"; done
    fi
}

in_background() { # a command, in its own process group so that all of it can be killed
    set -m
    "$@" </dev/null &
    set +m
}

end_background() {
    local job
    for job in $(jobs -pr); do kill -- "-$job" 2>/dev/null || kill "$job" 2>/dev/null || true; done
}

on_nodes() { # FUNCTION [ARGUMENT ...], called with each node first; returns a non-zero code of any
    local function=$1 node job code=0 jobs=()
    shift
    for node in $(nodes); do
        if [ "$dry_run" ]; then
            "$function" "$node" "$@"
        else
            in_background "$function" "$node" "$@"
            jobs+=($!)
        fi
    done
    for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || code=$?; done
    return "$code"
}

copy() { # NODE FILE, to all its workers
    tpus tpu-vm scp "$2" "$1:spectral_pod.tar.gz" --worker=all --quiet
}

reach() { # NODE WORKER COMMAND; --quiet: no prompts
    tpus tpu-vm ssh "$1" --worker="$2" --quiet --command="$3"
}

reach_all() { reach "$1" all "$2"; }

on_workers() { # SCRIPT [ARGUMENT ...]: launch/pod/SCRIPT on all workers of all slices
    on_nodes reach_all "$(script "$@")"
}

script() { # SCRIPT [ARGUMENT ...]: quoted for the worker's shell, to which gcloud passes it
    local text
    text=$(printf ' %q' "$@")
    echo "$pod/${text# }"
}

value_of() { # queued-resources|tpu-vm NAME FIELD: the field, ABSENT, or UNKNOWN and gcloud's message
    local text
    if text=$(tpus "$1" describe "$2" --format="value($3)" --verbosity=error 2>&1); then
        echo "$text"
    elif [[ $text == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        say "$text"
        echo UNKNOWN
    fi
}

requested() { value_of queued-resources "$name" "$1"; } # FIELD

health() { # READY, or the state of the request or node that is not
    local state node
    state=$(requested state.state)
    if [ "$state" = ACTIVE ]; then
        for node in $(nodes); do
            state=$(value_of tpu-vm "$node" state)
            case $state in
            READY) ;;
            ABSENT | DELETING) state=MISSING && break ;; # the request will be suspended next
            *) break ;;
            esac
        done
    fi
    echo "$state"
}

pause() { # unlike sleep, interrupted by signals at once
    sleep "$poll" &
    wait $!
}
