"""Recordings of real programs: their steps lead from the first layout to the kernel's own last one."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_model import LayoutModel

from hmm_client.recordings import (
    Exit,
    GrowStack,
    Recording,
    ThreadExit,
    Unknown,
    canonical,
    compare,
    demo_folder,
)
from hmm_client.recordings.order import EXITING

DATA = Path(__file__).parent / "data"
FOLDERS = [demo_folder(), *sorted(path.parent for path in DATA.glob("*/*/strace.log"))]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def recording(request: pytest.FixtureRequest) -> Recording:
    """Each recording that the tests carry."""
    return Recording.load(request.param)


def test_replay_gives_the_kernels_final_layout_when_steps_are_taken_in_order(recording: Recording) -> None:
    """Every recorded call, taken where `order` puts it, reproduces /proc/PID/maps exactly."""
    differences = compare(recording.final, LayoutModel(recording).run())
    assert not differences, "\n".join(map(str, differences))


def test_plan_knows_every_call_when_the_program_is_ordinary(recording: Recording) -> None:
    """%memory and %process hold no call whose effect on the layout is unknown."""
    assert not [step.call.text for step in recording.plan.steps if isinstance(step, Unknown)]
    assert recording.plan.incomparable is None


def test_plan_takes_each_call_once_when_calls_are_split(recording: Recording) -> None:
    """Reordering neither loses a call nor repeats one; a process's end may show at a call that had another effect."""
    steps = [step for step in recording.plan.steps if not isinstance(step, Exit | ThreadExit | GrowStack)]
    expected = [call.line for call in recording.log.calls if call.name not in EXITING]
    assert sorted(step.call.line for step in steps if step.call.name not in EXITING) == expected


def test_files_hold_every_mapping_when_their_sizes_are_asked(recording: Recording) -> None:
    """A file as large as `file_sizes` says has a page behind each mapped page."""
    sizes = {name.replace("\n", "\\012"): size for name, size in recording.file_sizes().items()}  # as canonical areas
    for area in canonical([*recording.initial]) + canonical([*recording.final]):
        if area.source:
            assert area.offset + area.length <= sizes[area.source]
