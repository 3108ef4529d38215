# Sourced by the scripts that run on a worker. Everything is in one folder in its home:
#   code  this checkout    venv  its Python    run  the trainer's pid, exit_code, command and log
# shellcheck disable=SC2034 # used by the scripts that source this

base=$HOME/spectral_pod
code=$base/code
venv=$base/venv
run=$base/run
mkdir -p "$run"

busy=4 # exit code of install.sh and start.sh if they would disturb a running trainer

is_running() { # run.sh holds this lock while it runs: a pid could have been reused
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
