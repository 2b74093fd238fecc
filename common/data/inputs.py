"""From what a user points at to cases: a file, a folder of files, a DICOM series or a folder of them."""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput

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


def find_cases(source: str | Path | None) -> list[dict[str, str]]:
    """The entries ``{"image": path}`` that ``source`` stands for.

    Args:
        source: a volume (NIfTI, NRRD, MetaImage), a folder of volumes, a folder that is a DICOM series, or a folder of
            such folders.

    Raises:
        BadInput: nothing is given, nothing is there, or it holds no image.
    """
    if source is None:
        raise BadInput("input: not given. Use --input with a file, a folder of files, or a DICOM series.")
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(f"input: {path} does not exist.")
    if path.is_file():
        if not _is_volume(path):
            raise BadInput(
                f"input: {path} is no image that can be read; expected one of {', '.join(_SUFFIXES)}, or the folder of "
                "a DICOM series."
            )
        return [{"image": str(path)}]
    if _is_series(path):
        return [{"image": str(path)}]
    children = sorted(path.iterdir())
    found = [child for child in children if _is_volume(child) or (child.is_dir() and _is_series(child))]
    if not found:
        raise BadInput(f"input: {path} holds no volume ({', '.join(_SUFFIXES)}) and no folder with a DICOM series.")
    return [{"image": str(child)} for child in found]
