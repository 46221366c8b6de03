"""Addresses on the command line: hexadecimal as in maps, with or without 0x.

**Absent**: decimal addresses.
"""

from __future__ import annotations

import click

from hmm.units import TASK_SIZE, AddressRange, page_down, page_up


def parse_address(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Callback of an argument: one address."""
    try:
        address = int(value, 16)
    except ValueError:
        raise click.BadParameter(f"{value} is no address; write it in hexadecimal", context, parameter) from None
    if not 0 <= address < TASK_SIZE:
        raise click.BadParameter(f"{value} is outside of the address space, 0-{TASK_SIZE:x}", context, parameter)
    return address


def parse_range(context: click.Context, parameter: click.Parameter, value: str | None) -> AddressRange | None:
    """Callback of an argument: START-END, made larger to whole pages."""
    if value is None:
        return None
    first, _, last = value.partition("-")
    try:
        start, end = int(first, 16), int(last, 16)
    except ValueError:
        message = f"{value} is no range; write START-END in hexadecimal, as in maps"
        raise click.BadParameter(message, context, parameter) from None
    if not 0 <= start < end <= TASK_SIZE:
        raise click.BadParameter(f"{value} is no range of the address space, 0-{TASK_SIZE:x}", context, parameter)
    return AddressRange(page_down(start), page_up(end))
