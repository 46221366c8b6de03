"""The image and the compose file name what the project really has, and give nothing away."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hmm_client.cli import main
from hmm_server.config import SETTINGS, load

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
FILES = ("compose.yaml", "compose.tcp.yaml")
STACKS: dict[str, dict[str, dict[str, Any]]] = {
    file: yaml.safe_load((ROOT / "docker" / file).read_text())["services"] for file in FILES
}
SERVICES = [(file, name) for file, services in STACKS.items() for name in services]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_service_is_confined(file: str, name: str) -> None:
    """A container can write to its sockets and a small /tmp, and has no right beyond that."""
    service = STACKS[file][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(volume.endswith(":ro") for volume in service["volumes"] if volume != "sockets:/run/hmmd")
    if file == "compose.yaml":
        assert service["network_mode"] == "none"
    else:
        assert "sockets:/run/hmmd" not in service["volumes"]


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_service_has_limits(file: str, name: str) -> None:
    """No container takes the host's memory, processors or process table."""
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period"} <= STACKS[file][name].keys()


@pytest.mark.parametrize("file", FILES)
def test_services_wait_for_whom_they_need(file: str) -> None:
    """One daemon, two drivers, a harness; each starts when those before it are healthy."""
    services = STACKS[file]
    assert services.keys() == {"hmmd", "dummy", "rdma", "harness"}
    healthy = {"condition": "service_healthy"}
    assert services["dummy"]["depends_on"] == services["rdma"]["depends_on"] == {"hmmd": healthy}
    assert services["harness"]["depends_on"] == dict.fromkeys(("hmmd", "dummy", "rdma"), healthy)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["dummy", "rdma"])
def test_driver_is_started_with_options_that_it_has(file: str, name: str) -> None:
    """The entry points of the drivers are modules of the client library, and understand what they are told."""
    interpreter, flag, module, *options = STACKS[file][name]["entrypoint"]
    assert (interpreter, flag) == ("python", "-m")
    command: click.Command = importlib.import_module(module).main
    command.make_context(name, list(options))


@pytest.mark.parametrize("file", FILES)
def test_daemon_is_given_settings_that_it_has(file: str) -> None:
    """A misspelt variable would be ignored."""
    environment = STACKS[file]["hmmd"]["environment"]
    assert set(environment) <= {f"HMMD_{setting.name.upper()}" for setting in SETTINGS}
    load({}, environment)


@pytest.mark.parametrize("instruction", ["^CMD", "^HEALTHCHECK"])
def test_image_runs_a_command_of_the_project(instruction: str) -> None:
    """What the image starts is installed by the wheel."""
    match = re.search(rf"{instruction}.*?(\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    assert json.loads(match[1])[0] in SCRIPTS


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ((), "hmmd"),
        (("--frames=64", "--tcp", "*:1"), "hmmd <--frames=64> <--tcp> <*:1>"),
        (("hmmd", "--help"), "hmmd <--help>"),
        (("printf", "<%s>", "a b", ""), "<a b><>"),
    ],
)
def test_image_runs_hmmd_or_the_command_that_it_is_given(
    tmp_path: Path, arguments: tuple[str, ...], printed: str
) -> None:
    """Options are the daemon's; what begins with a name is a command, with its own."""
    (tmp_path / "hmmd").write_text('#!/bin/sh\nprintf hmmd; [ $# = 0 ] || printf " <%s>" "$@"\n')
    (tmp_path / "hmmd").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "docker" / "entrypoint", *arguments], env=path, capture_output=True, check=True)
    assert done.stdout.decode() == printed


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
