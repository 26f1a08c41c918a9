"""What the scripts make of a machine, without installing anything: pip is played by `echo`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "basename", "cksum", "dirname", "find", "sort", "xargs")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory for PATH with neither a compiler nor a GPU's tools."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (path / tool).symlink_to(found)
    return path


def program(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!{path}/bash\n{script}\n")
    (path / name).chmod(0o755)


def run(path: Path, command: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    script = f'set -euo pipefail; source "{root}/scripts/environment"; pip_install() {{ echo "pip $*"; }}; {command}'
    env = {**os.environ, "PATH": str(path)}
    return subprocess.run(
        [path / "bash", "-c", script], check=False, env=env, capture_output=True, text=True, timeout=30
    )


def test_without_a_compiler_it_warns_and_installs_all_the_same(bare: Path) -> None:
    done = run(bare, "install base")
    assert done.returncode == 0, done.stderr
    assert "compiler" in done.stderr
    assert f"pip --editable {ROOT}" in done.stdout.splitlines()


def test_with_a_compiler_it_says_nothing_of_it(bare: Path) -> None:
    program(bare, "c++", "")
    done = run(bare, "install base")
    assert (done.returncode, "compiler" in done.stderr) == (0, False)


@pytest.mark.parametrize("name", ["c++", "nvidia-smi"])
def test_what_a_machine_gains_is_installed_for(bare: Path, name: str) -> None:
    before = run(bare, "fingerprint").stdout
    assert before == run(bare, "fingerprint").stdout
    program(bare, name, 'printf "GPU 0: some\\n%.0s" {1..100000}')
    assert run(bare, "fingerprint").stdout != before


def test_a_checkout_that_has_moved_is_installed_anew(bare: Path, tmp_path: Path) -> None:
    moved = tmp_path / "some where else"
    for part in ("scripts", "kernels/csrc"):
        shutil.copytree(ROOT / part, moved / part, ignore=shutil.ignore_patterns("CMakeFiles"))
    shutil.copy(ROOT / "pyproject.toml", moved)
    done = run(bare, "fingerprint", moved)
    assert done.returncode == 0, done.stderr
    assert done.stdout != run(bare, "fingerprint").stdout
