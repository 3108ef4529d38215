#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or on several: creates it, installs this checkout, trains, continues
# after preemptions, and deletes it at the end.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v4-32 [options] -- \
#       --config=configs/lra_listops.py --workdir=gs://BUCKET/RUN [more flags of the trainer]
#   launch/tpu_pod.sh status|logs|stop|delete --name=NAME --zone=ZONE [--project=PROJECT]
#
# The same command again continues: what exists is kept, and a running trainer is only watched.
# Ctrl-C deletes a request that still waits for its TPU, but does not stop a running trainer.
#
#   --name              of the queued resource; its nodes are NAME, or NAME-0, NAME-1 ...
#   --type              v4-N, v5e-N (v5litepod-N), v5p-N or v6e-N, as Google Cloud counts
#   --num_slices        number of slices, connected by the data centre's network (1)
#   --spot              cheaper, may be preempted at any time
#   --project --service_account --network --subnetwork --runtime_version
#                       gcloud's defaults; the runtime version's follows from the type
#   --force             continue although preflight reports that the run does not fit
#   --keep              do not delete the slice when the run ends (billing continues)
#   --dry_run           print every command, ready to paste, and run none
#   --wait_minutes      how long to wait for the TPU (1440)
#   --max_recreations   how often to re-create a preempted slice (100)
#   --slice --worker    the worker whose log `logs` shows (0, 0)
#
# Exits with the trainer's code: 0 done, 1 a bug, 2 a user error, 3 non-finite numbers; its own
# failures are 1, errors in this command 2, Ctrl-C 130.
#
# Needs the APIs tpu.googleapis.com and compute.googleapis.com. Least privilege:
#   you               roles/tpu.admin, roles/iam.serviceAccountUser on the service account, and
#                     either roles/compute.osLogin (where OS Login is on) or
#                     compute.projects.get (roles/compute.viewer) for ssh; port 22 open to you
#   --service_account roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket,
#                     optionally roles/logging.logWriter, roles/monitoring.metricWriter on the project
# For slices of several workers gcloud may need its key in your ssh-agent:
#   ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/exit_codes.sh"
source "$launch/gcloud.sh"

poll=${TPU_POD_POLL_SECONDS:-30} # between checks of the slice; every fourth asks all workers
busy=4                           # exit code of launch/pod/*.sh where it would disturb another run

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# ---------------------------------------------------------------------------- the command line

parse() {
    action=up name='' zone='' project='' type='' num_slices=1 runtime_version='' options=()
    force='' keep='' dry_run='' wait_minutes=1440 max_recreations=100 slice=0 worker=0 trainer=()
    case ${1:-} in
    up | status | logs | stop | delete)
        action=$1
        shift
        ;;
    esac
    while [ $# -gt 0 ]; do
        case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --num_slices=*) num_slices=${1#*=} ;;
        --runtime_version=*) runtime_version=${1#*=} ;;
        --service_account=*) options+=(--service-account="${1#*=}") ;;
        --network=* | --subnetwork=*) options+=("$1") ;;
        --spot) options+=(--spot) ;;
        --force) force=yes ;;
        --keep) keep=yes ;;
        --dry_run) dry_run=yes ;;
        --wait_minutes=*) wait_minutes=${1#*=} ;;
        --max_recreations=*) max_recreations=${1#*=} ;;
        --slice=*) slice=${1#*=} ;;
        --worker=*) worker=${1#*=} ;;
        --help | -h) usage && exit ;;
        --)
            shift
            trainer=("$@")
            break
            ;;
        *) fail 2 "unknown argument $1; see --help: --flag=VALUE, the trainer's flags after --" ;;
        esac
        shift
    done
}

check() {
    matches --name "$name" '[a-z]([-a-z0-9]{0,58}[a-z0-9])?' "lower-case letters, digits, hyphens"
    matches --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-central2-b"
    if [ "$project" ]; then
        matches --project "$project" '[a-z][-a-z0-9.:]{4,60}[a-z0-9]' "a project's id"
    fi
    local flag
    for flag in num_slices wait_minutes max_recreations slice worker; do
        matches "--$flag" "${!flag}" '[0-9]{1,6}' "a number"
    done
    [ "$num_slices" -ge 1 ] || fail 2 "--num_slices=0: at least 1"
    place=(--zone="$zone" ${project:+"--project=$project"})
    if [ "$action" = up ]; then check_run; fi
}

