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
WITH_CUDA = """#!/bin/sh
case "$1" in
  -) echo "--system-site-packages" ;;
  -m) mkdir -p .venv/bin; printf '#!/bin/sh\necho pip "$@"\ncat .venv/commands.txt\n' > .venv/bin/python
    chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def source(tmp_path):
    """Function that sources the file in an empty folder, where only the Pythons of `programs` are on the path."""

    def run(**programs: str) -> subprocess.CompletedProcess:
        path = tmp_path / "bin"
        path.mkdir()
        for name in ("mkdir", "touch", "rm", "sh", "cat", "grep", "chmod"):
            (path / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            program = path / name.replace("_", ".")
            program.write_text(text)
            program.chmod(0o755)
        shutil.copy(ROOT / "requirements.txt", tmp_path)
        command = [shutil.which("bash"), "-c", f"set -euo pipefail; source '{ROOT}/examples/setup.sh'; echo $PYTHON"]
        env = os.environ | {"PATH": str(path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_an_old_python_is_refused_before_anything_is_made(source, tmp_path):
    result = source(python3=OLD)
    assert result.returncode == 2 and not (tmp_path / ".venv").exists()
    assert result.stderr.startswith("error: Python 3.11, 3.12 or 3.13 is needed, and python3 is Python 3.8.10: ")
    assert result.stderr.count("\n") == 1


def test_no_python_at_all(source, tmp_path):
    result = source()
    assert result.returncode == 2 and "error: Python 3.11, 3.12 or 3.13 is needed" in result.stderr


def test_a_newer_python_beside_the_old_one_is_taken(source, tmp_path):
    result = source(python3=OLD, python3_12=NEW)
    assert result.returncode == 0, result.stderr
    venv, python = result.stdout.splitlines()
    assert Path(venv.split()[0]).name == "python3.12" and venv.endswith("-m venv --clear .venv")
    assert python == f"{tmp_path}/.venv/bin/python"


def test_half_a_venv_does_not_stay(source, tmp_path):
    result = source(python3=WITHOUT_VENV)
    assert result.returncode == 2 and "ensurepip is not available" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_commands_of_a_machine_with_torch_are_installed_again(source):
    """Else `accelerate` would be the machine's, which does not see what is installed here."""
    result = source(python3=WITH_CUDA)
    assert result.returncode == 0, result.stderr
    pip, *packages, _ = result.stdout.splitlines()
    assert pip.endswith("--ignore-installed --no-deps -r .venv/commands.txt")
    assert [package.split(">")[0] for package in packages] == ["accelerate", "huggingface-hub"]


def test_a_venv_that_leads_nowhere_is_made_anew(tmp_path):
    """As one is that was made on another machine, or outside of a container."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/nowhere/python3")
    script = f"set -euo pipefail; source '{ROOT}/examples/setup.sh'; $PYTHON -c 'print(1)'"
    result = subprocess.run([shutil.which("bash"), "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr
