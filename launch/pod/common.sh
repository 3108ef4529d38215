# Sourced by what runs on a worker. All of it is under one folder in its home:
#   code  this checkout    venv  its Python    run  the trainer's pid, exit_code, command and log
# shellcheck disable=SC2034 # the names below are used by those that source this

base=$HOME/spectral_pod
code=$base/code
venv=$base/venv
run=$base/run
mkdir -p "$run"

busy=4 # exit code of install.sh and start.sh where they would disturb a trainer that runs

is_running() { # run.sh holds this lock while it lives, so that a recycled pid cannot mislead
    ! flock --shared --nonblock "$run/lock" true
}

state() { # running PID, ended CODE, lost (the machine went down), or idle (never started)
    if is_running; then
        echo "running $(cat "$run/pid" 2>/dev/null || true)"
    elif [ -s "$run/exit_code" ]; then
        echo "ended $(cat "$run/exit_code")"
    elif [ -s "$run/command" ]; then
        echo "lost -"
    else
        echo "idle -"
    fi
}
