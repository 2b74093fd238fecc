"""The audit of one case: its files are read once, and what is wrong is said of the file that it is wrong with."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from ..errors import BadInput
from ..targets import is_dense
from ..transforms.loading import case_loader, check_label, check_values, read_image, read_map
from .checks import annotated_problems, check_number, patient_key
from .datalist import case_name
from .descriptions import is_ct
from .grids import Grid, describe_error, dicom_patient, grid_difference, read_grid
from .units import CLEAR_AIR, hounsfield_doubt, map_doubts

__all__ = ["AuditedCase", "Finding", "Task", "audit_case", "voxel_digests"]

_CHUNK = 1 << 22
_LINES_OF_A_HEADER = 200


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        file: that it is wrong with; the datalist where it is with no file.
        section: of the datalist; None where it is with all.
        case: its name; None likewise.
        kind: in one word, see ``docs/data.md``.
        severity: ``error`` or ``warning``.
        message: for people.
    """

    file: str
    section: str | None
    case: str | None
    kind: str
    severity: str
    message: str


@dataclass(frozen=True)
class Task:
    """What a process needs to audit a case.

    Args:
        section: of the datalist.
        entry: with absolute paths.
        labels: names by id; None allows any id.
        targets: descriptions of the regression targets.
        modalities: names of the channels, as far as they are known.
    """

    section: str
    entry: Mapping[str, Any]
    labels: Mapping[str, str] | None = None
    targets: Sequence[Mapping[str, Any]] = ()
    modalities: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Of the case."""
        return case_name(self.entry)

    def finding(self, kind: str, severity: str, message: str, key: str = "image", file: str | None = None) -> Finding:
        """Something that is wrong with ``file``, by default that (of several channels the first) under ``key``."""
        if file is None:
            file = _first(self.entry[key]) if isinstance(self.entry.get(key), (str, list)) else ""
        return Finding(file or _first(self.entry["image"]), self.section, self.name, kind, severity, message)


@dataclass
class AuditedCase:
    """What one case showed.

    Args:
        findings: what is wrong with it by itself.
        files: how many files, or folders of slices, it names.
        shape: voxels of the image; None where its header can't be read.
        channels: of the image, likewise.
        patient: as in the entry, else as in the header; None where neither says.
        header: digest of the patient in the header of a DICOM series, of several channels the first that says it.
        voxels: digests of the image, see :func:`voxel_digests`; none of an image that can't be read or is constant.
        label: digest of the label as it is stored; None where there is none, or it is constant.
    """

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    shape: tuple[int, ...] | None = None
    channels: int | None = None
    patient: str | None = None
    header: str | None = None
    voxels: tuple[str, ...] = ()
    label: str | None = None


def audit_case(task: Task) -> AuditedCase:
    """Read a case's files and say what is wrong with them; never raises."""
    return _Audit(task).run()


def audit_in_worker(task: Task) -> AuditedCase:
    """:func:`audit_case` for one of several processes, each of which keeps to one core."""
    torch.set_num_threads(1)
    return audit_case(task)


def voxel_digests(image: np.ndarray, affine: np.ndarray) -> tuple[str, ...]:
    """Two digests by which an image is known again: of its voxels brought to RAS by the header, and as stored.

    Two images are the same when they share one of them. So a copy is found that has another name, compression, format,
    data type or scale factor (values are compared as float32, after scaling), another voxel size or position, its
    channels in another order, was re-oriented along with its header, or lost its orientation from the header while the
    voxels stayed in place. Not the same: a copy that was cropped, resampled, normalised or rounded, or mirrored without
    the header saying so.

    Args:
        image: float32 (C, *spatial).
        affine: voxel index to RAS millimetres.
    """
    axes = nibabel.orientations.io_orientation(affine)
    upright = np.moveaxis(nibabel.orientations.apply_orientation(np.moveaxis(image, 0, -1), axes), -1, 0)
    return tuple(dict.fromkeys(" ".join(sorted(map(_digest, channels))) for channels in (upright, image)))


