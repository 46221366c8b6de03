"""The lock files agree with pyproject.toml and name no registry."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-build.lock", "requirements-dev.lock")


def pins(lock: str) -> dict[str, list[Version]]:
    """Map every name of a lock file to its versions, several where they differ by Python version."""
    found: dict[str, list[Version]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(name), []).append(Version(version))
    return found


def requirements(lock: str) -> list[Requirement]:
    """Read from pyproject.toml what a lock file has to satisfy."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = project["project"]["dependencies"]
    lines = {
        "requirements.lock": runtime,
        "requirements-build.lock": project["build-system"]["requires"],
        "requirements-dev.lock": runtime + project["project"]["optional-dependencies"]["dev"],
    }
    return [Requirement(line) for line in lines[lock]]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_every_requirement(lock: str) -> None:
    """An installation from a lock file is one that pyproject.toml allows."""
    pinned = pins(lock)
    for requirement in requirements(lock):
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{lock} lacks {requirement.name}; run `make lock`"
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_locks_agree_when_they_pin_the_same_package() -> None:
    """The tests run against the versions that are shipped, built with the tools that are shipped."""
    development = pins("requirements-dev.lock")
    for lock in LOCKS:
        for name, versions in pins(lock).items():
            assert versions == development[name], f"{name} in {lock}"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_registry(lock: str) -> None:
    """Where packages come from is the business of the machine that installs them."""
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|file:", text)


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_hashes_every_pin(lock: str) -> None:
    """`pip install --require-hashes` accepts the file as it is."""
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / lock).read_text(), flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


def test_javascript_lock_names_no_registry_and_hashes_every_package() -> None:
    """The driver in JavaScript is installed from wherever the machine's npm is set up to look."""
    lock = json.loads((ROOT / "tests" / "system" / "javascript" / "package-lock.json").read_text())
    packages = [package for name, package in lock["packages"].items() if name]
    assert packages
    assert not any("resolved" in package for package in packages)
    assert all(package["integrity"].startswith("sha512-") for package in packages)
