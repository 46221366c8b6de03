"""/proc/PID/maps: read, merged, compared and written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm_client.recordings import Area, RecordingError, canonical, compare, demo_folder, parse_maps, read_maps, render

LIBC = "/usr/lib/libc.so.6"


def line(start: int, end: int, rest: str) -> str:
    """A line of maps, from page numbers."""
    return f"{start << 12:x}-{end << 12:x} {rest}\n"


def area(start: int, end: int, perms: str = "rw-p", offset: int = 0, name: str = "") -> Area:
    """An area, from page numbers."""
    return Area(start << 12, end << 12, perms, offset << 12, name)


def test_parse_reads_every_column_when_a_line_is_complete() -> None:
    """Addresses, permissions, offset, device, inode and name."""
    (found,) = parse_maps(line(1, 3, "r-xp 00002000 fe:00 26723                      /opt/a b (deleted)"))
    assert found == Area(0x1000, 0x3000, "r-xp", 0x2000, "/opt/a b (deleted)", "fe:00", 26723)
    assert (found.source, found.length, found.prot, found.is_shared) == ("/opt/a b", 0x2000, 5, False)


@pytest.mark.parametrize(
    ("name", "perms", "source"),
    [
        ("", "rw-p", None),
        ("[heap]", "rw-p", None),
        ("[stack]", "rw-p", None),
        ("[vvar_vclock]", "r--p", None),
        ("[anon:glibc: malloc]", "rw-p", None),
        ("[anon_shmem:ring]", "rw-s", "/dev/zero"),
        ("/dev/zero (deleted)", "rw-s", "/dev/zero"),
        ("/memfd:x (deleted)", "rw-s", "/memfd:x"),
        ("/SYSV00000000 (deleted)", "rw-s", "/SYSV00000000"),
        ("socket:[77]", "rw-s", "socket:[77]"),
        ("anon_inode:[perf_event]", "rw-s", "anon_inode:[perf_event]"),
    ],
)
def test_source_is_the_object_when_memory_has_one(name: str, perms: str, source: str | None) -> None:
    """Names in brackets are anonymous memory; shared anonymous memory is /dev/zero under any name."""
    assert area(1, 2, perms, name=name).source == source


def test_names_keep_their_letters_when_the_kernel_escapes_the_newline() -> None:
    """show_map_vma() escapes the newline alone: a backslash, as systemd puts into names, stands for itself."""
    text = line(1, 2, "r--p 00000000 fe:00 1                          /a\\012b\\x2dc")
    (found,) = parse_maps(text)
    assert found.name == "/a\nb\\x2dc"
    assert parse_maps(render([found])) == (found,)


def test_render_writes_what_the_kernel_wrote_when_nothing_changed() -> None:
    """The kernel's own text comes back, byte for byte."""
    path = demo_folder() / "maps.final"
    assert render(read_maps(path)) == path.read_text()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("hello\n", 1),
        (line(1, 2, "rw-p 0 00:00 0") + line(1, 3, "rw-p 0 00:00 0"), 2),
        (line(2, 2, "rw-p 0 00:00 0"), 1),
        ("1001-2000 rw-p 00000000 00:00 0\n", 1),
        ("1000-2000 rw-? 00000000 00:00 0\n", 1),
    ],
)
def test_parse_refuses_a_line_when_the_kernel_would_not_write_it(text: str, number: int) -> None:
    """Overlapping, empty, unaligned or strange: the message names the line."""
    with pytest.raises(RecordingError, match=f"m:{number}: not a line of /proc/PID/maps"):
        parse_maps(text, Path("m"))


def test_read_refuses_a_file_when_nothing_is_mapped(tmp_path: Path) -> None:
    """/proc/PID/maps of a zombie is empty: the recording came too late."""
    (tmp_path / "maps").touch()
    with pytest.raises(RecordingError, match="no memory is mapped"):
        read_maps(tmp_path / "maps")
    with pytest.raises(RecordingError, match="No such file"):
        read_maps(tmp_path / "absent")


def test_canonical_merges_neighbours_when_nothing_tells_them_apart() -> None:
    """Anonymous memory of any name is one kind; a file's offsets must continue; [vsyscall] is nobody's."""
    assert canonical(
        [
            area(1, 2, name="[heap]"),
            area(2, 3),
            area(3, 4, "r--p"),
            area(4, 5, "r--p", 0, LIBC),
            area(5, 7, "r--p", 1, LIBC + " (deleted)"),
            area(7, 8, "r--p", 9, LIBC),
            area(9, 10, "r--p", 10, LIBC),
            area(10, 11, "r--p", 11, "/other"),
            area(12, 13, "--xp", name="[vsyscall]"),
        ]
    ) == (
        area(1, 3),
        area(3, 4, "r--p"),
        area(4, 7, "r--p", 0, LIBC),
        area(7, 8, "r--p", 9, LIBC),
        area(9, 10, "r--p", 10, LIBC),
        area(10, 11, "r--p", 11, "/other"),
    )


