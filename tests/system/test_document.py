"""The runner of documents: what is shown is run, and what is wrong is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from document import blocks_of, commands_of, matches, run_document

GOOD = """\
# Title

```text
a picture
```

```python greet.py
import sys

print("hello", *sys.argv[1:])
sys.exit(len(sys.argv) - 1)
```

```console
$ python greet.py
hello
$ python greet.py you \\
> there
hello ... there
[exit code 2]
$ name=kept
$ seq 5; echo "$name"
1
...
5
kept
```

```python
print("one", 1 + 1)
```

```text
one 2
```
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A document of its own."""
    path = tmp_path / "GOOD.md"
    path.write_text(GOOD)
    return path


@pytest.mark.slow
def test_run_document_runs_everything_when_it_is_good(document: Path, tmp_path: Path) -> None:
    """Files, commands with state, exit codes, scripts."""
    folder = tmp_path / "folder"
    folder.mkdir()
    assert run_document(document, folder) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("$ python greet.py\nhello\n", "$ python greet.py\nhallo\n", 15),
        ("[exit code 2]", "[exit code 1]", 17),
        ("5\nkept", "6\nkept", 22),
        ("5\nkept", "5\nkept\nmore", 22),
        ("one 2", "one 3", 29),
        ("```text\na picture", "```ruby\na picture", 3),
    ],
)
def test_run_document_names_the_line_when_an_output_is_another(
    document: Path, tmp_path: Path, old: str, new: str, line: int
) -> None:
    """A document that went stale fails, with its place."""
    assert old in GOOD
    document.write_text(GOOD.replace(old, new))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(AssertionError, match=rf"^GOOD.md:{line}: "):
        run_document(document, folder)


def test_matches_takes_dots_for_anything() -> None:
    """`...` within a line and as a line."""
    assert matches(("a ... c",), "a b c\n")
    assert not matches(("a ... c",), "a\nc\n")
    assert matches(("...", "z"), "z")
    assert matches(("a", "...", "z"), "a\nb\nc\nz\n")
    assert not matches((), "something")
    assert matches((), "")


def test_commands_of_a_block_know_their_lines(document: Path) -> None:
    """Where a command stands is told when it fails."""
    (console,) = [block for block in blocks_of(document) if block.language == "console"]
    found = [(command.line, command.exit_code) for command in commands_of(console)]
    assert found == [(15, 0), (17, 2), (21, 0), (22, 0)]
