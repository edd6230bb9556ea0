# Sourced by quickstart.sh and tests/run.sh: leaves PYTHON, and `install` for pip.
# A machine whose Python already has a CUDA build of torch in range keeps it: those builds are several GB.
PYTHON=$PWD/.venv/bin/python
install() { "$PYTHON" -m pip install -q --disable-pip-version-check "$@"; }
if [ ! -x "$PYTHON" ]; then
  for python in python3 python3.13 python3.12 python3.11 none; do
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && break
  done
  if [ "$python" = none ]; then
    echo "error: Python 3.11, 3.12 or 3.13 is needed, and python3 is $(python3 --version 2>&1): install one, for example" \
      "by apt-get install python3.11 python3.11-venv, or conda create -n ltd python=3.12" >&2
    exit 2
  fi
  reuse=$("$python" - <<'PY' || true
try:
    import torch
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    print("--system-site-packages" if torch.version.cuda and (2, 8) <= release < (2, 14) else "")
except ImportError:
    pass
PY
)
  # What is there may lead to the Python of another machine; without python3-venv half of one is left.
  "$python" -m venv --clear $reuse .venv || { rm -rf .venv; exit 2; }
  if [ -n "$reuse" ]; then
    # Where the machine has these, pip would leave their commands there, and those run on the machine's own Python.
    grep -E '^(accelerate|huggingface-hub)[<>=]' requirements.txt > .venv/commands.txt
    install --ignore-installed --no-deps -r .venv/commands.txt
  fi
fi
