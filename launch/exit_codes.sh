# Sourced by the launchers: the meaning of the trainer's exit codes (spectral_pod/errors.py), and
# which of them a restart can fix.

exit_meaning() { # CODE
    local meaning
    name_exit "$1"
    echo "$meaning"
}

name_exit() { # CODE; sets its $meaning
    case $1 in
    0) meaning="done" ;;
    1) meaning="a bug: see the traceback" ;;
    2) meaning="a mistake in the command or configuration" ;;
    3) meaning="the numbers went bad" ;;
    75) meaning="preempted, state saved" ;;
    76) meaning="lost a peer" ;;
    77) meaning="stalled" ;;
    78) meaning="its time is up, state saved" ;;
    126 | 127) meaning="the command cannot be run" ;;
    130) meaning="interrupted" ;;
    *) if is_signal "$1"; then meaning="killed by signal $(($1 - 128))"; else meaning="unknown"; fi ;;
    esac
}

exit_is_curable() { # CODE
    case $1 in
    75 | 76 | 77) true ;;
    130) false ;;
    *) is_signal "$1" ;;
    esac
}

is_signal() { # CODE: shells add 128 to the signal's number, which is 64 at most
    [ "$1" -gt 128 ] && [ "$1" -le 192 ]
}
