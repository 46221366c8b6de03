"""The manifests: valid for the API, strictly, and true of the image and of one another."""

from __future__ import annotations

import importlib
from copy import deepcopy
from importlib.metadata import version as version_of

import click
import kubernetes_validate
import pytest
from manifests import MANIFESTS, WORKLOADS, Manifest, container_of, identify, kind, labels_of, pod_of, workload_named

from hmm_server.config import SETTINGS, Config, load

VERSIONS = ("1.27", "1.37")
"""The first in which gRPC probes are stable, and the newest whose schema is here."""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=identify)
def test_manifest_is_valid_strictly(manifest: Manifest, version: str) -> None:
    """Every field exists, and has the type that it must have."""
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_misspelt_field_is_refused(version: str) -> None:
    """A server would drop it, and the pod would run without it."""
    wrong = deepcopy(workload_named("hmmd"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("workload", WORKLOADS, ids=identify)
def test_pod_is_confined(workload: Manifest) -> None:
    """As the standard "restricted" demands, and beyond: read-only, without an API token, limited in everything."""
    pod, container = pod_of(workload), container_of(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for amounts in ("requests", "limits"):
        assert container["resources"][amounts].keys() == {"cpu", "memory", "ephemeral-storage"}


@pytest.mark.parametrize("workload", WORKLOADS, ids=identify)
def test_pod_runs_the_image_of_this_version(workload: Manifest) -> None:
    """A tag that stayed behind would run an older daemon beside newer drivers."""
    assert container_of(workload)["image"] == f"hmmd:{version_of('hmmd')}"


@pytest.mark.parametrize("workload", WORKLOADS, ids=identify)
def test_names_within_a_pod_are_there(workload: Manifest) -> None:
    """Probes ask ports that are open, mounts are of volumes, selectors find the pods."""
    container = container_of(workload)
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = [container[name] for name in container if name.endswith("Probe")]
    asked = [next(how["port"] for name, how in probe.items() if name in {"grpc", "tcpSocket"}) for probe in probes]
    assert {ports.get(port, port) for port in asked} <= set(ports.values())
    volumes = {volume["name"] for volume in pod_of(workload)["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    selector = workload["spec"].get("selector", {"matchLabels": {}})["matchLabels"]
    assert selector.items() <= labels_of(workload).items()


@pytest.mark.parametrize("service", kind("Service"), ids=identify)
def test_service_leads_to_a_port_of_its_pods(service: Manifest) -> None:
    """Who asks for HOST:PORT, as the drivers and the harness do, reaches what listens there."""
    selected = [one for one in WORKLOADS if service["spec"]["selector"].items() <= labels_of(one).items()]
    (workload,) = selected
    ports = {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}
    for port in service["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]


def test_daemon_is_probed_where_it_answers() -> None:
    """By gRPC, on the port of --health-tcp: kubelets speak no TLS; all else takes certificates of both sides."""
    workload = workload_named("hmmd")
    container = container_of(workload)
    environment = {setting["name"]: setting["value"] for setting in container["env"]}
    assert set(environment) <= {f"HMMD_{setting.name.upper()}" for setting in SETTINGS}
    config = load({}, environment)
    assert config.tls_client_ca
    assert not config.tcp_plaintext
    port = int(config.health_tcp.rpartition(":")[2])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": port}
    assert pod_of(workload)["terminationGracePeriodSeconds"] > Config().drain_s
    assert (workload["kind"], workload["spec"]["replicas"]) == ("StatefulSet", 1)


@pytest.mark.parametrize("name", ["dummy", "rdma"])
def test_driver_is_started_with_options_that_it_has(name: str) -> None:
    """A misspelt one would end it with 2."""
    container = container_of(workload_named(name))
    interpreter, flag, module = container["command"]
    assert (interpreter, flag) == ("python", "-m")
    command: click.Command = importlib.import_module(module).main
    command.make_context(name, list(container["args"]))


def test_policies_speak_of_pods_and_ports_that_exist() -> None:
    """A label that no pod has would open nothing, or everything."""
    components = {labels_of(workload)["app.kubernetes.io/component"] for workload in WORKLOADS}
    ports = {port["containerPort"] for workload in WORKLOADS for port in container_of(workload).get("ports", [])}
    for policy in kind("NetworkPolicy"):
        selected = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component")
        assert selected is None or selected in components
        if policy["metadata"]["name"] == "deny-all":
            continue
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            assert {port["port"] for port in rule["ports"]} <= ports
            for peer in rule.get("from", []) + rule.get("to", []):
                asked = peer["podSelector"]
                named = {asked["matchLabels"]["app.kubernetes.io/component"]} if "matchLabels" in asked else set()
                for expression in asked.get("matchExpressions", []):
                    named |= set(expression["values"])
                assert named <= components
