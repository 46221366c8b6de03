"""What docker/README.md shows is what happens: its commands run in order, in the project's folder, as they stand."""

from __future__ import annotations

import shutil
import sys

import pytest
from containers import IMAGE, ROOT, docker
from document import run_document

TIMEOUT_S = 600.0
CERTIFICATES = ROOT / "docker" / "certs"


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_commands_do_what_the_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends as it should and prints what is shown."""
    assert IMAGE == "hmmd", "the page names this image"
    assert not CERTIFICATES.exists(), "somebody's own certificates would be overwritten"
    monkeypatch.setenv("VENV", sys.prefix)  # for make
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    try:
        assert run_document(ROOT / "docker" / "README.md", ROOT, TIMEOUT_S) > 10
    finally:
        docker("rm", "--force", "--volumes", "hmmd", check=False)
        docker("image", "rm", "my-driver", check=False)
        shutil.rmtree(CERTIFICATES, ignore_errors=True)
