"""A datalist from folders: images, and labels and maps of the same names, split by patient.

Plain folders and nnU-Net's raw layout are understood: ``<case>_0000.nii.gz``, ``<case>_0001.nii.gz`` are the channels
of one case, and a ``dataset.json`` beside ``imagesTr`` and ``labelsTr`` names labels and channels. A case whose label
is missing is unlabelled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import BadInput
from ..files import write_atomically
from ..targets import check_targets
from ..transforms.loading import LABEL_ROUNDING, image_loader
from .datalist import CHANNEL, SECTIONS, case_name
from .grids import dicom_patient
from .inputs import find_cases

__all__ = ["add_arguments", "group_channels", "main", "make_datalist", "patient_of", "read_label_ids"]

# What label files add to the name of their image.
_LABEL_SUFFIXES = ("", "_seg", "-seg", "_label", "-label", "_mask", "-mask", "_gt")


def patient_of(case: str, pattern: str | None = None) -> str:
    """The patient in a case's name: all up to the first part with a digit in it.

    Parts lie between underscores or hyphens: ``patient001_frame01`` is of ``patient001``, ``pat-001-pre`` of
    ``pat-001``, ``sub-07_ses-2`` of ``sub-07``, and ``hippocampus_001`` a patient of its own.

    Args:
        case: the case's name.
        pattern: a regular expression instead; its first group, or the whole match, is the patient.

    Raises:
        BadInput: the pattern is no regular expression, or does not fit the name.
    """
    if pattern is not None:
        try:
            match = re.search(pattern, case)
        except re.error as error:
            raise BadInput(f"--patient {pattern}: not a regular expression ({error}).") from error
        if match is None:
            raise BadInput(f"--patient {pattern}: does not fit the case {case!r}.")
        return match.group(1) if match.re.groups else match.group()
    match = re.match(r"\D*\d[^_-]*", case)
    return match.group() if match else case


def group_channels(paths: Sequence[str]) -> dict[str, str | list[str]]:
    """Cases by name, with the file or the list of files, one a channel, of each.

    Files are taken for channels when every one of them ends on ``_0000``, ``_0001`` and so on. Where none ends on
    ``_0000``, the numbers are the cases' own.

    Raises:
        BadInput: two files have one name, or the cases have different channels, or such as don't count up from 0.
    """
    matches = [match for path in paths if (match := CHANNEL.match(case_name(path)))]
    if len(matches) < len(paths) or not any(int(match["channel"]) == 0 for match in matches):
        return _one_a_case(paths)
    channels: dict[str, dict[str, str]] = defaultdict(dict)
    for path, match in zip(paths, matches, strict=True):
        found = channels[match["case"]]
        if match["channel"] in found:
            raise BadInput(f"{path} and {found[match['channel']]} are the same channel of one case.")
        found[match["channel"]] = path
    first = next(iter(channels.values()))
    for case, found in channels.items():
        if sorted(found) != sorted(first):
            raise BadInput(
                f"case {case} has the channels {sorted(found)}, another one {sorted(first)}; expected the same of all."
            )
    if [int(channel) for channel in sorted(first)] != list(range(len(first))):
        raise BadInput(
            f"{paths[0]} and others end on {', '.join(f'_{channel}' for channel in sorted(first)[:5])}: these are no "
            "channels, which count up from _0000. If they are cases, give them names that don't end on four digits."
        )
    files = {case: [path for _, path in sorted(found.items())] for case, found in channels.items()}
    return {case: found if len(found) > 1 else found[0] for case, found in files.items()}


def _one_a_case(paths: Sequence[str]) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for path in paths:
        name = case_name(path)
        if name in cases:
            raise BadInput(f"{path} and {cases[name]} have the same name; one image a case is expected.")
        cases[name] = path
    return cases


def _cases(paths: Sequence[str], labels: Path | None) -> dict[str, Any]:
    """As :func:`group_channels`; numbers that the labels have, too, are the cases' own, also where they begin at 0."""
    names = {case_name(path) for path in _images(labels, "label")} if labels else set()
    numbered = [case_name(path) for path in paths if CHANNEL.match(case_name(path))]
    if any(name + suffix in names for name in numbered for suffix in _LABEL_SUFFIXES):
        return _one_a_case(paths)
    return group_channels(paths)


def _images(folder: Path, key: str) -> list[str]:
    cases = find_cases(folder, key=key)
    for case in cases:
        if "fault" in case:
            raise BadInput(f"{key}: {case['fault']}.")
    return [str(case["image"]) for case in cases]


