"""An audit of a data set before days of training: every file is read, and what is wrong is said by file.

Besides what is wrong with each case by itself (:mod:`.audited_case`), cases are compared: with which they share a
patient or identical voxels, and whether they have the same number of axes and channels. What counts as identical voxels
says :func:`.audited_case.voxel_digests`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..errors import BadInput
from ..files import write_atomically
from .audited_case import AuditedCase, Finding, Task, audit_case, audit_in_worker
from .datalist import SECTIONS, load_section, read_datalist
from .descriptions import described_targets, label_names, modalities
from .folders import patient_of
from .processes import usable_cores, work_through

__all__ = ["Audit", "add_arguments", "audit", "main"]

_SHOWN = 10  # findings of a kind on the screen
_SHOWN_FILES = 3  # of one finding

Case = tuple[Task, AuditedCase]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        datalist: its path.
        cases: how many were looked at.
        files: how many files, or folders of slices, they name.
        findings: errors first; paths relative to the datalist's folder where they lie in it.
    """

    datalist: str
    cases: int
    files: int
    findings: list[Finding]

    def count(self, severity: str) -> int:
        """How many findings are ``error`` or ``warning``."""
        return sum(finding.severity == severity for finding in self.findings)


def audit(datalist: str | os.PathLike, jobs: int | None = None, progress: bool = False) -> Audit:
    """Read every file of every section of a datalist, and say what is wrong with which. No file is changed.

    Args:
        datalist: JSON file.
        jobs: processes that read, each a case at a time; None takes the cores that this process may use. A process that
            a file crashes names the file, and the others go on. 0 reads in this process.
        progress: show a bar.

    Raises:
        BadInput: the datalist itself can't be used, or ``jobs`` is negative.
    """
    if jobs is not None and jobs < 0:
        raise BadInput(f"--jobs {jobs}: expected a number of processes, 0 or more.")
    content = read_datalist(datalist)
    labels = label_names(content) if content.get("labels") else None
    targets = described_targets(content, labels, SECTIONS)
    keys = ("label", "completed", *(target["name"] for target in targets))
    named = modalities(content)
    tasks = [
        Task(section, entry, labels, targets, named)
        for section in SECTIONS
        for entry in load_section(content, section, ("image",), required=False, optional=keys, exist=False)
    ]
    if not tasks:
        raise BadInput(
            f"datalist {content['path']} has no entries in {', '.join(SECTIONS)}; there is nothing to check."
        )
    jobs = min(usable_cores(), len(tasks)) if jobs is None else jobs
    with tqdm(total=len(tasks), desc="checking", unit="case", disable=None if progress else True) as bar:
        read = audit_in_worker if jobs else audit_case
        audited = work_through(read, tasks, jobs, _given_up, partial(bar.update, 1))
    cases: list[Case] = list(zip(tasks, audited, strict=True))
    findings = [finding for _, found in cases for finding in found.findings]
    for relation in (_other_kinds, _patients, _voxels, _labels):
        findings += relation(cases)
    if labels is None:
        message = "it has no `labels`, so that label ids could not be checked"
        findings.append(Finding(content["path"], None, None, "labels", "warning", message))
    findings = [_within(finding, content["folder"]) for finding in findings]
    files = sum(found.files for found in audited)
    return Audit(content["path"], len(tasks), files, sorted(findings, key=lambda finding: finding.severity))


def _given_up(task: Task) -> AuditedCase:
    message = "the process that read this case's files died, twice: of a fault in the reader, or of too little memory"
    return AuditedCase([task.finding("crash", "error", message)])


def _within(finding: Finding, folder: str) -> Finding:
    """The same with paths as seen from the datalist's folder."""
    inside = folder.rstrip(os.sep) + os.sep
    return replace(finding, file=finding.file.removeprefix(inside), message=finding.message.replace(inside, ""))


def _other_kinds(cases: Sequence[Case]) -> Iterator[Finding]:
    """Images with another number of axes or channels than the data set has: no network takes both."""
    named = cases[0][0].modalities
    axes = [len(found.shape) if found.shape else None for _, found in cases]
    for kind, numbers in (("dimensions", axes), ("channels", [found.channels for _, found in cases])):
        counts = Counter(number for number in numbers if number)
        if not counts:
            continue
        usual, times = counts.most_common(1)[0]
        expected = f"{times} of {sum(counts.values())} images have {usual}"
        if kind == "channels" and named:
            usual, expected = len(named), f"`modality` names {len(named)}"
        for (task, _), number in zip(cases, numbers, strict=True):
            if number and number != usual:
                yield task.finding(kind, "error", f"the image has {number} {kind}, {expected}")


def _groups(cases: Sequence[Case], keys: Callable[[Case], Iterable[str]]) -> list[list[Case]]:
    """The cases that share a key with another, or with one that does; each group in the order of the datalist."""
    members: dict[int, list[Case]] = {}
    group_of: dict[str, int] = {}
    for index, case in enumerate(cases):
        own = list(keys(case))
        members[index] = [case]
        for joined in {group_of[key] for key in own if key in group_of}:
            members[index] = members.pop(joined) + members[index]
            group_of.update({key: index for key, group in group_of.items() if group == joined})
        group_of.update(dict.fromkeys(own, index))
    return [group for group in members.values() if len(group) > 1]


def _leaks(group: Sequence[Case]) -> Iterator[tuple[Case, Case, str]]:
    """Cases that are judged on, each with one of its group that a network learnt from or was chosen by, and how bad."""
    learnt, chosen = ([case for case in group if _side(case) == side] for side in ("learnt", "validation"))
    for case in group:
        if _side(case) != "learnt" and learnt:
            # Images that are learnt from without their labels, and tested on: a transductive protocol.
            labelled = any(other[0].section == "training" for other in learnt)
            yield case, learnt[0], "error" if labelled or _side(case) == "validation" else "warning"
        elif _side(case) == "testing" and chosen:
            yield case, chosen[0], "warning"


