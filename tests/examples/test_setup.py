"""examples/setup.sh, with Pythons that are none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # a shell

OLD = """#!/bin/sh
case "$1" in --version) echo "Python 3.8.10" ;; *) exit 1 ;; esac
"""
WITHOUT_VENV = """#!/bin/sh
case "$1" in -m) mkdir -p .venv/bin; touch .venv/bin/python; echo "ensurepip is not available" >&2; exit 1 ;; esac
"""
NEW = """#!/bin/sh
case "$1" in -m) mkdir -p .venv/bin; touch .venv/bin/python; echo "$0 $*" ;; esac
"""


@pytest.fixture
def source(tmp_path):
    """Function that sources the file in an empty folder, where only the Pythons of `programs` are on the path."""

    def run(**programs: str) -> subprocess.CompletedProcess:
        path = tmp_path / "bin"
        path.mkdir()
        for name in ("mkdir", "touch", "rm", "sh", "cat"):
            (path / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            program = path / name.replace("_", ".")
            program.write_text(text)
            program.chmod(0o755)
        command = [shutil.which("bash"), "-c", f"set -euo pipefail; source '{ROOT}/examples/setup.sh'; echo $PYTHON"]
        env = os.environ | {"PATH": str(path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_an_old_python_is_refused_before_anything_is_made(source, tmp_path):
    result = source(python3=OLD)
    assert result.returncode == 2 and not (tmp_path / ".venv").exists()
    assert result.stderr.startswith("error: Python 3.11 or newer is needed, and python3 is Python 3.8.10: install one")
    assert result.stderr.count("\n") == 1


def test_no_python_at_all(source, tmp_path):
    result = source()
    assert result.returncode == 2 and "error: Python 3.11 or newer is needed" in result.stderr


def test_a_newer_python_beside_the_old_one_is_taken(source, tmp_path):
    result = source(python3=OLD, python3_12=NEW)
    assert result.returncode == 0, result.stderr
    venv, python = result.stdout.splitlines()
    assert Path(venv.split()[0]).name == "python3.12" and venv.endswith("-m venv .venv")
    assert python == f"{tmp_path}/.venv/bin/python"


def test_half_a_venv_does_not_stay(source, tmp_path):
    result = source(python3=WITHOUT_VENV)
    assert result.returncode == 2 and "ensurepip is not available" in result.stderr
    assert not (tmp_path / ".venv").exists()
