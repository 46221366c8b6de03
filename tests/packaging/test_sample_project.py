"""A project of its own, outside this repository: what tests/README.md shows, with the wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from document import run_document

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "HMMD_WHEEL"
"""Names a wheel that was built already."""

TIMEOUT_S = 500.0
"""Far more than anything takes; a busy machine is no failure."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1.2 * TIMEOUT_S)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    if WHEEL in os.environ:
        return Path(os.environ[WHEEL])
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel, and everybody else's packages as they are locked here."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    install = [sys.executable, "-m", "pip", f"--python={folder / 'bin/python'}", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True)
    # A path in a .pth file adds packages, but not what they would hook in: this repository's installation stays out.
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "locked.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / "bin/pytest").write_text(f'#!/bin/sh\nexec {folder / "bin/python"} -m pytest "$@"\n')
    (folder / "bin/pytest").chmod(0o755)
    return folder / "bin"


def test_wheel_alone_is_what_runs(programs: Path, tmp_path: Path) -> None:
    """Nothing of this repository is seen: every module comes from the wheel."""
    names = ("hmm", "hmm_proto", "hmm_server", "hmm_client", "hmm_client.pytest_plugin")
    code = f"import {', '.join(names)}; print(*(module.__file__ for module in ({', '.join(names)})), sep='\\n')"
    ran = subprocess.run([programs / "python", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert all(line.startswith(str(programs.parent)) for line in ran.stdout.splitlines())


def test_readme_of_the_harness_runs_as_a_project_of_its_own(programs: Path, tmp_path: Path) -> None:
    """Fixtures, misbehaviour, holds and scenarios, as somebody who has only installed hmmd uses them."""
    assert run_document(ROOT / "tests/README.md", tmp_path, TIMEOUT_S, programs) >= 10


def test_first_driver_of_the_readme_is_certified_with_the_wheel_alone(programs: Path, tmp_path: Path) -> None:
    """As a new user goes through client/README.md: each command, and what it prints."""
    assert run_document(ROOT / "client/README.md", tmp_path, TIMEOUT_S, programs) >= 10
