"""From what a user points at to cases: files, DICOM series, a folder of either, or a datalist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .datalist import case_name, load_section

__all__ = ["find_cases"]

_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def _is_volume(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(_SUFFIXES)


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, which many scanners write without a suffix: its preamble tells."""
    if not path.is_file() or path.name.startswith("."):
        return False
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _is_series(folder: Path) -> bool:
    return any(_is_dicom(path) for path in sorted(folder.iterdir())[:20])


def _check_names(cases: Sequence[Mapping[str, Any]]) -> None:
    found: dict[str, Any] = {}
    for case in cases:
        name = case_name(case)
        if name in found:
            raise BadInput(
                f"{found[name]} and {case['image']} are both named {name!r}, and what is written for one would replace "
                "what is written for the other. Rename one of them, or keep them in folders of their own."
            )
        found[name] = case["image"]


def find_cases(
    source: str | Path | None, channels: int = 1, output_dir: str | Path | None = None
) -> list[dict[str, str | list[str]]]:
    """The entries ``{"image": path}`` that ``source`` stands for; the path is a list where each channel has a file.

    Args:
        source: a volume (NIfTI, NRRD, MetaImage), a folder of volumes, a folder that is a DICOM series, a folder of
            such folders, or a datalist (JSON), whose ``testing`` entries are taken.
        channels: channels of an image. With more than one, files named ``<case>_0000.nii.gz``, ``<case>_0001.nii.gz``
            and so on, nnU-Net's raw layout, are the channels of one case.
        output_dir: where results will go; must not be the folder that is searched.

    Raises:
        BadInput: nothing is given, nothing is there, it holds no image, cases share a name or lack a channel, or
            results would lie among the inputs.
    """
    if source is None:
        raise BadInput("input: not given. Use --input with a file, a folder of files, or a DICOM series.")
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(f"input: {path} does not exist.")
    if path.suffix.lower() == ".json":
        cases = [{"image": entry["image"]} for entry in load_section(path, "testing", keys=("image",))]
    elif path.is_file():
        if not _is_volume(path):
            advice = (
                "it is one slice of a DICOM series; give its folder"
                if _is_dicom(path)
                else (f"expected one of {', '.join(_SUFFIXES)}, the folder of a DICOM series, or a datalist (.json)")
            )
            raise BadInput(f"input: {path} is no image that can be read: {advice}.")
        cases = [{"image": str(path)}]
    else:
        if output_dir is not None and Path(output_dir).expanduser().resolve() == path.resolve():
            raise BadInput(
                f"output_dir: {path} is the input's own folder. The next run would take results for scans, and a label "
                "file there could be replaced. Choose another folder."
            )
        cases = _in_folder(path, channels)
    _check_names(cases)
    return cases


def _in_folder(folder: Path, channels: int) -> list[dict[str, str | list[str]]]:
    if _is_series(folder):
        return [{"image": str(folder)}]
    children = sorted(folder.iterdir())
    found = [str(child) for child in children if _is_volume(child) or (child.is_dir() and _is_series(child))]
    if not found:
        raise BadInput(f"input: {folder} holds no volume ({', '.join(_SUFFIXES)}) and no folder with a DICOM series.")
    if channels > 1:
        from .folders import group_channels  # which imports this module

        return [{"image": image} for image in group_channels(found).values()]
    return [{"image": image} for image in found]
