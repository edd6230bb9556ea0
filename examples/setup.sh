# Sourced by quickstart.sh and tests/run.sh: leaves PYTHON, and `install` for pip.
# A machine whose Python already has a CUDA build of torch in range keeps it: those builds are several GB.
if [ ! -x .venv/bin/python ]; then
  reuse=$(python3 - <<'PY' || true
try:
    import torch
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    print("--system-site-packages" if torch.version.cuda and (2, 8) <= release < (2, 14) else "")
except ImportError:
    pass
PY
)
  python3 -m venv $reuse .venv
fi
PYTHON=$PWD/.venv/bin/python
install() { "$PYTHON" -m pip install -q --disable-pip-version-check "$@"; }