check_run() { # flags that only creating and training need
    matches --type "$type" '(v4|v5e|v5litepod|v5p|v6e)-[0-9]{1,5}' "v4-N, v5e-N, v5p-N or v6e-N"
    type=${type/#v5e-/v5litepod-} # gcloud's name
    case $type in
    v4-*) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
    esac
    has_flag --config= || fail 2 "no --config=FILE after --"
    has_flag --workdir=gs:// ||
        fail 2 "no --workdir=gs://BUCKET/RUN after --: a slice's disks go away with it"
}

has_flag() { # START of one of the trainer's flags
    local argument
    for argument in ${trainer[@]+"${trainer[@]}"}; do
        if [[ $argument == "$1"?* ]]; then return; fi
    done
    return 1
}

matches() { # FLAG VALUE PATTERN MEANING
    [[ $2 =~ ^$3$ ]] || fail 2 "$1=$2: must be $4"
}

# ---------------------------------------------------------------------- creating and deleting

phase='' # asked (this call requested a TPU), found (an earlier one did), or training
over=''  # the run ended or cannot continue; otherwise a slice that trains is never deleted

preflight() {
    local arguments=() argument
    for argument in "${trainer[@]}"; do
        if [[ $argument == --config[.=]* ]]; then arguments+=("$argument"); fi
    done
    arguments+=(--topology="$type" --num_slices="$num_slices")
    if [ "$dry_run" ]; then
        run python -m tools.preflight "${arguments[@]}"
        return
    fi
    source "$launch/setup.sh" # leaves $root and $python
    local code=0
    (cd "$root" && "$python" -m tools.preflight "${arguments[@]}") || code=$?
    case $code in # tools/preflight.py: TOO_BIG, GROWS, INVALID
    0) ;;
    1) [ "$force" ] || fail 2 "preflight: it doesn't fit $type x $num_slices; --force tries it" ;;
    2) say "preflight: a collective grows with the slice, as the report says; going on" ;;
    *) fail 2 "preflight: the configuration cannot run on $type x $num_slices" ;;
    esac
}

acquire() { # a READY slice; returns 1 if a later attempt may succeed
    local state
    state=$(requested state.state)
    if [ "$state" != ABSENT ] && [ "$state" != UNKNOWN ]; then
        check_same
        state=$(health)
        say "$name is there: $state"
        if is_lost "$state"; then
            delete || return 1
            state=ABSENT
        fi
    fi
    case $state in
    UNKNOWN) return 1 ;;
    ABSENT)
        phase=asked
        create || return 1
        ;;
    *) phase=found ;;
    esac
    wait_until_ready
}

is_lost() { # STATE: it will not recover by itself; exits if that was deliberate
    case $1 in
    FAILED | SUSPENDED | SUSPENDING | MISSING | PREEMPTED | TERMINATED | STOPPED) true ;;
    ABSENT | DELETING)
        phase=''
        fail 1 "somebody deleted $name"
        ;;
    *) false ;;
    esac
}

check_same() {
    local there
    there=$(requested 'tpu.nodeSpec[0].node.acceleratorType')
    [ "$there" = "$type" ] || fail 2 "$name is a $there, not a $type; choose another --name"
    there=$(count_slices)
    [ "$there" = "$num_slices" ] || fail 2 "$name has $there slices, not $num_slices"
}

count_slices() {
    local count
    count=$(requested 'tpu.nodeSpec[0].multisliceParams.nodeCount')
    echo "${count:-1}"
}

create() {
    local which=(--node-id="$name")
    if [ "$num_slices" -gt 1 ]; then which=(--node-count="$num_slices" --node-prefix="$name"); fi
    tpus queued-resources create "$name" "${which[@]}" --accelerator-type="$type" \
        --runtime-version="$runtime_version" ${options[@]+"${options[@]}"}
}

