"""Starts `hmmctl`: from here on Ctrl-C ends it quietly, while all the rest is loaded.

**Absent**: the command line (cli.py).
"""

from __future__ import annotations

INTERRUPTED = 130


def main() -> None:
    """Run the command."""
    try:
        from hmm_client.cli import main as command  # noqa: PLC0415 - nearly all of the time until a command runs

        command(prog_name="hmmctl")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
