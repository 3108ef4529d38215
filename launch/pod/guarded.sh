#!/usr/bin/env bash
# On the first worker of a slice: whether the slice can delete itself, and if not, why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for _ in {1..60}; do # it may still be asking
    if [ -s "${GUARD_STATE:-/var/lib/spectral_pod}/allowed" ]; then break; fi
    sleep 1
done
allowed=$(cat "${GUARD_STATE:-/var/lib/spectral_pod}/allowed" 2>/dev/null || echo "its guard does not run")
echo "$(hostname): the slice may delete itself: $allowed"
[ "$allowed" = yes ]
