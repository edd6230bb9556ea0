#!/usr/bin/env bash
# Sets up a virtual environment if there is none, and runs every test; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
install -r requirements.txt -e ".[test]"
"$PYTHON" -m ruff check .
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q "$@"
