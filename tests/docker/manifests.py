"""The manifests of docker/kubernetes, read once, and what tests ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"
Manifest = dict[str, Any]
MANIFESTS: list[Manifest] = [
    manifest for path in sorted(FOLDER.glob("*.yaml")) for manifest in yaml.safe_load_all(path.read_text())
]
WORKLOADS = [manifest for manifest in MANIFESTS if "template" in manifest.get("spec", {})]


def identify(manifest: Manifest) -> str:
    """Its kind and name, for the names of tests."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def kind(name: str) -> list[Manifest]:
    """All manifests of a kind."""
    return [manifest for manifest in MANIFESTS if manifest["kind"] == name]


def labels_of(workload: Manifest) -> dict[str, str]:
    """What its pods are labelled with."""
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def pod_of(workload: Manifest) -> Manifest:
    """The specification of its pods."""
    return dict(workload["spec"]["template"]["spec"])


def container_of(workload: Manifest) -> Manifest:
    """Its one container."""
    (container,) = pod_of(workload)["containers"]
    return dict(container)


def workload_named(name: str) -> Manifest:
    """The workload of this name."""
    (found,) = [workload for workload in WORKLOADS if workload["metadata"]["name"] == name]
    return found
