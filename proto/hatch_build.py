"""Generate the Python stubs of proto/hmm_proto/**/*.proto beside their sources.

Hatchling runs this for every wheel and editable install; `python proto/hatch_build.py` runs it alone.
A path below proto/ equals the import path of what is generated from it, so no import is rewritten.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = Path(__file__).resolve().parent
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
SCRATCH = ".stubs-"


def generate_stubs() -> list[Path]:
    """Bring the stubs in line with the .proto files and return their paths.

    A stub is replaced as a whole and only when its text changes, so a program importing it meanwhile
    sees the old one or the new one. Stubs whose source is gone are removed. Several builds may run at a time.

    Raises:
        subprocess.CalledProcessError: protoc refused a file; it has said why on stderr.
    """
    sources = sorted(path.relative_to(PROTO_ROOT) for path in PROTO_ROOT.rglob("*.proto"))
    with tempfile.TemporaryDirectory(dir=PROTO_ROOT, prefix=SCRATCH) as scratch:
        if sources:
            _run_protoc(sources, Path(scratch))
        stubs = {path.relative_to(scratch): path for path in _stubs_below(Path(scratch))}
        for relative, generated in stubs.items():
            _replace_when_changed(PROTO_ROOT / relative, generated)
    current = [PROTO_ROOT / relative for relative in sorted(stubs)]
    for stale in set(_stubs_below(PROTO_ROOT)) - set(current):
        if not stale.relative_to(PROTO_ROOT).parts[0].startswith(SCRATCH):  # of another build
            stale.unlink(missing_ok=True)
    return current


def _run_protoc(sources: list[Path], output: Path) -> None:
    # Outside an activated environment the mypy plugins are not on PATH but beside the interpreter.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "--proto_path=.",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--mypy_out=quiet:{output}",
            f"--mypy_grpc_out=quiet:{output}",
            *map(str, sources),
        ],
        cwd=PROTO_ROOT,
        env=os.environ | {"PATH": path},
        check=True,
    )


def _stubs_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*_pb2*") if path.name.endswith(STUB_SUFFIXES))


def _replace_when_changed(target: Path, generated: Path) -> None:
    if not target.exists() or target.read_bytes() != generated.read_bytes():
        generated.replace(target)


class ProtoBuildHook(BuildHookInterface[Any]):
    """Adds the generated stubs, which version control ignores, to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Generate the stubs before hatchling collects the files."""
        root = Path(self.root)
        build_data["artifacts"] += [f"/{stub.relative_to(root).as_posix()}" for stub in generate_stubs()]


if __name__ == "__main__":
    generate_stubs()
