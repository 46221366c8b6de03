"""The pods of the manifests, run as containers: the same commands, settings, files, names, rights and limits.

What takes a cluster is not here: scheduling, policies, the kubelet. Its probe is: health, asked in plain text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from containers import CONFINED, IMAGE, ROOT, Container, docker, until
from manifests import Manifest, container_of, pod_of, workload_named

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
NETWORK = "hmmd-pods"
PROBE = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    """A network that leads nowhere else, in which pods have the names of their services."""
    docker("network", "create", "--internal", NETWORK)
    yield NETWORK
    docker("network", "rm", NETWORK)


@pytest.fixture
def run_pod(
    network: str, run_container: Callable[..., Container], certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Container]:
    """Runs the pod of the workload of this name."""

    def mounts(name: str, pod: Manifest) -> Iterator[str]:
        places = {mount["name"]: mount["mountPath"] for mount in container_of(workload_named(name))["volumeMounts"]}
        for volume in pod["volumes"]:
            if "emptyDir" in volume:
                continue  # the image's own volume is there
            folder = tmp_path_factory.mktemp(volume["name"])
            folder.chmod(0o755)
            if "secret" in volume:  # as docker/README.md makes it
                for key, file in (("ca.crt", "authority.pem"), ("tls.crt", f"{name}.pem"), ("tls.key", f"{name}.key")):
                    shutil.copy2(certificates / file, folder / key)
                shutil.chown(folder / "tls.key", pod["securityContext"]["runAsUser"])
            else:
                shutil.copy2(ROOT / "docker" / "harness.py", folder)
            yield f"--volume={folder}:{places[volume['name']]}:ro"

    def run(name: str) -> Container:
        workload = workload_named(name)
        pod, container = pod_of(workload), container_of(workload)
        rights, limits = pod["securityContext"], container["resources"]["limits"]
        command = (*container.get("command", ()), *container.get("args", ()))
        confined = [option for option in CONFINED if not option.startswith("--network")]
        return run_container(
            *confined,
            f"--network={network}",
            f"--network-alias={name}",
            f"--user={rights['runAsUser']}:{rights['runAsGroup']}",
            f"--cpus={0.5 if limits['cpu'] == '500m' else limits['cpu']}",
            f"--memory={limits['memory'].removesuffix('i').lower()}",
            "--no-healthcheck",
            *(f"--env={setting['name']}={setting['value']}" for setting in container.get("env", ())),
            *mounts(name, pod),
            *((f"--entrypoint={command[0]}",) if command else ()),
            command=command[1:],
        )

    return run


def test_pods_work_together_and_end_in_good_order(run_pod: Callable[[str], Container], network: str) -> None:
    """The daemon answers its probe, the drivers come up, the harness completes, and SIGTERM ends all with 0."""
    daemon = run_pod("hmmd")
    port = container_of(workload_named("hmmd"))["readinessProbe"]["grpc"]["port"]
    options = (*CONFINED[:-1], f"--network={network}", "--rm", "--no-healthcheck")
    assert docker("run", *options, IMAGE, "python", "-c", PROBE, f"hmmd:{port}").stdout == "SERVING\n"
    drivers = [run_pod(name) for name in ("dummy", "rdma")]
    harness = run_pod("harness")
    until(lambda: not harness.state()["Running"], f"the harness ends: {harness.logs()}")
    assert harness.state()["ExitCode"] == 0, harness.logs()
    assert "10 rounds, 0 failed" in harness.logs()
    assert [container.stop() for container in (*drivers, daemon)] == [0, 0, 0]
