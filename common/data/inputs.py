"""From what a user points at to cases: files, DICOM series, a folder of either, or a datalist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .datalist import load_section, with_names
from .grids import PICTURE, VOLUME_SUFFIXES, is_picture

__all__ = ["find_cases"]


def _is_volume(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(VOLUME_SUFFIXES)


def _is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM image, which many scanners write without a suffix: its preamble tells."""
    if _is_volume(path) or not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def find_cases(
    source: str | Path | int | None, channels: int = 1, output_dir: str | Path | None = None, key: str = "input"
) -> list[dict[str, str | list[str]]]:
    """The entries ``{"image": path}`` that ``source`` stands for; the path is a list where each channel has a file.

    Entries whose files or folders have one name are told apart by a ``case_name``, with parent folders in front. An
    entry for DICOM files that lie among other images has a ``fault``, with which loading it fails.

    Args:
        source: a volume (NIfTI, NRRD, MetaImage), a folder of volumes, a folder that is a DICOM series, a folder with
            such folders at any depth, or a datalist (JSON), whose ``testing`` entries are taken. A whole number is a
            folder's name, which MONAI's command line takes for a number.
        channels: channels of an image. With more than one, files named ``<case>_0000.nii.gz``, ``<case>_0001.nii.gz``
            and so on, nnU-Net's raw layout, are the channels of one case.
        output_dir: where results will go; must not be the folder that is searched, nor that of an image. Nothing is
            searched for in it.
        key: what the user calls ``source``, for messages.

    Raises:
        BadInput: nothing is given, it is no path, nothing is there, it holds no image, cases of one folder share a name
            or lack a channel, or results would lie among the inputs.
    """
    if source is None:
        raise BadInput(f"{key}: not given. Use --{key} with a file, a folder of files, or a DICOM series.")
    if isinstance(source, int) and not isinstance(source, bool):
        source = str(source)
    if not isinstance(source, (str, Path)):
        raise BadInput(
            f"{key}: found {source!r}, expected a path. The command line takes names such as 1.10 for numbers; write "
            "./ in front of the name, as in ./1.10."
        )
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise BadInput(f"{key}: {path} does not exist.")
    if path.suffix.lower() == ".json":
        cases = [{"image": entry["image"]} for entry in load_section(path, "testing", keys=("image",))]
    elif path.is_file():
        if not _is_volume(path):
            advice = (
                PICTURE.format(path.name)
                if is_picture(path)
                else "it is one slice of a DICOM series; give its folder"
                if _is_dicom(path)
                else f"expected {', '.join(VOLUME_SUFFIXES)}, the folder of a DICOM series, or a datalist (.json)"
            )
            raise BadInput(f"{key}: {path} is no image that can be read: {advice}.")
        cases = [{"image": str(path)}]
    else:
        results = None if output_dir is None else Path(os.path.expanduser(output_dir)).resolve()
        if results == path.resolve():
            raise BadInput(
                f"output_dir: {path} is the input's own folder. The next run would take results for scans, and a label "
                "file there could be replaced. Choose another folder."
            )
        cases = _in_folder(path, channels, results, key)
    if output_dir is not None and path.is_file():
        _check_apart(cases, Path(os.path.expanduser(output_dir)).resolve())
    faults = [case for case in cases if "fault" in case]  # of which nothing is written, whatever they are called
    return [*with_names([case for case in cases if "fault" not in case]), *faults]


def _check_apart(cases: list[dict[str, Any]], results: Path) -> None:
    """Refuse to write beside the images: ``<case>.json`` and ``<case>_seg.nii.gz`` may lie there already."""
    for case in cases:
        image = case["image"]
        for path in [image] if isinstance(image, (str, Path)) else image:
            # Beside a link there may be a label as well as beside what it leads to.
            folders = {Path(path).parent.resolve(), Path(path).resolve().parent}
            if results in ({*folders, Path(path).resolve()} if os.path.isdir(path) else folders):
                raise BadInput(
                    f"output_dir: {results} is the folder of {path}. A label, or a description of the scan, that lies "
                    "beside it could be replaced. Choose another folder."
                )


def _in_folder(folder: Path, channels: int, results: Path | None, key: str) -> list[dict[str, Any]]:
    series, faults = _find_series(folder, {results})
    volumes = [] if series == [folder] else [child for child in folder.iterdir() if _is_volume(child)]
    found = [str(path) for path in sorted([*volumes, *series])]
    if not found and not faults:
        picture = next((child.name for child in folder.iterdir() if is_picture(child)), None)
        raise BadInput(
            f"{key}: {folder} holds no volume ({', '.join(VOLUME_SUFFIXES)}) and no folder with a DICOM series."
            + (f" {PICTURE.format(picture)}." if picture else "")
        )
    if channels > 1:
        from .folders import group_channels  # which imports this module

        return [*({"image": image} for image in group_channels(found).values()), *faults]
    return [*({"image": image} for image in found), *faults]


def _find_series(folder: Path, passed: set[Path | None]) -> tuple[list[Path], list[dict[str, Any]]]:
    """The folders that hold DICOM series: ``folder``, or those below it, but not in folders that are ``passed``.

    And entries with a ``fault`` for DICOM files that lie among other images: the one file, or the folder of several.
    """
    passed.add(folder.resolve())  # a link may lead back
    children = sorted(folder.iterdir())
    below: list[Path] = []
    faults: list[dict[str, Any]] = []
    for child in children:
        if child.is_dir() and not child.name.startswith(".") and child.resolve() not in passed:
            series, faulty = _find_series(child, passed)
            below += series
            faults += faulty
    slices = [child for child in children if _is_dicom(child)]
    others = [*(child for child in children if _is_volume(child)), *below, *(Path(fault["image"]) for fault in faults)]
    if slices and others:
        fault = (
            f"{folder} holds {slices[0].name}, which is DICOM, and {others[0].relative_to(folder)}, which is an "
            "image of its own; keep the files of a series in a folder with nothing else"
        )
        return below, [{"image": str(slices[0] if len(slices) == 1 else folder), "fault": fault}, *faults]
    return ([folder] if slices else below), faults
