# Sourced by the launchers: --help prints the comment that a launcher starts with.

usage() { sed -n '2,/^[^#]/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$0"; }

asks_for_help() { # the launcher's arguments, up to --
    local argument
    for argument in "$@"; do
        case $argument in
        --help | -h) return ;;
        --) break ;;
        esac
    done
    false
}
