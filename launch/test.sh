#!/usr/bin/env bash
# The whole gate, the same locally and in CI: format, lint, types, tests.
# launch/test.sh [pytest arguments]; minutes-long tests: launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff format --check --quiet .
"$python" -m ruff check --quiet .
"$python" -m mypy & # on one core, while some tests wait
types=$!
"$python" -m pytest "$@"
wait "$types"
if [ $# = 0 ]; then
    echo "Not run: the tests marked slow. \`launch/test.sh -m slow\` runs them, in an hour or more."
fi
