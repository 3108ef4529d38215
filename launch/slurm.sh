#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU. From the repository's root, on a file system
# that all nodes see:
#   sbatch --nodes=2 launch/slurm.sh --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]
# Options of sbatch before the script override the #SBATCH lines: --time=24:00:00,
# --gpus-per-node=4 --ntasks-per-node=4, --partition=NAME. Two minutes before its time limit the
# trainer gets SIGTERM, saves and exits; then, and whenever else a restart helps, the job requeues
# itself, at most MAX_REQUEUES times (50), and continues. `scancel` ends it.
#
# The job's first node installs into .venv when something is missing, and jobs that start meanwhile
# wait. Where these nodes have no internet, run launch/setup.sh --cuda=13 on the login node first.
# Arguments are the trainer's. Its flags: .venv/bin/python -m spectral_pod.main --help; the fields
# of a config: spectral_pod/config.py.
#
#SBATCH --job-name=spectral_pod
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# SLURM runs a copy of this file from elsewhere.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [ ! -f "$root/launch/slurm.sh" ]; then
    echo "launch/slurm.sh: $root is not the root of the repository; submit from there" >&2
    exit 2
fi
source "$root/launch/usage.sh"
if asks_for_help "$@"; then usage && exit; fi
if [ ! "${SLURM_JOB_ID:-}" ]; then
    echo "launch/slurm.sh: not a job of SLURM; submit it: sbatch launch/slurm.sh; see --help" >&2
    exit 2
fi
cd "$root"
source launch/setup.sh
source launch/exit_codes.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # a GPU that JAX cannot use is an error
if [ "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# srun returns the highest exit code of its tasks. When one fails by itself (1, 2, 3) its peers exit
# with 76; 200 is added to its code here and subtracted below, so that it takes precedence. A task's
# shell survives SIGTERM to return the trainer's code. Tasks that are left when others have ended are
# killed after a while, not at once: they may be saving.
# With pyxis, add: --container-image=IMAGE --container-mounts=DIR (and python for "$python").
code=0
# shellcheck disable=SC2016 # expanded by the task's shell
srun --kill-on-bad-exit=0 --wait=300 bash -c '
    trap : TERM
    "$@"
    code=$?
    case $code in [123]) exit $((code + 200)) ;; *) exit $code ;; esac
' task "$python" -m spectral_pod.main "$@" || code=$?
case $code in 20[123]) code=$((code - 200)) ;; esac

if exit_is_curable "$code"; then
    restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts < ${MAX_REQUEUES:-50})); then
        echo "launch/slurm.sh: $(exit_meaning "$code"); back into the queue" >&2
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    echo "launch/slurm.sh: $(exit_meaning "$code"); $restarts restarts are enough" >&2
fi
exit "$code"