def _by_name(
    folder: Path, cases: Iterable[str], suffixes: Sequence[str], what: str
) -> tuple[dict[str, str], list[str]]:
    """The file of each case in a folder, cases without one left out; and the files that are of no case."""
    files = {case_name(path): path for path in _images(folder, what)}
    found = {}
    for case in cases:
        names = [case + suffix for suffix in suffixes if case + suffix in files]
        if len(names) > 1:
            raise BadInput(f"{folder}: {' and '.join(names)} are both a {what} of the case {case}; keep one.")
        if names:
            found[case] = files.pop(names[0])
    if not found:
        raise BadInput(
            f"{folder}: none of its {len(files)} files bears the name of an image (such as {next(iter(files), '')!r}). "
            f"A {what} has the name of its image, or with one of {', '.join(filter(None, suffixes)) or 'no'} after it."
        )
    return found, sorted(files.values())


def read_label_ids(paths: Sequence[str]) -> list[int]:
    """The ids that occur in label files, in rising order.

    Raises:
        BadInput: a file can't be read, or holds something else than whole numbers.
    """
    read = image_loader()
    ids: set[int] = set()
    for path in tqdm(paths, desc="reading labels", unit="file", disable=None):
        try:
            values = np.unique(np.asarray(read(path)))
        except Exception as error:
            raise BadInput(f"{path} can't be read as a label map: {error}") from error
        whole = np.round(values)
        if not np.isfinite(values).all() or np.abs(values - whole).max() > LABEL_ROUNDING or whole.min() < 0:
            raise BadInput(f"{path} holds {values[:5].tolist()}; a label map has whole numbers from 0 on.")
        ids.update(int(value) for value in whole)
    return sorted(ids)


def make_datalist(
    images: Path,
    labels: Path | None = None,
    targets: Mapping[str, Path] | None = None,
    validation: float = 0.2,
    seed: int = 0,
    names: Mapping[int, str] | None = None,
    modality: Sequence[str] | None = None,
    patient: str | None = None,
) -> dict[str, Any]:
    """A datalist of the cases in folders, with absolute paths.

    Args:
        images: folder of images or of DICOM series; or a folder in nnU-Net's raw layout, with ``imagesTr``.
        labels: folder of label maps.
        targets: folders of dense regression targets by name.
        validation: share of the patients with labels that goes to ``validation``.
        seed: of the draw.
        names: of the labels; by default those of ``dataset.json``, else ``label 1`` and so on.
        modality: a name a channel.
        patient: a regular expression that finds the patient in a case's name, see :func:`patient_of`. Without one a
            DICOM series is of the patient in its header.

    Returns:
        The datalist's content. Unlabelled images of validation patients are left out: the student would learn from the
        anatomy that it is tested on. They are listed under ``left_out``, labels and maps without an image under
        ``unused``, and the images of nnU-Net's ``imagesTs``, which are left alone, under ``test_images``.

    Raises:
        BadInput: a folder is missing or empty, names are ambiguous, or nothing can be split.
    """
    if not 0 <= validation < 1:
        raise BadInput(f"--validation {validation}: expected a share from 0 to below 1, such as 0.2.")
    described: dict[str, Any] = {}
    test_images: list[Any] = []
    if (images / "imagesTr").is_dir():
        described = _nnunet_description(images / "dataset.json", named=bool(names))
        with suppress(BadInput):  # of images that nobody asked for
            test_images = [*group_channels(_images(images / "imagesTs", "images")).values()]
        labels = labels or (images / "labelsTr" if (images / "labelsTr").is_dir() else None)
        images = images / "imagesTr"
    cases = _cases(_images(images.resolve(), "images"), labels.resolve() if labels else None)
    label_of, unused = _by_name(labels.resolve(), cases, _LABEL_SUFFIXES, "label") if labels else ({}, [])
    target_of = {}
    for name, folder in (targets or {}).items():
        target_of[name], without_image = _by_name(folder.resolve(), cases, ("", f"_{name}", f"-{name}"), name)
        unused += without_image
    patients = {
        case: (_patient_in_header(image) if patient is None else None) or patient_of(case, patient)
        for case, image in cases.items()
    }
    held_out = _draw(sorted({patients[case] for case in label_of}), validation, seed)

    sections: dict[str, list[dict[str, Any]]] = {"training": [], "unlabeled": [], "validation": []}
    left_out = []
    for case, image in sorted(cases.items()):
        entry: dict[str, Any] = {"image": image, "patient": patients[case]}
        if case in label_of:
            entry["label"] = label_of[case]
            entry.update({name: found[case] for name, found in target_of.items() if case in found})
            sections["validation" if patients[case] in held_out else "training"].append(entry)
        elif patients[case] in held_out:
            left_out.append(image)
        else:
            sections["unlabeled"].append(entry)

    content: dict[str, Any] = {}
    if modality or described.get("modality"):
        content["modality"] = dict(enumerate(modality)) if modality else described["modality"]
        content["modality"] = {str(channel): name for channel, name in content["modality"].items()}
    if label_of:
        content["labels"] = _label_names(names, described.get("labels"), list(label_of.values()))
    if target_of:
        content["targets"] = [{"name": name, "unit": "", "kind": "dense", "missing": 0} for name in target_of]
    remarks = {"left_out": left_out, "unused": unused, "test_images": test_images}
    return {**content, **sections, **{key: paths for key, paths in remarks.items() if paths}}


