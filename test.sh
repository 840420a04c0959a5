#!/usr/bin/env bash
# Checks style and types and runs all tests. Arguments go to pytest: bash test.sh tests/engine -x
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
setup "[dev]"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
