"""Writing files so that nothing is ever half written."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput

if TYPE_CHECKING:
    from nibabel import Nifti1Image

__all__ = ["intended_name", "remove_leftovers", "temporary_name", "to_json", "write_atomically", "write_nifti"]

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


def write_atomically(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Write a file in one step: a reader, a killed run or a full disk never leaves half of it.

    Args:
        path: the file; its folder is made where it is missing. What it held before stays until the new content is
            safely on the disk.
        content: text (written as UTF-8) or bytes.

    Raises:
        BadInput: the file can't be written.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(
            f"{path}: can't be written ({error.strerror or error}); an older file is as it was. Free some space, or "
            "choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_nifti(path: str | os.PathLike[str], image: Nifti1Image) -> None:
    """Write a ``.nii.gz`` file in one step. The same image gives the same bytes.

    Raises:
        BadInput: the file can't be written.
    """
    # Compressed as nibabel does: noise hardly shrinks further, and the higher levels take many times as long.
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def temporary_name(path: Path) -> Path:
    """A new name beside a file, hidden and without the file's suffix, so that nobody takes it for the file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of writing a file, which nobody else may be writing now."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if intended_name(leftover.name) == path.name:
            with contextlib.suppress(OSError):
                leftover.unlink()


def intended_name(name: str) -> str:
    """The file that ``name`` was to become, where it is what a killed process left of its writing; else ``name``."""
    left = _TEMPORARY.fullmatch(name)
    return left[1] if left else name


def to_json(value: Any) -> str:
    """The text of a value, NumPy's and PyTorch's included; a number that is not finite is null: JSON knows no NaN."""
    return json.dumps(_json_ready(value), indent=2, allow_nan=False) + "\n"


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a tensor
        return _json_ready(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