def _doubtful_patients(content: Mapping[str, Any]) -> str | None:
    """Two cases that may be of one patient, on both sides of the split; None when only the data set's name is alike."""
    entries = [(entry, section) for section in SECTIONS for entry in content.get(section, ())]
    cases = [(case_name(entry), entry["patient"], section) for entry, section in entries]
    # A name's first part, or all but its last one.
    for pattern in ("^[^_-]+", "^(.+)[_-]"):
        stems = {case: patient_of(case, pattern) for case, _, _ in cases if re.search(pattern, case)}
        counts = Counter(stems[case] for case, _, _ in cases if case in stems)
        for case, patient, section in cases:
            if section != "validation" or case not in stems or counts[stems[case]] * 2 > len(cases):
                continue
            for other, other_patient, other_section in cases:
                if other_section != section and stems.get(other) == stems[case] and other_patient != patient:
                    return (
                        f"{case} ({section}) and {other} ({other_section}) count as two patients. If they are one, say "
                        f"where a name has its patient, such as --patient '{pattern}'."
                    )
    return None


def _label_names(
    names: Mapping[int, str] | None, described: Mapping[str, str] | None, paths: Sequence[str]
) -> dict[str, str]:
    if described and not names:
        return dict(described)
    given = {0: "background", **(names or {})}
    ids = sorted({*read_label_ids(paths), *given})
    if ids != list(range(len(ids))):
        raise BadInput(
            f"the label files hold the ids {ids}; expected 0 (background) to {len(ids) - 1} without a gap. Renumber "
            "them."
        )
    return {str(number): given.get(number, f"label {number}") for number in ids}


def _patient_in_header(image: str | Sequence[str]) -> str | None:
    """The patient of a DICOM series, whose folder's name seldom tells; None of other files."""
    first = image if isinstance(image, str) else image[0]
    return dicom_patient(first) if os.path.isdir(first) else None


def _draw(patients: Sequence[str], share: float, seed: int) -> set[str]:
    if share == 0 or not patients:
        return set()
    if len(patients) < 2:
        raise BadInput(
            f"--validation {share}: the labelled cases are of one patient, and no patient may be in both "
            "training and validation. Give --validation 0, or --patient when the names tell more patients."
        )
    count = min(max(round(share * len(patients)), 1), len(patients) - 1)
    return set(random.Random(seed).sample(list(patients), count))


