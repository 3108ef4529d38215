#!/usr/bin/env bash
# The whole gate, the same locally and in CI: format, lint, types, tests.
#   launch/test.sh                       a quarter of an hour on two CPU cores, after installing
#   launch/test.sh tests/ops -k delta    arguments are pytest's: .venv/bin/python -m pytest --help
#   launch/test.sh -m slow               the tests that take minutes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
if asks_for_help "$@"; then usage && exit; fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # whose devices can be faked
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff format --check --quiet .
"$python" -m ruff check --quiet .
"$python" -m mypy & # on one core, while some tests wait
types=$!
"$python" -m pytest "$@"
wait "$types"
if [ $# = 0 ]; then
    echo "Not run: the tests marked slow. \`launch/test.sh -m slow\` runs them, in two hours or more."
fi
