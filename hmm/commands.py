"""All commands there are, by name.

**Source**: our own.

**Absent**: what they do (the modules named here).
"""

from __future__ import annotations

from inspect import isgeneratorfunction

from hmm import (
    commands_device,
    commands_failures,
    commands_file,
    commands_hmm,
    commands_migrate,
    commands_process,
    commands_userfaultfd,
)

__all__ = ["COMMANDS"]

_MODULES = (
    commands_process,
    commands_file,
    commands_device,
    commands_hmm,
    commands_migrate,
    commands_userfaultfd,
    commands_failures,
)
COMMANDS = tuple(
    sorted(
        name
        for module in _MODULES
        for name, function in vars(module).items()
        if isgeneratorfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    )
)
"""The names of all commands there are."""
