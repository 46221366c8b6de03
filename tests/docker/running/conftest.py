"""Containers that are removed with their tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from containers import IMAGE, ROOT, Container, Stack, docker


@contextmanager
def removed() -> Iterator[Callable[..., Container]]:
    """Starts containers: call it with the options, and with the command after the image."""
    containers = []

    def run(*options: str, command: tuple[str, ...] = ()) -> Container:
        container = Container(docker("run", "--detach", *options, IMAGE, *command).stdout.strip())
        containers.append(container)
        return container

    yield run
    for container in containers:
        docker("rm", "--force", "--volumes", container.id)


@pytest.fixture
def run_container() -> Iterator[Callable[..., Container]]:
    """Starts containers that go with their test: what runs is probed."""
    with removed() as run:
        yield run


@pytest.fixture(scope="module")
def run_lasting_container() -> Iterator[Callable[..., Container]]:
    """Starts containers that last as long as the tests of a file."""
    with removed() as run:
        yield run


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and certificates for the four hosts."""
    folder = tmp_path_factory.mktemp("certs")
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    subprocess.run([ROOT / "docker" / "certificates", folder, "hmmd", "dummy", "rdma", "harness"], check=True)
    return folder


@pytest.fixture(scope="module", params=["docker/compose.yaml", "docker/compose.tcp.yaml"])
def stack(request: pytest.FixtureRequest, certificates: Path) -> Iterator[Stack]:
    """The daemon, both drivers, and a harness that makes one process after another until it is told to end."""
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else "10001:10001"
    environment = {
        "HMMD_IMAGE": IMAGE,
        "HMMD_PROBE_INTERVAL": "2s",
        "HMMD_PROBE_TIMEOUT": "60s",
        "HMMD_ROUNDS": "0",
        "HMMD_PAUSE": "0.5",
        "HMMD_CERTS": str(certificates),
        "HMMD_USER": user,
    }
    stack = Stack(request.param, environment)
    try:
        stack.compose("up", "--detach", "--no-build")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout=60")
