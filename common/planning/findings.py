"""What a data set shows: the grids of its images, and what their voxels, labels and maps hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from ..data.datalist import SECTIONS, case_name, load_section
from ..data.descriptions import described_targets, is_ct, label_names, modalities
from ..data.grids import read_grid
from ..data.units import map_doubts, number_doubt
from ..errors import BadInput
from ..targets import dense_names, is_dense, structure_ids
from ..transforms.familiarity import measure_image
from ..transforms.loading import LoadCased

__all__ = ["Case", "Findings", "find"]

FOREGROUND_SAMPLES_PER_CASE = 10000


@dataclass
class Case:
    """One training case. Axes are those of the file after reorientation to RAS.

    Args:
        name: of the case.
        shape: voxels.
        spacing: mm.
        axes: the file's own axes, in that order.
        orientation: the patient's directions in which the file's axes run, such as ``"LPS"``.
        nonzero: voxels of the box around everything that isn't 0 in every channel.
        lowest: of each channel's values; none before they are read.
        highest: of each channel's values.
        measured: what :func:`.familiarity.measure_image` says of the image.
        label_voxels: of each label id; None without a label.
        annotated: the ids that the label speaks of; None for all.
        maps: of a dense target, by label id sum and number of its valid values, the lowest and the highest of them;
            absent where there are none.
        numbers: of a case-level target, its value.
        beyond: what of its targets can't be in their units, a sentence each.
    """

    name: str
    shape: np.ndarray
    spacing: np.ndarray
    axes: np.ndarray
    orientation: str
    nonzero: np.ndarray | None = None
    lowest: np.ndarray = field(default_factory=lambda: np.empty(0))
    highest: np.ndarray = field(default_factory=lambda: np.empty(0))
    measured: dict[str, torch.Tensor] = field(default_factory=dict)
    label_voxels: np.ndarray | None = None
    annotated: Sequence[int] | None = None
    maps: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """The training cases together.

    Args:
        spatial_dims: 2 or 3.
        channels: of every image.
        labels: names by id.
        modalities: names of the channels, as far as the datalist tells them.
        cases: in the datalist's order.
        foreground: sampled intensities of labelled voxels by channel, of channels that are CT.
        targets: complete descriptions of the regression targets.
        others: the cases of the other sections that fit the training cases, from their headers alone. They decide
            nothing, but a student learns from them, and a network is judged by them.
        misfits: what is wrong with the rest of those, a sentence each.
    """

    spatial_dims: int
    channels: int
    labels: dict[str, str]
    modalities: list[str]
    cases: list[Case]
    foreground: dict[int, np.ndarray] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    others: list[Case] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def ct(self) -> list[bool]:
        """Whether each channel is CT: only then do intensities mean the same in every image."""
        named = self.modalities or [""] * self.channels
        return [is_ct(name) for name in named]

    @property
    def spacings(self) -> np.ndarray:
        """Mm, (cases, spatial dims)."""
        return np.stack([case.spacing for case in self.cases])

    @property
    def shapes(self) -> np.ndarray:
        """Voxels of the images' non-zero parts, (cases, spatial dims)."""
        return np.stack([case.shape if case.nonzero is None else case.nonzero for case in self.cases])

    @property
    def nonzero_share(self) -> float:
        """Median share of an image that the box around its non-zero part takes."""
        return float(np.median([np.prod(case.nonzero / case.shape) for case in self.cases]))


def find(content: Mapping[str, Any], progress: bool = False) -> Findings:
    """Read the cases of a datalist: every header, then the voxels of the training cases.

    Args:
        content: what :func:`common.data.read_datalist` returned.
        progress: show a bar while voxels are read.

    Raises:
        BadInput: there are no training cases, a file can't be read, or files disagree.
    """
    if not content.get("training"):
        raise BadInput(f"{content['path']}: `training` is empty. A plan needs the labelled training cases.")
    labels = label_names(content)
    targets = described_targets(content, labels)
    names = [target["name"] for target in targets]
    entries = load_section(content, "training", keys=("image",), optional=("label", *names))
    findings = _read_headers(content, entries, labels)
    findings.targets = targets
    _read_other_headers(content, findings)
    _read_voxels(content, entries, findings, progress)
    for target in targets:
        _complete(target, findings.cases)
    return findings


def _read_headers(content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], labels: dict[str, str]) -> Findings:
    cases: list[Case] = []
    channels: dict[int, str] = {}
    ranks: dict[int, str] = {}
    for entry in entries:
        case, count = _header(entry)
        cases.append(case)
        channels.setdefault(count, case.name)
        ranks.setdefault(len(case.shape), case.name)
    if len(ranks) > 1:
        raise BadInput(f"{content['path']}: images of different dimensions: {_examples(ranks, 'D')}. Keep one kind.")
    if len(channels) > 1:
        raise BadInput(f"{content['path']}: different numbers of channels: {_examples(channels)}. Keep one number.")
    named = modalities(content)
    if named and len(named) != next(iter(channels)):
        raise BadInput(
            f"{content['path']}: `modality` names {len(named)} channel(s), images have {next(iter(channels))}. "
            "Correct it."
        )
    return Findings(next(iter(ranks)), next(iter(channels)), labels, named, cases)


def _header(entry: Mapping[str, Any]) -> tuple[Case, int]:
    """A case as its image's header has it, and the number of channels."""
    grid = read_grid(entry["image"])
    rank = len(grid.shape)
    order = np.argsort(nib.orientations.io_orientation(grid.affine)[:rank, 0], kind="stable")
    case = Case(
        name=case_name(entry),
        shape=np.asarray(grid.shape)[order],
        spacing=np.linalg.norm(grid.affine[:3, :3], axis=0)[:rank][order],
        axes=order,
        orientation="".join(str(letter) for letter in nib.aff2axcodes(grid.affine))[:rank],
        annotated=entry.get("annotated"),
    )
    return case, grid.channels


