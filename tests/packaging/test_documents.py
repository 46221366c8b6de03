"""The map of ARCHITECTURE.md is of what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("hmm", "proto/hmm_proto", "server/hmm_server", "client/hmm_client")


def names_in_the_map() -> set[str]:
    """The modules that the map names."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return set(re.findall(r"[a-z_]+\.py", text.split("## Code map")[1].split("\n## ")[0]))


def test_map_names_every_module_of_the_core() -> None:
    """Who looks for a subject of the model finds its module in the map."""
    modules = {path.name for path in (ROOT / "hmm").glob("*.py")} - {"__init__.py"}
    assert not modules - names_in_the_map()


def test_map_names_only_what_is_there() -> None:
    """A module that was renamed or removed is not in the map any more."""
    modules = {path.name for part in CODE for path in (ROOT / part).rglob("*.py")}
    assert not names_in_the_map() - modules


def test_differences_name_every_module_that_differs() -> None:
    """What a docstring of the core says that the kernel does otherwise stands in the list of differences."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Where it differs from the kernel")[1].split("\n## ")[0]
    differing = {path.name for path in (ROOT / "hmm").glob("*.py") if "Differs: " in path.read_text()}
    assert differing
    assert not differing - set(re.findall(r"[a-z0-9_]+\.py", text))