def test_compare_pairs_lines_when_they_begin_at_one_address() -> None:
    """A changed line is one difference, a line on one side alone is one too; the text shows both sides."""
    differences = compare(
        [area(1, 2), area(3, 4), area(5, 6, "rw-s", 2, "/a (deleted)")],
        [area(1, 2, "r--p"), area(5, 6, "rw-s", 2, "/a"), area(7, 8)],
    )
    assert [str(difference) for difference in differences] == [
        "expected   00001000-00002000 rw-p 00000000 00:00 0\n     found 00001000-00002000 r--p 00000000 00:00 0",
        "missing    00003000-00004000 rw-p 00000000 00:00 0",
        "unexpected 00007000-00008000 rw-p 00000000 00:00 0",
    ]
    assert not compare([area(1, 2), area(2, 3)], [area(1, 3, name="[heap]")])
    assert not compare([area(1, 2, name="/line\nfeed")], [area(1, 2, name="/line\\012feed")])


AREAS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(1, 3),
        st.sampled_from(["rw-p", "r--p", "rw-s"]),
        st.integers(0, 2),
        st.sampled_from(["", "[heap]", "/a", "/a (deleted)", "[anon_shmem:x]"]),
    ),
    max_size=8,
)


@given(AREAS)
def test_canonical_says_the_same_of_every_page_when_areas_merge(
    pieces: list[tuple[int, int, str, int, str]],
) -> None:
    """Merging changes no page's permissions, source or offset, and merging again changes nothing."""
    areas = []
    end = 0
    for gap, length, perms, offset, name in pieces:
        areas.append(area(end + gap, end + gap + length, perms, offset, name))
        end += gap + length
    merged = canonical(areas)
    assert canonical(merged) == merged
    assert pages(merged) == pages(areas)


def pages(areas: list[Area] | tuple[Area, ...]) -> dict[int, tuple[str, str | None, int]]:
    """What each page is."""
    return {
        address: (one.perms, one.source, one.offset + address - one.start if one.source else 0)
        for one in areas
        for address in range(one.start, one.end, 4096)
    }


@pytest.mark.parametrize(
    ("names", "differences"),
    [({"/old": "/new"}, 0), ({"/old": "/other"}, 0), ({"/old": "/other", "/other": "/old"}, 3)],
    ids=["a new name", "in place of another", "exchanged"],
)
def test_compare_finds_no_difference_when_a_file_was_renamed(names: dict[str, str], differences: int) -> None:
    """show_map_vma() shows what a file is called now; only two exchanged names cannot be told from an error."""
    mapped = [area(1, 2, name="/old"), area(4, 5, "r--p", 3, "/old"), area(7, 8, name="/other")]
    inodes = {"/old": 7, "/other": 8}
    last = [
        dataclasses.replace(area, name=names.get(area.name, f"{area.name} (deleted)"), inode=inodes[area.name])
        for area in mapped
    ]
    assert len(compare(last, mapped)) == differences


def test_compare_finds_a_difference_when_part_of_a_file_has_another_name() -> None:
    """All mappings of a file show one name."""
    mapped = [area(1, 2, name="/old"), area(4, 5, "r--p", 3, "/old")]
    last = [dataclasses.replace(mapped[0], inode=7), dataclasses.replace(mapped[1], name="/new", inode=7)]
    assert len(compare(last, mapped)) == 1


@pytest.mark.parametrize(("gone", "differences"), [(" (deleted)", 0), ("", 1)], ids=["deleted", "still there"])
def test_compare_finds_no_difference_when_a_file_was_made_anew_and_renamed(gone: str, differences: int) -> None:
    """Of two files that had a name only the second can have another one now; not where the first still has it."""
    mapped = [area(1, 2, name="/old"), area(3, 4, name="/old"), area(5, 6, name="/new")]
    last = [
        dataclasses.replace(area, name=name, inode=inode)
        for area, name, inode in zip(mapped, (f"/old{gone}", "/new", "/new"), (7, 8, 8), strict=True)
    ]
    assert len(compare(last, mapped)) == differences
