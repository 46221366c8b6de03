"""`hmmctl completion`: what a shell needs to complete commands and options.

**Source**: click.shell_completion.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def command(context: click.Context, shell: str | None) -> None:
    """Print what a shell needs to complete hmmctl's commands.

    \b
    bash:  eval "$(hmmctl completion bash)"            in ~/.bashrc
    zsh:   eval "$(hmmctl completion zsh)"             in ~/.zshrc
    fish:  hmmctl completion fish > ~/.config/fish/completions/hmmctl.fish

    Without SHELL it is the one that $SHELL names.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in SHELLS else None
    if kind is None:
        raise click.UsageError(f"say which shell: {', '.join(SHELLS)}")
    click.echo(kind(context.find_root().command, {}, "hmmctl", "_HMMCTL_COMPLETE").source())
