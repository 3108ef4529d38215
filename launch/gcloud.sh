# Sourced by tpu_pod.sh: what it asks gcloud about $name in $place (the flags of zone and project).
# With $dry_run, commands are printed instead.
# shellcheck disable=SC2034,SC2154 # tpu_pod.sh sets these variables and reads $over

pod=spectral_pod/code/launch/pod # on the workers, from their home

say() { echo "tpu_pod: $1" >&2 || true; } # a terminal that is gone is no reason to end

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

in_background() { # a command, in a process group of its own so that all of it can be ended
    set -m
    "$@" </dev/null &
    set +m
}

end_background() {
    local job
    for job in $(jobs -pr); do kill -- "-$job" 2>/dev/null || kill "$job" 2>/dev/null || true; done
}

on_nodes() { # FUNCTION [ARGUMENT ...], called with each node first; the first code that isn't 0
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

reach() { # NODE WORKER COMMAND; --quiet: no questions, which nobody would answer
    tpus tpu-vm ssh "$1" --worker="$2" --quiet --command="$3"
}

reach_all() { reach "$1" all "$2"; }

on_workers() { # SCRIPT [ARGUMENT ...]: launch/pod/SCRIPT on all workers of all slices
    on_nodes reach_all "$(script "$@")"
}

script() { # SCRIPT [ARGUMENT ...]: as the worker's shell reads it, to which gcloud passes it on
    local text
    text=$(printf ' %q' "$@")
    echo "$pod/${text# }"
}

value_of() { # queued-resources|tpu-vm NAME FIELD: the field, ABSENT, or UNKNOWN and gcloud's words
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

health() { # READY, or the state of what isn't: the request's, or that of a node
    local state node
    state=$(requested state.state)
    if [ "$state" = ACTIVE ]; then
        for node in $(nodes); do
            state=$(value_of tpu-vm "$node" state)
            case $state in
            READY) ;;
            ABSENT | DELETING) state=MISSING && break ;; # the request is about to be suspended
            *) break ;;
            esac
        done
    fi
    echo "$state"
}

pause() { # interrupted by signals at once
    sleep "$poll" &
    wait $!
}