def _nnunet_description(path: Path, named: bool = False) -> dict[str, Any]:
    """Labels (name by id) and channels from nnU-Net's ``dataset.json``, version 1 or 2.

    Args:
        path: the file, which may be absent.
        named: whether the user names the labels, so that regions of them don't matter.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON ({error}).") from error
    labels = content.get("labels", {})
    if "ignore" in labels:
        raise BadInput(
            f"{path}: the label {labels['ignore']} is `ignore`: nnU-Net's word for voxels that nobody labelled, and "
            "there is no such label here, it would be trained as a structure. Label these voxels, or give labels to "
            "completely labelled images only (an image without a file in labelsTr is unlabelled); then take `ignore` "
            f"out of {path.name}."
        )
    if labels and all(not str(key).isdigit() for key in labels):  # version 2 maps names to ids
        regions = [name for name, number in labels.items() if not isinstance(number, int)]
        if regions and not named:
            raise BadInput(
                f"{path}: the labels {regions} are regions of several ids, which are not supported; give the ids of "
                "the label files with --names 1=liver 2=tumour."
            )
        plain = {name: number for name, number in labels.items() if name not in regions}
        labels = {str(number): name for name, number in sorted(plain.items(), key=lambda item: item[1])}
    return {"labels": labels, "modality": content.get("channel_names", content.get("modality", {}))}


def _relative(value: Any, folder: Path) -> Any:
    """Paths inside the datalist's folder relative to it, so that the folder can be moved."""
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    return os.path.relpath(value, folder) if Path(value).is_relative_to(folder) else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common datalist``."""
    parser.description = (
        "Write a datalist, the JSON file that says which images, labels and maps belong together, which it tells by "
        "their names. Labelled patients are drawn for training or validation, whole; images without a label serve as "
        "unlabelled ones."
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder of images or of DICOM series, or one in nnU-Net's raw layout (with imagesTr and dataset.json)",
    )
    parser.add_argument("--labels", type=Path, help="folder of label maps with their images' names (a, a_seg, a_mask)")
    parser.add_argument(
        "--targets",
        nargs="*",
        default=[],
        metavar="DIR",
        help="folders of maps to regress, called as the folder or as you say: maps, thickness=maps",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.2,
        help="share of the labelled patients that is kept to measure on (default 0.2)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another number draws other patients for validation (default 0)"
    )
    parser.add_argument(
        "--names", nargs="*", default=[], metavar="ID=NAME", help="names of the labels: 1=liver 2=spleen"
    )
    parser.add_argument("--modality", nargs="*", metavar="NAME", help="what the images are, one a channel: CT, MR, PET")
    parser.add_argument("--patient", metavar="REGEX", help="what in a case's name is the patient: '^[^_-]+'")
    parser.add_argument("--output", type=Path, default=Path("datalist.json"), help="file to write (datalist.json)")


def _pairs(values: Sequence[str], option: str, example: str) -> dict[str, str]:
    for value in values:
        if not all(value.partition("=")):
            raise BadInput(f"{option} {value}: expected {example}.")
    return dict(value.split("=", 1) for value in values)


def main(options: argparse.Namespace) -> int:
    """Write a datalist and say what is in it."""
    if options.output.exists():
        raise BadInput(f"--output {options.output}: exists already. Give another name, or remove it.")
    names = _pairs(options.names, "--names", "an id and a name, such as 1=liver")
    if not all(number.isdigit() for number in names):
        raise BadInput(f"--names: found the ids {', '.join(names)}; expected whole numbers.")
    named = [value if "=" in value else f"{Path(value).name}={value}" for value in options.targets]
    targets = _pairs(named, "--targets", "a folder, or a name and a folder, such as thickness=maps")
    content = make_datalist(
        options.images,
        options.labels,
        {name: Path(folder) for name, folder in targets.items()},
        options.validation,
        options.seed,
        {int(number): name for number, name in names.items()} or None,
        options.modality,
        options.patient,
    )
    left_out, unused, tests = (content.pop(key, []) for key in ("left_out", "unused", "test_images"))
    check_targets(content.get("targets", []), source="--targets")
    folder = options.output.resolve().parent
    for section in set(SECTIONS) & set(content):
        for entry in content[section]:
            entry.update({key: _relative(value, folder) for key, value in entry.items() if key != "patient"})
    write_atomically(options.output, json.dumps(content, indent=2) + "\n")
    for section in ("training", "validation", "unlabeled"):
        entries = content[section]
        patients = len({entry["patient"] for entry in entries})
        print(f"{section}: {len(entries)} images of {patients} patients")
    names_of = {entry["patient"]: case_name(entry) for section in SECTIONS for entry in content.get(section, ())}
    print(f"patients: {', '.join(f'{case} is of {patient}' for patient, case in list(names_of.items())[:3])}")
    doubtful = _doubtful_patients(content)
    if doubtful:
        print(f"warning: {doubtful}")
    if unused:
        print(f"warning: {len(unused)} labels or maps are of no image, such as {unused[0]}")
    if left_out:
        print(f"left out: {len(left_out)} unlabelled images of validation patients, such as {left_out[0]}")
    if tests:
        print(
            f"not used: {len(tests)} test images in {options.images / 'imagesTs'}; to train on them as unlabelled "
            "ones, move them to imagesTr"
        )
    for number, name in content.get("labels", {}).items():
        print(f"label {number}: {name}")
    if content.get("targets"):
        print("targets: fill in their units, the structure they lie in and a typical size (scale) before you plan")
    print(f"written: {options.output}")
    return 0