wait_until_ready() {
    local state since=$SECONDS
    while true; do
        state=$(health)
        if [ "$state" = READY ]; then return; fi
        if is_lost "$state"; then
            say "$name is $state: $(requested state.failedData.error.message)"
            return 1
        fi
        say "$name is $state, $(((SECONDS - since) / 60)) min"
        if ((SECONDS - since >= wait_minutes * 60)); then
            say "no TPU within --wait_minutes=$wait_minutes"
            return 1
        fi
        pause
    done
}

delete() {
    local text
    if [ "$dry_run" ]; then
        tpus queued-resources delete "$name" --force --quiet
    elif text=$(tpus queued-resources delete "$name" --force --quiet 2>&1); then
        say "deleted $name"
    elif [[ $text != *NOT_FOUND* ]]; then
        say "$text"
        say "COULD NOT DELETE $name: it may still be billing"
        return 1
    fi
}

# --------------------------------------------------------------------- installing and starting

deploy() { # returns 1 if the slice is gone; three attempts, as the network may fail
    local attempt state
    phase=training
    for attempt in 1 2 3; do
        if ship && install && start; then return; fi
        state=$(health)
        if is_lost "$state"; then return 1; fi
        say "attempt $attempt of 3 to install and start failed"
    done
    fail 1 "some worker cannot be installed or started: see above"
}

ship() {
    archive=${TMPDIR:-/tmp}/spectral_pod-$name.tar.gz
    run git -C "$launch/.." archive --format=tar.gz --output="$archive" "$revision" || return 1
    on_nodes copy "$archive" || return 1
}

install() { # the scripts first: replacing them does not disturb a running trainer
    local code=spectral_pod/code
    local unpack="mkdir -p $code && tar -xzf spectral_pod.tar.gz -C $code launch"
    on_nodes reach_all "$unpack && $(script install.sh "$revision")" || refuse_if_busy $?
}

start() { on_workers start.sh "${trainer[@]}" || refuse_if_busy $?; }

refuse_if_busy() { # CODE
    if [ "$1" -eq "$busy" ]; then
        phase=''
        fail 2 "another run is on $name; to end it: $(hint stop)"
    fi
    return 1
}

choose_revision() { # HEAD now, also for slices that are re-created after HEAD has moved
    revision=$(git -C "$launch/.." rev-parse HEAD) || fail 2 "$launch/.. must be a git checkout"
    local changes
    changes=$(git -C "$launch/.." status --porcelain | wc -l)
    if [ "$changes" -gt 0 ]; then
        say "HEAD will be installed, without the $((changes)) uncommitted changes here"
    fi
}

# ------------------------------------------------------------------------------------ watching

watch() { # sets the trainer's $result; returns 1 if the slice is gone
    local state polls=0 follower
    in_background follow "$(nodes | head -n 1)" 0
    follower=$!
    while true; do
        pause
        state=$(health)
        if is_lost "$state"; then
            say "$name is $state"
            end_background
            return 1
        fi
        polls=$((polls + 1))
        if ((polls % 4 == 0)) || ! kill -0 "$follower" 2>/dev/null; then
            if has_ended; then break; fi
        fi
    done
    wait "$follower" || true
}

follow() { # NODE WORKER: prints the log to its end, each line once, across reconnections
    local node=$1 worker=$2 next=0 number=0 line ended=''
    while true; do
        while IFS= read -r line; do
            if [[ $line =~ ^spectral_pod\ log\ from\ line\ ([0-9]+)$ ]]; then
                number=${BASH_REMATCH[1]}
            elif [ "$line" = "spectral_pod log ends" ]; then
                ended=yes
            else
                if ((number >= next)); then
                    printf '%s\n' "$line"
                    next=$((number + 1))
                fi
                number=$((number + 1))
            fi
        done < <(reach "$node" "$worker" "$(script follow.sh "$next")" 2>/dev/null)
        if [ "$ended" ]; then return; fi
        say "the connection to worker $worker of $node was lost; trying again"
        pause
    done
}

unanswered=0

