# Sourced by the scripts that run on a worker. Everything is below one folder in the home directory:
#   code  this checkout    venv  its Python    environment  variables for the trainer
#   scripts  launch/ of the newest launcher, of which this is a part
#   run   the trainer's pid, exit_code, command and log    launcher  touched whenever it was here
# shellcheck disable=SC2034 # the variables are used by the scripts that source this file

base=$HOME/spectral_pod
code=$base/code
venv=$base/venv
run=$base/run
mkdir -p "$run"
touch "$base/launcher" # guard.sh looks at it

busy=4 # exit code of install.sh and start.sh if they would disturb a running trainer

is_held() { # LOCK: whether a process holds it; a recorded pid could have been reused
    ! flock --shared --nonblock "$1" true
}

is_running() { is_held "$run/lock"; } # run.sh holds it

state() { # running PID, installing, ended CODE, lost (the machine went down), or idle (never started)
    local ended
    if is_running; then
        echo "running $(cat "$run/pid" 2>/dev/null || true)"
    elif is_held "$base/install.lock"; then
        echo "installing -"
    elif [ -s "$run/exit_code" ]; then
        ended=$(cat "$run/exit_code")
        # Nobody asked it to stop, so the machine did, which is going down or has been down.
        if [ "$ended" = 75 ] && [ ! -e "$run/stopped" ]; then echo "lost -"; else echo "ended $ended"; fi
    elif [ -s "$run/command" ]; then
        echo "lost -"
    else
        echo "idle -"
    fi
}
