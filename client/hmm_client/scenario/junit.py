"""What came of scenarios, as JUnit XML: a test case for each scenario.

**Source**: the format that CI systems read, as pytest writes it.

**Absent**: taking the steps (`run.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from hmm_client.scenario.model import Scenario
from hmm_client.scenario.run import StepReport


def write_junit(path: Path, done: Sequence[tuple[Scenario, Sequence[StepReport]]]) -> None:
    """Write a file with what came of scenarios.

    Raises:
        OSError: it cannot be written.
    """
    failed = sum(any(report.wrong for report in reports) for _, reports in done)
    seconds = sum(report.seconds for _, reports in done for report in reports)
    numbers = {"tests": str(len(done)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}
    suite = ET.Element("testsuite", {"name": "hmmctl run"} | numbers)
    for scenario, reports in done:
        spent = f"{sum(report.seconds for report in reports):.3f}"
        attributes = {"classname": "hmmctl.run", "name": scenario.name, "file": str(scenario.path), "time": spent}
        case = ET.SubElement(suite, "testcase", attributes)
        wrong = [report for report in reports if report.wrong]
        if wrong:
            lines = [f"{scenario.path}:{one.step.line}: {one.step}: {text}" for one in wrong for text in one.wrong]
            failure = ET.SubElement(case, "failure", {"message": lines[0]})
            failure.text = "\n".join(lines)
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    ET.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