has_ended() { # on all workers; restarts after a reboot, stops what cannot continue alone
    local report host state detail running='' lost='' failed='' code=0
    if ! report=$(on_workers status.sh 2>/dev/null); then
        unanswered=$((unanswered + 1))
        if ((unanswered % 3 == 0)); then revive "some worker"; fi
        return 1
    fi
    unanswered=0
    while read -r host state detail _; do
        case $state in
        running) running=yes ;;
        ended)
            code=$(worse "$code" "$detail")
            if [ "$detail" -ne 0 ]; then failed=$host; fi
            ;;
        *) lost=$host ;;
        esac
    done <<<"$report"
    if [ "$failed" ] && [ "$running" ]; then
        say "$failed ended with $code ($(exit_meaning "$code")); stopping the others"
        on_workers stop.sh || true
    elif [ "$lost" ] && [ ! "$failed" ]; then
        revive "$lost"
        return 1
    elif [ "$running" ]; then
        return 1
    fi
    if [ "$failed" ]; then on_workers explain.sh || true; fi
    result=$code
}

revive() { # HOST
    say "$1 has lost its trainer; installing and starting where that is needed"
    if ship && install; then start || true; fi
}

worse() { # CODE CODE: the worse; one that a restart cannot fix is worse than one that it can
    if [ "$1" -eq 0 ]; then
        echo "$2"
    elif exit_is_curable "$1" && [ "$2" -ne 0 ] && ! exit_is_curable "$2"; then
        echo "$2"
    else
        echo "$1"
    fi
}

# ------------------------------------------------------------------------------------- actions

up() {
    choose_revision
    preflight
    if [ "$dry_run" ]; then
        plan
        return
    fi
    local recreations=0
    until acquire && deploy && watch; do
        if [ "$phase" != training ] && [ "$recreations" -eq 0 ]; then exit 1; fi
        recreations=$((recreations + 1))
        if [ "$recreations" -gt "$max_recreations" ]; then
            fail 1 "preempted more often than --max_recreations=$max_recreations"
        fi
        say "creating it again ($recreations of at most $max_recreations); the run will continue"
        delete || true
        pause
    done
    say "the trainer ended with $result ($(exit_meaning "$result"))"
    over=yes
    exit "$result"
}

plan() { # the steps of `up` without failures
    requested state.state
    create
    each_node_state
    ship
    install
    start
    reach "$(nodes | head -n 1)" 0 "$(script follow.sh 0)"
    on_workers status.sh
    if [ ! "$keep" ]; then delete; fi
}

locate() { # sets $num_slices
    if [ "$dry_run" ]; then return; fi
    local state
    state=$(requested state.state)
    case $state in
    ABSENT) fail 1 "there is no $name in $zone" ;;
    UNKNOWN) exit 1 ;;
    esac
    num_slices=$(count_slices)
    say "$name is $state"
}

status() {
    locate
    each_node_state
    on_workers status.sh
}

each_node_state() {
    local node
    for node in $(nodes); do
        if [ ! "$dry_run" ]; then echo -n "$node "; fi
        value_of tpu-vm "$node" state
    done
}

logs() {
    locate
    [ "$slice" -lt "$num_slices" ] || fail 2 "--slice=$slice: $name has $num_slices"
    local node
    node=$(nodes | sed -n "$((slice + 1))p")
    if [ "$dry_run" ]; then
        reach "$node" "$worker" "$(script follow.sh 0)"
    else
        follow "$node" "$worker"
    fi
}

stop() {
    locate
    on_workers stop.sh
}

delete_all() { # after the trainers have saved their state
    if [ "$dry_run" ] || [ "$(requested state.state)" = ACTIVE ]; then
        locate
        on_workers stop.sh || true
    fi
    delete
}

hint() { # ACTION
    echo "launch/tpu_pod.sh $1 --name=$name ${place[*]}"
}

on_exit() { # for any reason
    local code=$?
    trap '' HUP INT TERM # a second Ctrl-C must not interrupt the deletion
    end_background
    rm -f "${archive:-}"
    case $phase in
    asked) delete || true ;;
    found) say "the request for $name stays: $(hint delete)" ;;
    training)
        if [ ! "$over" ]; then
            say "detached; $name goes on AND IS BILLING: $(hint "{status,stop,delete}")"
        elif [ "$keep" ]; then
            say "$name is kept AND IS BILLING: $(hint delete)"
        else
            if [ ! "${result:-}" ]; then on_workers stop.sh || true; fi
            delete || true
        fi
        ;;
    esac
    exit "$code"
}

parse "$@"
check
trap on_exit EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
case $action in
delete) delete_all ;;
*) "$action" ;;
esac
