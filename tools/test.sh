#!/bin/sh
# Runs the tests in two parts: tools/test.sh [pytest's arguments]
# First those that bring processes, ports and directories of their own, several at a time; then, one by one, those that need
# the machine for themselves: containers, the real engine, and what measures times that others would stretch (marker `alone`).
set -u
cd "$(dirname "$0")/.."

PROCESSES=${VLLMD_TEST_PROCESSES:-auto}
pytest=.venv/bin/pytest

# A module's tests stay together, in order: they share servers, and some build upon each other.
"$pytest" --part=together -n "$PROCESSES" --maxprocesses=4 --dist=loadfile -m "not soak" --durations=15 "$@"
together=$?
case $together in 0 | 1 | 5) ;; *) exit "$together" ;; esac
"$pytest" --part=alone -m "not soak" --durations=15 "$@"
alone=$?

# Status 5 is pytest's "none selected": the arguments may choose tests of one part only.
for status in "$together" "$alone"; do
    case $status in 0 | 5) ;; *) exit "$status" ;; esac
done
[ "$together" -eq 0 ] || exit "$alone"