def _read_other_headers(content: Mapping[str, Any], findings: Findings) -> None:
    for section in (name for name in SECTIONS if name != "training"):
        try:
            entries = load_section(content, section, keys=("image",), required=False)
        except BadInput as error:
            findings.misfits.append(str(error))
            continue
        for entry in entries:
            try:
                case, channels = _header(entry)
            except BadInput as error:
                findings.misfits.append(f"`{section}`: {error}")
                continue
            if (len(case.shape), channels) != (findings.spatial_dims, findings.channels):
                findings.misfits.append(
                    f"`{section}`: {case.name} has {len(case.shape)} dimensions and {channels} channel(s), the "
                    f"training cases {findings.spatial_dims} and {findings.channels}."
                )
            else:
                findings.others.append(case)


def _examples(found: Mapping[int, str], unit: str = "") -> str:
    return ", ".join(f"{count}{unit} ({name})" for count, name in sorted(found.items()))


def _read_voxels(
    content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], findings: Findings, progress: bool
) -> None:
    """Fill in what the cases' voxels tell, and sample the intensities of a CT's labelled voxels."""
    dense = dense_names(findings.targets)
    missing = {target["name"]: target.get("missing", 0) for target in findings.targets}
    load = LoadCased(
        ["image", "label", *(target["name"] for target in findings.targets)], findings.labels, None, findings.targets
    )
    rng = np.random.default_rng(1234)
    foreground: dict[int, list[np.ndarray]] = {channel: [] for channel, ct in enumerate(findings.ct) if ct}
    bar = tqdm(entries, desc="reading", unit="case", disable=None if progress else True)
    for entry, case in zip(bar, findings.cases, strict=True):
        loaded = load(entry)
        case.measured = measure_image(loaded["image"])
        image = loaded["image"].numpy()
        channels = image.reshape(len(image), -1)
        case.lowest, case.highest = channels.min(axis=1), channels.max(axis=1)
        box = ndimage.find_objects((image != 0).any(axis=0).astype(np.uint8))
        sides = [part.stop - part.start for part in box[0]] if box else image.shape[1:]
        case.nonzero = np.asarray(sides)[case.axes]
        for target in findings.targets:
            if not is_dense(target):
                number = case.numbers[target["name"]] = float(loaded[target["name"]])
                doubt = number_doubt(target, number, case.shape, case.spacing)
                case.beyond += [doubt] if doubt else []
        if "label" not in loaded:
            continue
        label = loaded["label"].numpy()[0]
        case.label_voxels = np.bincount(label.ravel(), minlength=len(findings.labels))
        for channel, samples in foreground.items():
            if (label > 0).any():
                samples.append(rng.choice(image[channel][label > 0], FOREGROUND_SAMPLES_PER_CASE))
        for target in findings.targets:
            name = target["name"]
            if name not in dense or entry.get(name) is None:
                continue
            values = loaded[name].numpy()[0]
            case.beyond += [words for _, words in map_doubts(target, values, loaded["image"].pixdim, label)]
            valid = np.isfinite(values) & (values != missing[name])
            where, found, ids = label[valid], values[valid].astype(float), np.arange(len(findings.labels))
            if found.size:
                case.maps[name] = (
                    np.bincount(where, weights=found, minlength=len(ids)),
                    np.bincount(where, minlength=len(ids)),
                    np.asarray(ndimage.minimum(found, where, ids)),
                    np.asarray(ndimage.maximum(found, where, ids)),
                )
    if not all(foreground.values()):
        raise BadInput(f"{content['path']}: no training case has a labelled voxel, so CT intensities can't be planned.")
    findings.foreground = {channel: np.concatenate(samples) for channel, samples in foreground.items()}


def _complete(target: dict[str, Any], cases: Sequence[Case]) -> None:
    """Fill in the structures that hold the target (1 % of its voxels at least), its mean size there, and its range."""
    name = target["name"]
    if not is_dense(target):
        numbers = [case.numbers[name] for case in cases if np.isfinite(case.numbers[name])]
        target.setdefault("range", _range(numbers))
        target.setdefault("scale", _typical(float(np.mean(np.abs(numbers or [1.0])))))
        return
    maps = [case.maps[name] for case in cases if name in case.maps]
    if not maps:
        if {"structure", "scale"} <= set(target):
            return
        raise BadInput(f"target {name}: every value of the training maps is missing. Remove it or fix them.")
    sums, counts = (np.sum([found[index] for found in maps], axis=0) for index in (0, 1))
    if "structure" not in target:
        ids = np.flatnonzero(counts >= 0.01 * counts.sum()).tolist()
        target["structure"] = ids[0] if len(ids) == 1 else ids
    where = structure_ids(target) or list(range(len(counts)))
    inside = counts[where].sum()
    target.setdefault("scale", _typical(abs(sums[where].sum()) / inside if inside else 1.0))
    edges = [edge[index] for _, valid, *both in maps for index in where if valid[index] for edge in both]
    target.setdefault("range", _range(edges))


def _range(values: Sequence[float]) -> list[float]:
    """Lowest and highest value, to four digits; empty where there is none."""
    return [float(f"{edge:.4g}") for edge in (min(values), max(values))] if values else []


def _typical(value: float) -> float:
    """Three digits of a size; 1 where it is 0, since losses are divided by it."""
    return float(f"{value:.3g}") or 1.0
