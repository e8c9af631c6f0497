#!/bin/sh
# Runs the tests in three parts: tools/test.sh [pytest's arguments]
# First those that bring processes, ports and directories of their own, four at a time whatever the machine has: they wait for two
# thirds of their time; then those that boot containers, two at a time; then, one by one, those that need the machine for themselves: the real engine, and what
# measures times that others would stretch (marker `alone`).
# A machine that is shared stands still now and then for longer than a deadline of a test: a few that failed are run once more,
# one by one, and named at the end as unsteady if they pass. Their first failure stays in the output: it is to be looked into.
set -u
cd "$(dirname "$0")/.."

PROCESSES=${VLLMD_TEST_PROCESSES:-4}
CONTAINERS=${VLLMD_TEST_CONTAINERS:-2}
AGAIN=${VLLMD_TEST_AGAIN:-4}
pytest=.venv/bin/pytest
failed=.pytest_cache/v/cache/lastfailed
none=5 # pytest's "none selected": the arguments may choose tests of one part only
status=$none

# Usage: run PART [ARGUMENTS]; leaves the worst of the statuses so far in $status.
run() {
    part=$1
    shift
    "$pytest" "--part=$part" -m "not soak" --durations=15 "$@"
    ended=$?
    case $ended in
        0) [ "$status" -eq 1 ] || status=0 ;;
        1) status=1 ;;
        "$none") ;;
        *) exit "$ended" ;;
    esac
}

rm -f "$failed"
# A module's tests stay together, in order: they share servers, and some build upon each other.
run together -n "$PROCESSES" --dist=loadfile "$@"
run containers -n "$CONTAINERS" --dist=loadfile --no-loadscope-reorder "$@"
run alone "$@"
[ "$status" -eq 1 ] || exit "$status"
names=$(sed -n 's/^  "\(.*\)": true,\{0,1\}$/\1/p' "$failed")
count=$(printf '%s\n' "$names" | grep -c .)
if [ "$count" -eq 0 ] || [ "$count" -gt "$AGAIN" ]; then
    exit 1
fi
"$pytest" --last-failed --last-failed-no-failures=none -m "not soak" "$@" || exit 1
printf '%s\n' "UNSTEADY: failed, and passed when run again alone (the failures stand above):" "$names"
