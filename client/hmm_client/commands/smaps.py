"""`hmmctl smaps`: what each mapping of a process costs."""

from __future__ import annotations

import dataclasses

import click

from hmm.units import PAGE_SIZE, PMD_SIZE
from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import PROCESS
from hmm_client.commands.output import JSON, format_option, print_json
from hmm_client.recordings import Area, render
from hmm_client.results import MappingUse

_FIELDS = (
    ("Rss", "rss"),
    ("Pss", "pss"),
    ("Pss_Dirty", "pss_dirty"),
    ("Shared_Clean", "shared_clean"),
    ("Shared_Dirty", "shared_dirty"),
    ("Private_Clean", "private_clean"),
    ("Private_Dirty", "private_dirty"),
    ("Referenced", "referenced"),
    ("Anonymous", "anonymous"),
    ("KSM", "ksm"),
    ("LazyFree", "lazy_free"),
    ("AnonHugePages", "anon_huge"),
    ("ShmemPmdMapped", "shmem_pmd"),
    ("Shared_Hugetlb", "shared_hugetlb"),
    ("Private_Hugetlb", "private_hugetlb"),
    ("Swap", "swap"),
    ("SwapPss", "swap_pss"),
    ("Locked", "locked"),
)
"""As the kernel calls them, in its order; what is always 0 here is left out."""


@click.command("smaps")
@click.argument("pid", type=PROCESS)
@click.option("--rollup", is_flag=True, help="One sum over all mappings, as /proc/PID/smaps_rollup.")
@format_option
@where_options
def command(pid: int, rollup: bool, form: str, where: Where) -> None:
    """Show what each mapping of a process costs, in the format of /proc/PID/smaps.

    Pages in the memory of devices count as resident, as in the kernel.  JSON has bytes.
    """
    uses = ask(where, lambda client: client.process(pid).smaps())
    if rollup:
        _print_rollup(uses, form)
        return
    for one in uses:
        if form == JSON:
            print_json({**dataclasses.asdict(one.line), **dataclasses.asdict(one.use), "vm_flags": one.vm_flags})
            continue
        line = one.line
        area = Area(line.start, line.end, line.permissions, line.offset, line.file_name, inode=line.file_id)
        click.echo(render([area]), nl=False)
        page_size = PMD_SIZE if "ht" in one.vm_flags.split() else PAGE_SIZE
        _print(("Size", line.end - line.start), ("KernelPageSize", page_size), ("MMUPageSize", page_size))
        _print(*((name, getattr(one.use, field)) for name, field in _FIELDS))
        click.echo(f"VmFlags: {one.vm_flags}")


def _print_rollup(uses: tuple[MappingUse, ...], form: str) -> None:
    sums = {field: sum(getattr(one.use, field) for one in uses) for _, field in _FIELDS}
    if form == JSON:
        print_json(sums)
    else:
        _print(*((name, sums[field]) for name, field in _FIELDS))


def _print(*sizes: tuple[str, int]) -> None:
    for name, size_bytes in sizes:
        click.echo(f"{name + ':':<16}{size_bytes >> 10:>8} kB")
