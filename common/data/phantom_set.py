"""A data set of bulla phantoms, with its datalist.

Everything is drawn from ``(seed, section, case number)``: the same arguments give the same files, and asking for more
cases doesn't change the earlier ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..errors import BadInput
from ..files import intended_name, write_atomically, write_nifti
from .phantom import LABELED_DOMAIN, SHIFTED_DOMAIN, WALL, make_phantom

__all__ = ["add_arguments", "generate_phantoms", "main"]

DATASET_NAME = "bulla_phantom"
LABELS = {"0": "background", "1": "lumen", "2": "wall"}
FOLDERS = ("images", "labels", "thickness")
FILE_PREFIX = "phantom_"


def _clear(output: Path) -> None:
    """Make room for new phantoms: remove those of an earlier run, refuse anything else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput(f"{output}: is a file, expected a folder for the phantoms. Choose another --output.")
    files = [path for path in sorted(output.rglob("*")) if not path.is_dir()]
    for path in files:
        in_folder = path.parent.parent == output and path.parent.name in FOLDERS
        name = intended_name(path.name)
        if in_folder and name.startswith(FILE_PREFIX) and name.endswith(".nii.gz"):
            continue
        if path.parent == output and name == "datalist.json" and (name != path.name or _is_own_datalist(path)):
            continue
        raise BadInput(
            f"{output}: not empty, and {path.relative_to(output)} was not written by this command. Nothing was "
            "touched. Choose a new or empty folder."
        )
    for path in files:
        path.unlink()


def _is_own_datalist(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("name") == DATASET_NAME


def _affine(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -0.5 * (np.asarray(shape) - 1) * np.asarray(spacing)
    return affine


def _write(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    write_nifti(path, image)


def generate_phantoms(
    output: str | Path,
    labeled: int = 6,
    unlabeled: int = 16,
    validation: int = 6,
    shape: Sequence[int] = (48, 48, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a data set of phantoms with its ``datalist.json``.

    Labelled cases come from :data:`LABELED_DOMAIN`, unlabelled ones from :data:`SHIFTED_DOMAIN` (noisier, blurrier,
    fainter, more vessels), validation cases from both in turn, so that what the unlabelled volumes teach can be seen.

    Args:
        output: folder; new, empty, or holding phantoms of an earlier run, which are replaced.
        labeled: how many cases with label, thickness map and volume.
        unlabeled: how many images without any truth on disk.
        validation: how many validation cases.
        shape: of each volume, voxels.
        spacing: mm.
        seed: of everything drawn.
        progress: show a bar over the cases.

    Returns:
        The datalist's path.

    Raises:
        BadInput: the folder holds something else, a count is negative, or the volume is too small for a bulla.
    """
    counts = {"training": labeled, "unlabeled": unlabeled, "validation": validation}
    for section, count in counts.items():
        if count < 0:
            raise BadInput(f"phantom: {count} cases asked for {section}, expected 0 or more.")
    output = Path(output)
    _clear(output)
    sections: dict[str, list[dict[str, object]]] = {section: [] for section in counts}
    affine = _affine(shape, spacing)
    thickness_sum, thickness_count = 0.0, 0
    cases = [(name, index) for name, count in counts.items() for index in range(count)]
    for section, index in tqdm(cases, desc="phantoms", unit="case", disable=None if progress else True):
        shifted = section == "unlabeled" or (section == "validation" and index % 2 == 1)
        domain = SHIFTED_DOMAIN if shifted else LABELED_DOMAIN
        case = make_phantom(shape, spacing, seed=(seed, list(counts).index(section), index), domain=domain)
        name = f"{FILE_PREFIX}{section}_{index:03d}.nii.gz"
        entry: dict[str, object] = {"image": f"images/{name}", "domain": "shifted" if shifted else "labeled"}
        _write(case.image, affine, output / "images" / name)
        if section != "unlabeled":
            _write(case.label, affine, output / "labels" / name)
            _write(case.thickness, affine, output / "thickness" / name)
            entry |= {
                "label": f"labels/{name}",
                "thickness": f"thickness/{name}",
                "volume": round(case.volume, 6),
            }
        if section == "training":
            values = case.thickness[case.label == WALL]
            thickness_sum, thickness_count = thickness_sum + float(values.sum()), thickness_count + values.size
        sections[section].append(entry)
    datalist = {
        "name": DATASET_NAME,
        "description": "Synthetic lung bullae; thickness in mm at wall voxels, volume in mL of lumen and wall.",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "targets": [
            {
                "name": "thickness",
                "unit": "mm",
                "kind": "dense",
                "structure": WALL,
                "missing": 0,
                "scale": round(thickness_sum / thickness_count, 2) if thickness_count else 1.0,
                "inner": [1],
            }
        ],
        **sections,
    }
    path = output / "datalist.json"
    write_atomically(path, json.dumps(datalist, indent=1) + "\n")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common phantoms``."""
    parser.add_argument("--output", required=True, help="folder for the volumes and their datalist.json")
    parser.add_argument("--labeled", type=int, default=6, help="cases with label, thickness and volume")
    parser.add_argument("--unlabeled", type=int, default=16, help="images without any truth")
    parser.add_argument("--validation", type=int, default=6, help="validation cases")
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 48, 48), metavar="N", help="voxels along x, y, z")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar="MM", help="voxel size")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same volumes")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common phantoms``; returns the exit code."""
    path = generate_phantoms(
        args.output,
        labeled=args.labeled,
        unlabeled=args.unlabeled,
        validation=args.validation,
        shape=args.shape,
        spacing=args.spacing,
        seed=args.seed,
    )
    print(f"{args.labeled + args.unlabeled + args.validation} phantoms: {path}")
    return 0