def _side(case: Case) -> str:
    return case[0].section if case[0].section in ("validation", "testing") else "learnt"


def _where(case: Case) -> str:
    return f"{case[0].name} ({case[0].section})"


def _patients(cases: Sequence[Case]) -> Iterator[Finding]:
    """Patients on both sides, told by their cases: a report must not tell who they are."""
    for group in _groups(cases, lambda case: filter(None, [case[1].patient])):
        for case, other, severity in _leaks(group):
            yield case[0].finding("patient", severity, f"of one patient with {_where(other)}")
    for keys, doubted, message in _DOUBTS:
        for group in _groups(cases, keys):
            if len(group) * 2 > len(cases):
                continue  # what so many names begin with is the data set's, what so many headers say is nobody's
            for case in group:
                others = [other for other in group if other is not case and doubted(case[1], other[1])]
                own = (other for judged, other, _ in _leaks([*others, case]) if judged is case)
                yield from (case[0].finding("patient", "warning", message.format(_where(other))) for other in own)


# By what cases may be of one patient, when that is in doubt, and what to say then.
_DOUBTS: list[tuple[Callable[[Case], Iterable[str]], Callable[[AuditedCase, AuditedCase], bool], str]] = [
    (
        lambda case: filter(None, [case[1].header]),
        lambda one, other: one.patient != other.patient,
        "by its DICOM header of one patient with {}, though not by `patient` in the datalist",
    ),
    (
        lambda case: [patient_of(case[0].name)],
        lambda one, other: one.patient is None or other.patient is None,
        "by its name perhaps of one patient with {}; say so in the datalist with `patient`",
    ),
]


def _voxels(cases: Sequence[Case]) -> Iterator[Finding]:
    """Images with identical voxels."""
    for group in _groups(cases, lambda case: case[1].voxels):
        leaks = {id(case): (other, severity) for case, other, severity in _leaks(group)}
        for index, case in enumerate(group):
            section = case[0].section
            before = [other for other in group[:index] if other[0].section == section]
            labelled = [other for other in group if other[0].section == "training"]
            if id(case) in leaks:
                other, severity = leaks[id(case)]
                yield case[0].finding("leak", severity, f"the same voxels as {_where(other)}")
            elif section == "unlabeled" and labelled:
                message = f"the same voxels as {_where(labelled[0])}, which is labelled: it adds nothing"
                yield case[0].finding("duplicate", "warning", message)
            elif before:
                labels = {case[1].label, before[0][1].label}
                differ = ", with another label" * (len(labels) == 2 and None not in labels)
                yield case[0].finding("duplicate", "warning", f"the same voxels as {_where(before[0])}{differ}")


def _labels(cases: Sequence[Case]) -> Iterator[Finding]:
    """Labels that are the same though their images differ, and are of different patients or nobody says of whom."""
    for group in _groups(cases, lambda case: filter(None, [case[1].label])):
        first, *others = group
        for case in others:
            alike = set(case[1].voxels) & set(first[1].voxels)
            if not alike and (case[1].patient is None or case[1].patient != first[1].patient):
                message = f"the same label as {_where(first)} has, of another image"
                yield case[0].finding("duplicate", "warning", message, "label")


def _describe(report: Audit, seconds: float) -> str:
    """The report for the screen: what was found, the files of which the same is to be said together."""
    lines = [f"{report.datalist}: {report.cases} cases, {report.files} files read in {seconds:.0f} s"]
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for finding in report.findings:
        file = finding.file + (f" ({finding.section})" if finding.section else "")
        kinds[f"{finding.severity}: {finding.kind}"][finding.message].append(file)
    for kind, messages in kinds.items():
        for message, files in list(messages.items())[:_SHOWN]:
            more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
            lines.append(f"{kind}: {', '.join(files[:_SHOWN_FILES])}{more}: {message}")
        if len(messages) > _SHOWN:
            lines.append(f"{kind}: and {len(messages) - _SHOWN} more; --output FILE.json lists them all")
    lines.append(f"{report.count('error')} error(s), {report.count('warning')} warning(s)")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common check``."""
    parser.description = (
        "Read every file that a datalist names and say what is wrong with which: files that can't be read or are "
        "empty, other grids, labels that nobody named, impossible units, and patients or images in both training and "
        "validation. Nothing is changed. Exit code 1 where there is an error, 0 where there are warnings only."
    )
    parser.add_argument("--datalist", required=True, help="JSON datalist; all of its sections are checked")
    parser.add_argument("--output", type=Path, help="new JSON file for the findings, one entry each")
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes that read, a case each at a time (default: as many as cores; 0: read in this one)",
    )


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common check``; returns the exit code."""
    if args.output is not None and args.output.exists():
        raise BadInput(f"--output {args.output}: exists already. Give another name, or remove it.")
    start = time.monotonic()
    report = audit(args.datalist, args.jobs, progress=True)
    print(_describe(report, time.monotonic() - start))
    errors = report.count("error")
    if args.output is not None:
        counts = {"errors": errors, "warnings": report.count("warning")}
        findings = [asdict(finding) for finding in report.findings]
        content = {"cases": report.cases, "files": report.files, **counts, "findings": findings}
        write_atomically(args.output, json.dumps(content, indent=1) + "\n")
        print(f"written: {args.output}")
    return 1 if errors else 0
