"""What looks wrong in a data set: not enough to refuse it, enough to have a look before days of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.units import AIR, hounsfield_doubt
from ..targets import is_dense
from .findings import Case, Findings

__all__ = ["doubts"]

SHOWN = 5
OTHER_SPACING = 2.0  # times the median, or a half of it
OTHER_UNIT = 5.0  # times the median, or that part of it; millimetres and centimetres differ by more
UNLIKE_MR = -500.0  # nothing but a CT goes down to that
BELOW_VOXELS = 10.0  # a thickness of a tenth of the finest voxel side can't have been measured


def doubts(findings: Findings) -> list[str]:
    """A sentence for each thing that looks wrong, with the cases and what to do. Empty when nothing does."""
    return [
        sentence
        for check in (_misfits, _single_slices, _orientations, _spacings, _labels, _hounsfield_units, _target_units)
        for sentence in check(findings)
    ]


def _all(findings: Findings) -> list[Case]:
    return [*findings.cases, *findings.others]


def _names(cases: Sequence[Case]) -> str:
    more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
    return ", ".join(case.name for case in cases[:SHOWN]) + more


def _misfits(findings: Findings) -> list[str]:
    more = len(findings.misfits) - SHOWN
    return findings.misfits[:SHOWN] + ([f"{more} more images of other sections can't be used."] if more > 0 else [])


def _single_slices(findings: Findings) -> list[str]:
    flat = [case for case in _all(findings) if len(case.shape) == 3 and case.shape.min() == 1]
    if not flat:
        return []
    return [
        f"{_names(flat)}: one slice in a file of three dimensions, for which a network in 3D is planned. Save such "
        "images as NIfTI files of two dimensions for a network in 2D."
    ]


def _orientations(findings: Findings) -> list[str]:
    counts = Counter(case.orientation for case in _all(findings))
    if len(counts) < 2:
        return []
    most = counts.most_common(1)[0][0]
    others = [case for case in _all(findings) if case.orientation != most]
    found = ", ".join(f"{count} of {letters}" for letters, count in counts.most_common())
    return [
        f"mixed orientations: {found}; not {most}: {_names(others)}. All are brought to one by their headers: look "
        "whether left is left in these."
    ]


def _spacings(findings: Findings) -> list[str]:
    median = np.median(findings.spacings, axis=0)
    other = [
        case
        for case in _all(findings)
        if (case.spacing / median > OTHER_SPACING).any() or (median / case.spacing > OTHER_SPACING).any()
    ]
    return [
        f"{case.name}: voxels of {' x '.join(f'{size:g}' for size in case.spacing)} mm, the median is "
        f"{' x '.join(f'{size:g}' for size in median)}. Check its header, or leave it out."
        for case in other[:SHOWN]
    ] + ([f"{len(other) - SHOWN} more cases with another voxel size."] if len(other) > SHOWN else [])


def _labels(findings: Findings) -> list[str]:
    sentences = []
    labelled = [case for case in findings.cases if case.label_voxels is not None]
    unlabelled = [case for case in findings.cases if case.label_voxels is None]
    if unlabelled:
        sentences.append(f"without a label in `training`: {_names(unlabelled)}. Move them to `unlabeled`.")
    counts = (case.label_voxels for case in labelled if case.label_voxels is not None)
    voxels = sum(counts, np.zeros(len(findings.labels), int))
    for identity, name in findings.labels.items():
        if voxels[int(identity)] == 0:
            sentences.append(
                f"the label {identity}, {name}, is in no training case, so it can't be learnt. Add cases that have it, "
                "or take it out of `labels`."
            )
    empty = [case for case in labelled if case.label_voxels is not None and not case.label_voxels[1:].any()]
    if empty and len(empty) < len(labelled):
        sentences.append(f"nothing is labelled in {_names(empty)}. Keep these only if nothing is there.")
    return sentences


def _hounsfield_units(findings: Findings) -> list[str]:
    sentences = []
    for channel, ct in enumerate(findings.ct):
        lowest = np.array([case.lowest[channel] for case in findings.cases])
        highest = max(case.highest[channel] for case in findings.cases)
        which = f"channel {channel} of " if findings.channels > 1 else ""
        airless = [case for case in findings.cases if hounsfield_doubt(case.lowest[channel], case.highest[channel])]
        if ct and airless:
            found = f"{min(case.lowest[channel] for case in airless):g} to {max(c.highest[channel] for c in airless):g}"
            sentences.append(
                f"{which}{_names(airless)}: called CT, but no voxel is below {AIR:g} (found {found}), so they may be "
                "normalised, windowed or stored with an offset. Export them in Hounsfield units, or name another "
                "`modality`."
            )
        if not findings.modalities and np.median(lowest) < UNLIKE_MR:
            sentences.append(
                f"{which}the images have values of {lowest.min():g} to {highest:g}, as CT has, but the datalist names "
                'no `modality`, so each is normalised by its own. Add "modality": "CT" if they are.'
            )
    return sentences


def _target_units(findings: Findings) -> list[str]:
    beyond = [f"{case.name}: {words}" for case in findings.cases for words in case.beyond]
    sentences = beyond[:SHOWN]
    if len(beyond) > SHOWN:
        sentences.append(f"{len(beyond) - SHOWN} more values of targets that can't be in their unit.")
    for target in findings.targets:
        name, unit = target["name"], target.get("unit", "")
        if not unit:
            sentences.append(f"target {name}: no unit given. Add `targets` with a `unit` to the datalist.")
        if is_dense(target):
            sizes = {
                case.name: found[0].sum() / found[1].sum()
                for case in findings.cases
                if (found := case.maps.get(name)) is not None
            }
            if unit == "mm":
                sentences += _unlike_millimetres(findings, name, sizes)
        else:
            sizes = {case.name: case.numbers[name] for case in findings.cases if np.isfinite(case.numbers[name])}
        sentences += _other_unit(name, unit, sizes)
    return sentences


def _unlike_millimetres(findings: Findings, name: str, sizes: dict[str, float]) -> list[str]:
    """Far below what the voxels can show."""
    finest = float(findings.spacings.min())
    typical = float(np.median(list(sizes.values()))) if sizes else finest
    if 0 < typical < finest / BELOW_VOXELS:
        return [
            f"target {name}: {typical:g} mm in the median case, where the finest voxel has sides of {finest:g} mm. Is "
            "the unit centimetres or metres?"
        ]
    return []


def _other_unit(name: str, unit: str, sizes: dict[str, float]) -> list[str]:
    present = {case: abs(size) for case, size in sizes.items() if size}
    if len(present) < 3:
        return []
    median = float(np.median(list(present.values())))
    far = [case for case, size in present.items() if size > OTHER_UNIT * median or size < median / OTHER_UNIT]
    if not far:
        return []
    return [
        f"target {name}: {far[0]} has {sizes[far[0]]:g} {unit}".rstrip()
        + f" where the median is {median:g}"
        + (f", and {len(far) - 1} more cases are as far off" if len(far) > 1 else "")
        + ". Another unit?"
    ]
