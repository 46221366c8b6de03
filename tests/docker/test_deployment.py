"""The image and the compose file name what the project really has, and give nothing away."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hmm_client.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined(name: str) -> None:
    """A container can write to its socket's volume and a small /tmp, and has no right beyond that."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["network_mode"] == "none"
    assert service["volumes"] == ["socket:/run/hmmd"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_limits(name: str) -> None:
    """No container takes the host's memory, processors or process table."""
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period"} <= SERVICES[name].keys()


def test_drivers_wait_until_the_daemon_is_healthy() -> None:
    """One daemon and two drivers; a driver starts when its socket answers."""
    drivers = {name for name in SERVICES if name != "hmmd"}
    assert len(drivers) == 2
    for name in drivers:
        assert SERVICES[name]["depends_on"] == {"hmmd": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "hmmd"])
def test_driver_runs_a_module_that_is_installed(name: str) -> None:
    """The entry points of the drivers are modules of the client library."""
    interpreter, flag, module = SERVICES[name]["entrypoint"]
    assert (interpreter, flag) == ("python", "-m")
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("instruction", ["ENTRYPOINT", "HEALTHCHECK"])
def test_image_runs_a_command_of_the_project(instruction: str) -> None:
    """What the image starts is installed by the wheel."""
    match = re.search(rf"^{instruction}.*?(\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    assert json.loads(match[1])[0] in SCRIPTS


def test_image_asks_for_its_health_with_a_command_that_exists() -> None:
    """A misspelt probe would leave every container unhealthy."""
    match = re.search(r"^HEALTHCHECK.* CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    command, subcommand = json.loads(match[1])
    assert command == "hmmctl"
    assert subcommand in main.list_commands(click.Context(main))


def test_image_runs_under_the_id_that_owns_the_socket_directory() -> None:
    """Drivers of another image reach the socket when they run under the same fixed id."""
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert "install -d -o 10001 -g 10001 -m 0700 /run/hmmd" in DOCKERFILE


def test_build_context_holds_what_the_image_copies() -> None:
    """Everything that is copied exists and passes the ignore file, and nothing else passes it."""
    ignore = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {
        source
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for source in sources.split()
    }
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