def _digest(array: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    # 0 and -0 are one value; ids keep their type.
    digest.update(np.ascontiguousarray(array + array.dtype.type(0)).data)
    return digest.hexdigest()


class _Audit:
    def __init__(self, task: Task) -> None:
        self.task, self.entry = task, task.entry
        self.labels = None if task.labels is None else {int(number): name for number, name in task.labels.items()}
        self.load = case_loader()
        self.found = AuditedCase(patient=patient_key(task.entry))
        self.grid: Grid | None = None
        self.at: str | None = None  # of a case's files the one that is looked at

    def run(self) -> AuditedCase:
        self.image()
        label = self.label("label")
        self.label("completed")
        for problem in annotated_problems(self.entry, self.task.labels):
            self.say("annotated", "error", problem, "label")
        if self.entry.get("label") is None and self.task.section != "unlabeled":
            severity = "warning" if self.task.section == "testing" else "error"
            self.say("incomplete", severity, f"a case of `{self.task.section}` without a `label`")
        for target in self.task.targets:
            if self.entry.get(target["name"]) is None:
                continue
            if is_dense(target):
                self.map(target, label)
            elif self.grid is not None:
                try:
                    check_number(target, self.entry[target["name"]], self.grid)
                except BadInput as error:
                    self.say(error.kind, "error", str(error))
        return self.found

    def say(self, kind: str | None, severity: str, message: str, key: str = "image") -> None:
        self.found.findings.append(self.task.finding(kind or "unreadable", severity, message, key, self.at))

    @contextmanager
    def noting(self, key: str) -> Iterator[None]:
        """What goes wrong with what the entry has under ``key`` becomes a finding."""
        try:
            yield
        except BadInput as error:
            self.say(error.kind, "error", str(error), key)
        except Exception as error:  # whatever a reader raises; an audit goes on
            self.say("unreadable", "error", f"{key} can't be read: {describe_error(error)}", key)
        self.at = None

    def files(self, key: str) -> Any:
        """The path or paths under ``key``, whose files are there, and whole as far as their checksums tell."""
        path = self.entry[key]
        if not isinstance(path, (str, list)):
            raise BadInput(f"`{key}` is {path!r}; expected the path of a map", kind="value")
        for self.at in [path] if isinstance(path, str) else path:
            self.found.files += 1
            if not os.path.exists(self.at):
                raise BadInput(f"{self.at} does not exist", kind="missing")
            if os.path.isdir(self.at):
                continue
            if not os.path.isfile(self.at):
                raise BadInput(f"{self.at} is no file but a pipe or a device; expected an image", kind="unreadable")
            if not os.path.getsize(self.at):
                raise BadInput(f"{self.at} is empty, a file of 0 bytes; copy it again", kind="empty")
            _check_compressed(self.at)
        self.at = None
        return path

    def image(self) -> None:
        with self.noting("image"):
            path = self.files("image")
            self.grid = read_grid(path)
            self.found.shape, self.found.channels = self.grid.shape, self.grid.channels
            folders = filter(os.path.isdir, [path] if isinstance(path, str) else path)
            self.found.header = next(filter(None, map(dicom_patient, folders)), None)
            self.found.patient = self.found.patient or self.found.header
            image = read_image(self.load, path)
            voxels = image.numpy()
            if not voxels.size:
                raise BadInput(f"{_first(path)} has no voxels: its shape is {list(voxels.shape[1:])}", kind="empty")
            flat = voxels.reshape(len(voxels), -1)
            lowest, highest = flat.min(axis=1), flat.max(axis=1)
            self.values(lowest, highest)
            if (lowest < highest).any():
                self.found.voxels = voxel_digests(voxels, image.affine.numpy())

    def values(self, lowest: np.ndarray, highest: np.ndarray) -> None:
        """What the range of each channel tells."""
        several = len(lowest) > 1
        if (lowest == highest).all():
            self.say(
                "constant", "error", f"every voxel is {' or '.join(f'{value:g}' for value in sorted(set(lowest)))}"
            )
            return
        for channel, (low, high) in enumerate(zip(lowest, highest, strict=True)):
            which = f"channel {channel}: " if several else ""
            if low == high:
                self.say("constant", "warning", f"{which}every voxel is {low:g}")
                continue
            named = self.task.modalities[channel] if channel < len(self.task.modalities) else ""
            if is_ct(named):
                if doubt := hounsfield_doubt(low, high):
                    self.say("units", doubt[0], which + doubt[1])
            elif named and low <= CLEAR_AIR and high > 0:
                words = f"{which}{low:g} to {high:g} look like Hounsfield units, though `modality` says {named}"
                self.say("units", "warning", words)

    def same_grid(self, key: str, path: str) -> None:
        grid = read_grid(path)
        difference = grid_difference(self.grid, grid) if self.grid is not None else None
        if difference:
            self.say("grid", "error", f"image and {key} are not on one grid: {difference}", key)

    def label(self, key: str) -> np.ndarray | None:
        """Audit the label map under ``key``; its ids (*spatial), None where there is none that can be used."""
        if self.entry.get(key) is None:
            return None
        ids: np.ndarray | None = None
        with self.noting(key):
            path = self.files(key)
            self.same_grid(key, path)
            annotated = self.entry.get("annotated") if key == "label" else None
            ids = check_label(read_map(self.load, key, path), path, self.labels, annotated).numpy()[0]
            low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
            if not high:
                self.say("empty", "warning", "no voxel is labelled; keep it only if nothing is there", key)
            elif low == high:
                self.say("constant", "warning", f"every voxel is labelled {high}", key)
            elif key == "label":
                self.found.label = _digest(ids)
        return ids

    def map(self, target: Mapping[str, Any], label: np.ndarray | None) -> None:
        name = target["name"]
        with self.noting(name):
            missing = float(target.get("missing", 0))
            path = self.files(name)
            self.same_grid(name, path)
            values = check_values(read_map(self.load, name, path), name, path, missing)
            array, sides = values.numpy()[0], np.linalg.norm(values.affine.numpy()[:-1, :-1], axis=0)
            if not (np.isfinite(array) & (array != missing)).any():
                self.say("empty", "warning", f"no voxel of {name} has a value", name)
            inside = label if label is not None and label.shape == array.shape else None
            for severity, words in map_doubts(target, array, sides, inside):
                self.say("units", severity, words, name)


def _first(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else path[0]


def _check_compressed(path: str) -> None:
    """Read a compressed file to its end, where its checksum is: readers of images stop at the last voxel.

    Raises:
        BadInput: it is truncated, or not what was once written.
    """
    try:
        if path.lower().endswith(".gz"):
            with gzip.open(path) as file:
                while file.read(_CHUNK):
                    pass
        elif path.lower().endswith((".mha", ".mhd")):
            zlib.decompress(_metaimage_data(path))
    except EOFError as error:
        raise BadInput(f"{path} is truncated: its compressed data end too early; copy it again", "truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        cut = "incomplete" in str(error)
        raise BadInput(
            f"{path} is {'truncated' if cut else 'damaged'} ({error}); copy it again",
            kind="truncated" if cut else "unreadable",
        ) from error


def _metaimage_data(path: str) -> bytes:
    """The compressed voxels of a MetaImage file; an empty stream where they are not compressed, or elsewhere."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        for _ in range(_LINES_OF_A_HEADER):
            name, _, value = file.readline().decode("latin-1").partition("=")
            fields[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        if fields.get("CompressedData", "").lower() == "true":
            if fields.get("ElementDataFile") == "LOCAL":
                return file.read()
            data = Path(path).parent / fields.get("ElementDataFile", "")
            if data.is_file():
                return data.read_bytes()
    return zlib.compress(b"")
