"""The build hook keeps the generated stubs in line with their sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parents[2] / "proto" / "hatch_build.py"
SOURCE = """syntax = "proto3";
package hmm.v1;
message Probe { uint64 address = 1; }
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def proto_root(tmp_path: Path) -> Path:
    """A proto directory of its own, with one source and the real hook."""
    package = tmp_path / "hmm_proto" / "v1"
    package.mkdir(parents=True)
    (package / "probe.proto").write_text(SOURCE)
    shutil.copy(HOOK, tmp_path)
    return tmp_path


def generate(proto_root: Path) -> dict[str, int]:
    """Run the hook on its own and return the stubs with their modification times."""
    hook = proto_root / "hatch_build.py"
    subprocess.run([sys.executable, hook], check=True, env={}, cwd="/")
    return {path.name: path.stat().st_mtime_ns for path in proto_root.rglob("*_pb2*")}


def test_hook_writes_modules_and_types_beside_the_source(proto_root: Path) -> None:
    """One source gives messages, services and the types of both, without any environment set up."""
    stubs = generate(proto_root)
    expected = {"probe_pb2.py", "probe_pb2.pyi", "probe_pb2_grpc.py"}
    assert expected <= set(stubs)
    assert {path.name for path in proto_root.iterdir()} == {"hatch_build.py", "hmm_proto"}


def test_hook_leaves_stubs_alone_when_nothing_changed(proto_root: Path) -> None:
    """A rebuild does not disturb whoever watches or imports the stubs."""
    assert generate(proto_root) == generate(proto_root)


def test_hook_removes_stubs_when_their_source_is_gone(proto_root: Path) -> None:
    """A renamed source leaves no module behind that would still import."""
    generate(proto_root)
    (proto_root / "hmm_proto" / "v1" / "probe.proto").unlink()
    assert generate(proto_root) == {}


def test_hook_leaves_what_another_build_is_making_alone(proto_root: Path) -> None:
    """Two builds at a time are two whole wheels."""
    theirs = proto_root / ".stubs-another" / "hmm_proto" / "v1" / "probe_pb2.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("# just written\n")
    generate(proto_root)
    assert theirs.exists()


def test_hook_fails_and_keeps_the_old_stubs_when_a_source_is_wrong(proto_root: Path) -> None:
    """A build never ships stubs that do not belong to its sources."""
    before = generate(proto_root)
    (proto_root / "hmm_proto" / "v1" / "wrong.proto").write_text("message")
    with pytest.raises(subprocess.CalledProcessError):
        generate(proto_root)
    assert {path.name: path.stat().st_mtime_ns for path in proto_root.rglob("*_pb2*")} == before
