#!/usr/bin/env bash
# The startup script of every worker, as root, at every boot: sees to it that a slice ends, also
# without its launcher. Where nothing has run for keep_seconds and no launcher was there, the first
# worker of each slice deletes the whole request, a minute later the second, and so on; after
# max_run_seconds every worker lets its trainer save, and then they do the same. What it does is in
# $state/log.
#
# It stands alone: nothing else is installed when it starts, and perhaps never will be.
set -uo pipefail
state=${GUARD_STATE:-/var/lib/spectral_pod}
homes=${GUARD_HOMES:-/home}
every=${GUARD_SECONDS:-30}
grace=${GUARD_GRACE:-300} # seconds for a launcher to see that a run was stopped, and to end it

metadata() { # PATH
    curl --silent --show-error --fail --max-time 60 --header "Metadata-Flavor: Google" \
        "http://metadata.google.internal/computeMetadata/v1/$1"
}

call() { # METHOD URL [BODY]: of Google's APIs, as the service account
    local token
    token=$(metadata instance/service-accounts/default/token) || return 1
    token=${token#*\"access_token\":\"}
    curl --silent --show-error --fail-with-body --max-time 60 --request "$1" --header @- \
        --header "Content-Type: application/json" ${3:+--data "$3"} "$2" \
        <<<"Authorization: Bearer ${token%%\"*}"
}

say() { echo "$(date --iso-8601=seconds) $*"; }

told() { # PATH: what the metadata server says, however long it takes to answer
    local value
    while ! value=$(metadata "$1"); do sleep 5; done
    echo "$value"
}

is_running() { # a trainer, of any user; launch/pod/run.sh holds this lock
    local lock
    for lock in "$homes"/*/spectral_pod/run/lock; do
        if [ -e "$lock" ] && ! flock --shared --nonblock "$lock" true; then return; fi
    done
    return 1
}

last_use() { # when something ran here, or a launcher was here: seconds since 1970
    local file newest used
    newest=$(stat --format=%Y "$state/boot")
    for file in "$state/boot" "$state/used" "$homes"/*/spectral_pod/launcher; do
        if used=$(stat --format=%Y "$file" 2>/dev/null) && [ "$used" -gt "$newest" ]; then
            newest=$used
        fi
    done
    echo "$newest"
}

stop() { # lets the trainer save
    local run
    for run in "$homes"/*/spectral_pod/run; do
        if [ -s "$run/pid" ]; then
            touch "$run/stopped"
            kill -TERM "$(cat "$run/pid")" 2>/dev/null
        fi
    done
    for _ in {1..300}; do
        if ! is_running; then break; fi
        sleep 1
    done
}

end() { # WHY: deletes the request; the first worker at once, others if it has not
    say "$1; deleting $name"
    sleep $((worker * 60))
    call DELETE "https://tpu.googleapis.com/v2/projects/$project/locations/$zone/queuedResources/$name?force=true" ||
        say "that failed; THIS SLICE IS STILL BILLED"
}

watch() {
    local now
    while true; do
        now=$(date +%s)
        if is_running; then touch "$state/used"; fi
        if ((max_run > 0 && now - first_boot >= max_run)); then
            stop
            while (($(date +%s) - first_boot < max_run + grace)); do sleep "$every"; done
            end "this slice has lived for $((now - first_boot)) s, of $max_run at most"
        elif ((keep > 0 && now - $(last_use) >= keep)) && ! is_running; then
            end "nothing has run here for $keep s, and no launcher was here"
        fi
        sleep "$every"
    done
}

start() {
    touch "$state/boot"
    if [ ! -s "$state/first_boot" ]; then date +%s >"$state/first_boot"; fi
    first_boot=$(cat "$state/first_boot")
    name=$(told instance/attributes/spectral-pod-name)
    keep=$(told instance/attributes/spectral-pod-keep-seconds)
    max_run=$(told instance/attributes/spectral-pod-max-run-seconds)
    worker=$(metadata instance/attributes/agent-worker-number) || worker=0 # a single one has none
    project=$(told project/project-id)
    zone=$(told instance/zone)
    zone=${zone##*/}
    local answer
    answer=$(call POST "https://cloudresourcemanager.googleapis.com/v1/projects/$project:testIamPermissions" \
        '{"permissions": ["tpu.nodes.delete"]}' 2>&1)
    case $answer in
    *tpu.nodes.delete*) echo yes ;;
    *) echo "no: the service account needs roles/tpu.admin, or cannot be asked: ${answer//$'\n'/ }" ;;
    esac >"$state/allowed"
    say "may delete $name: $(cat "$state/allowed"); keeps it for $keep s, at most $max_run s in all"
    watch
}

mkdir -p "$state"
start </dev/null >>"$state/log" 2>&1 & # nothing of this script's remains open: the boot goes on
