"""The scenarios that come with hmmd: rules of the protocol and races, each a file of `library/`, run by its name.

**Absent**: running them (`run.py`).
"""

from __future__ import annotations

from pathlib import Path

from hmm_client.scenario.format import read_scenario
from hmm_client.scenario.model import Scenario, ScenarioError

FOLDER = Path(__file__).with_name("library")


def names() -> list[str]:
    """The names of all scenarios, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name_or_file: str) -> Scenario:
    """A scenario by its name, or from a file.

    Raises:
        ScenarioError: there is no such name and no such file, or it is not understood.
    """
    path = FOLDER / f"{name_or_file}.toml"
    if path.is_file():
        return read_scenario(path)
    if not Path(name_or_file).exists() and not name_or_file.endswith(".toml"):
        raise ScenarioError(
            f"there is no file and no scenario {name_or_file!r}; `hmmctl run --list` names those there are"
        )
    return read_scenario(name_or_file)
