#!/usr/bin/env bash
# Checks style and types and runs the tests.
#
#   bash test.sh                     everything; tests share up to 4 cores
#   bash test.sh --fast              style, types and the fast tier: no tests that start several
#                                    processes or take long (tests/tiers.py says which)
#   bash test.sh --all               with every layout and case that is otherwise sampled, and ten
#                                    times the random examples (MOESPAN_TEST_ALL=1); for releases
#   bash test.sh tests/engine -x     arguments go to pytest; folders and files that are named
#                                    run in one process
#
# Two quiet cores take about 11 minutes for everything, 2 minutes for --fast.
set -euo pipefail
cd "$(dirname "$0")"

arguments=()
shared=(-n auto --maxprocesses 4)
for argument; do
    case "$argument" in
        --fast) arguments+=(-m "not slow") ;;
        --all) export MOESPAN_TEST_ALL=1 ;;
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        *)
            [ -e "${argument%%::*}" ] && shared=()
            arguments+=("$argument")
            ;;
    esac
done

source scripts/setup.sh
setup "[dev]"

trap 'echo "test.sh took $SECONDS s"' EXIT
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest ${shared[@]+"${shared[@]}"} ${arguments[@]+"${arguments[@]}"}
