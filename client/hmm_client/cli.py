"""The command `hmmctl`: looks into a running hmmd, replays recordings, verifies the model.

Each command is a module of `hmm_client.commands`, loaded when it is used: `hmmctl --help` needs click alone.

**Absent**: what the commands do; exit codes are listed in `hmm_client.commands`.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from hmm_client.commands.connection import INTERRUPTED, UNEXPECTED, UNUSABLE, fail

STDERR = 2
COMMANDS = {
    "ps": "List processes, with the mirrors of their memory.",
    "maps": "Show the mappings of a process, as /proc/PID/maps does.",
    "pagetable": "Show the directories of a page table as a tree.",
    "walk": "Show what every page table holds for one address.",
    "smaps": "Show what each mapping of a process costs, and what is in swap.",
    "pagemap": "Show what each page of a range is backed by.",
    "watch": "Show events and answers as they happen.",
    "pending": "Show who is waiting for whom, and why.",
    "top": "Show what happens now: mirrors, calls and who waits.",
    "stats": "Show counters of the daemon and of each mirror.",
    "sanitize": "Show what devices did that they must not.",
    "kill": "End processes that nobody ends.",
    "health": "Ask the daemon whether it serves; for scripts and containers.",
    "replay": "Replay recorded programs while devices mirror them.",
    "record": "Record a program's memory calls, for replay.",
    "run": "Run scenarios: processes, drivers, and what must come of them.",
    "verify": "Compare the model with what Linux did, operation by operation.",
    "certify": "Put a driver, in any language, to the test.",
    "completion": "Print what a shell needs to complete hmmctl's commands.",
}
HELP = """Look into a running hmmd, replay programs on it, and verify it.

A daemon is looked for at $HMMD_SOCKET, $XDG_RUNTIME_DIR/hmmd/hmmd.sock or /run/hmmd/hmmd.sock; --target says
otherwise.  `replay`, `run` and `verify` start one of their own unless --target is given, `certify` always does;
`record` needs none.

With --format json every line is one value; what a daemon tells has the fields of its message in hmm.v1
(proto/hmm_proto/v1), numbers as numbers and enumerations as words.

Exit codes: 0 as it should be; 1 not (differences, violations, unhealthy, expectations not met); 2 unusable input or
command line; 3 no daemon can be reached; 4 the daemon refused.
"""


def _open_standard_streams() -> None:
    # Where one is closed (`>&-`) the first socket would have its number, and libuv ends a process that closes that.
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(number)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


class Commands(click.Group):
    """Commands by name, each in a module of that name."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Read the command line; Ctrl-C ends that quietly, too."""
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; Ctrl-C and files that cannot be used end it with a line on stderr at most."""
        _open_standard_streams()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # who reads has enough: click ends quietly
            if error.filename is not None:
                fail(UNUSABLE, f"{error.filename}: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left would fail again at exit
            fail(UNEXPECTED, f"standard output: {error.strerror}")

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the interface
        """In the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"hmm_client.commands.{cmd_name}").command
        command.short_help = COMMANDS[cmd_name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in --help, without loading any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands, without loading any; options."""
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=Commands,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    no_args_is_help=True,
)
@click.version_option(package_name="hmmd", prog_name="hmmctl")
def main() -> None:
    """Find the command."""


if __name__ == "__main__":
    main(prog_name="hmmctl")
