#!/usr/bin/env bash
# Sets up a virtual environment if there is none, and runs every test; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
install -r requirements.txt -e ".[test]"
if ! command -v chromium chromium-browser google-chrome > /dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing Chromium for the tests of web pages"
    (apt-get update && apt-get install -y --no-install-recommends chromium) > /dev/null ||
      echo "apt-get install chromium failed: the tests of web pages are skipped"
  else
    echo "no Chromium: the tests of web pages are skipped (on Debian: sudo apt-get install chromium)"
  fi
fi
"$PYTHON" -m ruff check .
# A file a process, two at once: more would not fit a small machine; in the order of conftest.py, which is by length.
# `-m ''`: the slow ones too, which pytest leaves out.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m '' "$@"
