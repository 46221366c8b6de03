"""What docker/README.md says of Kubernetes agrees with the manifests; its other commands run with the image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docker"
README = (FOLDER / "README.md").read_text()


def manifests() -> list[dict[str, Any]]:
    """All of them."""
    paths = sorted((FOLDER / "kubernetes").glob("*.yaml"))
    return [manifest for path in paths for manifest in yaml.safe_load_all(path.read_text())]


def test_secrets_are_made_as_the_manifests_mount_them() -> None:
    """One for each host, with the keys that the containers read."""
    hosts = re.search(r"for host in ([\w ]+); do", README)
    made = re.search(r"docker/certificates certs ([\w ]+)", README)
    assert hosts is not None
    assert made is not None
    assert hosts[1] == made[1]
    keys = set(re.findall(r"--from-file=([\w.]+)=certs", README))
    mounted, read = set(), set()
    for manifest in manifests():
        pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
        mounted |= {volume["secret"]["secretName"] for volume in pod.get("volumes", []) if "secret" in volume}
        read |= set(re.findall(r"/certs/([\w.]+)", str(pod)))
    assert mounted == {f"{host}-tls" for host in hosts[1].split()}
    assert read == keys


def test_files_that_the_page_names_exist() -> None:
    """Links and paths below docker/."""
    linked = set(re.findall(r"\]\(([^)#]+)\)", README))
    named = {path.removeprefix("docker/") for path in re.findall(r"docker/[\w./-]+[\w/]", README)}
    assert linked
    assert all((FOLDER / path).exists() for path in (linked | named) - {"certs"})
