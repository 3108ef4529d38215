# Sourced by the launchers: creates .venv from requirements.txt, and updates it when that changes.
# Sets $root (the repository) and $python (the interpreter of the environment).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

stamp=$root/.venv/requirements.installed
if ! cmp -s "$root/requirements.txt" "$stamp"; then
    for base in python3 python3.13 python3.12 python3.11; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        base=
    done
    if [ -z "$base" ]; then
        echo "launch/setup.sh: no Python 3.11 or newer is on PATH; install one and run again" >&2
        exit 1
    fi
    echo "Installing requirements.txt into $root/.venv (about 2 GB, some minutes, once)"
    "$base" -m venv "$root/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
    cp "$root/requirements.txt" "$stamp"
fi
