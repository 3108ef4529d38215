# Sourced by the launchers: NVIDIA's driver on this machine, and the CUDA that it can run.

nvidia_driver() { # [FILE]: prints its version; nothing where there is none
    local file=${1:-/proc/driver/nvidia/version} versions
    if versions=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
        echo "${versions%%$'\n'*}"
    elif [ -r "$file" ]; then # in containers and where only the driver is installed
        sed -nE 's/^NVRM version:[^0-9]* (x86_64|aarch64)?[^0-9]*([0-9][0-9.]*) .*/\2/p' "$file"
    fi
}

cuda_of_driver() { # VERSION: prints the newest of 12 and 13 that it can run; fails if none
    local major=${1%%.*} # docs.nvidia.com/cuda/cuda-toolkit-release-notes, table 2
    : "${major:=0}"
    if ((major >= 580)); then
        echo 13
    elif ((major >= 525)); then
        echo 12
    else
        false
    fi
}
