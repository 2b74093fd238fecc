"""Cases that MONAI Label hands to a training: labelled images of a studies folder, and what else lies there.

MONAI Label keeps the images in one folder, ``<folder>/<case>.nii.gz``, and the finished labels below it, in
``<folder>/labels/final``. It gives a training the images that have one, with their labels, and nothing more.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..errors import BadInput
from ..files import write_nifti
from ..provenance import file_digest
from ..targets import is_dense, structure_ids
from ..transforms.loading import image_loader
from .caching import CachedDataset
from .datalist import case_name, load_section
from .grids import describe_error, read_grid
from .inputs import find_cases
from .thickness import wall_thickness

__all__ = ["MeasuredDataset", "readable", "studies_folder", "unlabeled_cases", "with_maps"]

logger = logging.getLogger(__name__)

FINAL = "final"
DATASTORE = "datastore_v2.json"  # MONAI Label's record of a studies folder


def studies_folder(entries: Sequence[Mapping[str, Any]]) -> Path | None:
    """The folder that MONAI Label took labelled entries from; None where they come from elsewhere."""
    folders = {_studies(entry.get("label")) for entry in entries}
    return folders.pop() if len(folders) == 1 else None


def _studies(label: Any) -> Path | None:
    # By the label: an image may be a link to somewhere else, and MONAI Label gives what links lead to.
    if not isinstance(label, str) or Path(label).parent.parts[-2:] != ("labels", FINAL):
        return None
    folder = Path(label).parents[2]
    return folder if (folder / DATASTORE).exists() else None


def readable(cases: Iterable[Mapping[str, Any]], channels: int = 1) -> list[dict[str, Any]]:
    """Of cases that nobody chose for a training those that it can take; a warning says what is wrong with the others.

    Args:
        cases: entries whose ``image`` is a file.
        channels: channels that an image must have.
    """
    found = []
    for case in cases:
        fault = case.get("fault") or _fault(case["image"], channels)
        if fault:
            logger.warning("%s is left out: %s", case["image"], fault)
        else:
            found.append(dict(case))
    return found


def _fault(path: str, channels: int) -> str | None:
    """Why an image can't be learnt from, or None."""
    try:
        found = read_grid(path).channels
        # The header of a file that was cut short is whole.
        finite = bool(np.isfinite(image_loader()(path)).all())
    except Exception as error:  # readers raise whatever their format raises
        return describe_error(error)
    if found != channels:
        return f"it has {found} channel(s), the network takes {channels}"
    return None if finite else "it holds NaN or infinite voxels"


def unlabeled_cases(datalist: str, labeled: Sequence[Mapping[str, Any]], channels: int = 1) -> list[dict[str, Any]]:
    """The images without labels that go with labelled entries.

    For entries that MONAI Label gives, they are the other images of the studies folder. Nobody chose those for a
    training, so one that can't be read is left out with a warning. Images whose label is kept for the validation are
    not among them. When every image has a label, they are the labelled ones, to be learnt from without their labels.

    Args:
        datalist: the JSON file whose section ``unlabeled`` counts, for all other entries.
        labeled: the entries of the training.
        channels: channels that an image must have.

    Raises:
        BadInput: see :func:`load_section`.
    """
    folder = studies_folder(labeled)
    if folder is None:
        return load_section(datalist, "unlabeled")
    done = {case_name(path) for path in (folder / "labels" / FINAL).iterdir()}
    found = readable((case for case in find_cases(folder) if case_name(case) not in done), channels)
    if not found:
        logger.warning("%s: no image is without a label; the labelled ones are taken without theirs", folder)
        return [{"image": entry["image"]} for entry in labeled]
    return found


def with_maps(
    entries: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], output_dir: str | Path
) -> list[dict[str, Any]]:
    """Entries that MONAI Label gives, with maps of the regression targets; all others as they are.

    A map is what lies in ``<folder>/labels/<target>_final`` under the case's name. Where nothing does, and the target
    says which structures its wall encloses (``inner``), it is measured in the label.

    Args:
        entries: labelled entries.
        targets: descriptions of the regression targets.
        output_dir: measured maps are kept in its folder ``measured``, by what the label holds and how it is measured.

    Raises:
        BadInput: a label can't be read, or a map can't be written.
    """
    folder = studies_folder(entries)
    if folder is None:
        return [dict(entry) for entry in entries]
    completed = []
    for entry in entries:
        maps = {}
        for target in filter(is_dense, targets):
            name = target["name"]
            given = {case_name(path): str(path) for path in (folder / "labels" / f"{name}_{FINAL}").glob("*")}
            if case_name(entry["label"]) in given:
                maps[name] = given[case_name(entry["label"])]
            elif target.get("inner") and len(structure_ids(target)) == 1:
                maps[name] = _measured(target, Path(entry["label"]), Path(output_dir) / "measured" / name)
        completed.append({**entry, **maps})
    return completed


def _measured(target: Mapping[str, Any], label_path: Path, folder: Path) -> str:
    settings = {key: target[key] for key in ("slicewise", "axis", "smallest_cavity") if key in target}
    how = json.dumps([structure_ids(target), list(target["inner"]), settings], sort_keys=True)
    # Of these voxels, measured in this way: other people's labels of the case may be measured into the same folder.
    digest = hashlib.sha256((file_digest(label_path) + how).encode()).hexdigest()[:16]
    path = folder / f"{case_name(str(label_path))}_{digest}.nii.gz"
    if not path.exists():
        try:
            label = image_loader(ensure_channel_first=True)(label_path)
        except Exception as error:
            raise BadInput(f"{label_path}: can't be read as a label ({describe_error(error)}).") from error
        ids = np.rint(label[0].numpy()).astype(np.int64)
        affine = np.asarray(label.affine, dtype=float)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)[: ids.ndim]
        thickness = wall_thickness(ids, spacing, structure_ids(target)[0], target["inner"], **settings)
        write_nifti(path, nib.Nifti1Image(thickness, affine))
    return str(path)


class MeasuredDataset(CachedDataset):
    """The data set with cached transforms, of entries completed by :func:`with_maps`.

    Args:
        data: labelled entries.
        targets: descriptions of the regression targets.
        output_dir: see :func:`with_maps`.
        kwargs: everything else that :class:`.CachedDataset` takes.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        targets: Sequence[Mapping[str, Any]],
        output_dir: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(with_maps(data, targets, output_dir), **kwargs)
