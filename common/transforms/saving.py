"""What was predicted, as files."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform

from ..data.datalist import case_name
from ..data.grids import Grid, grid_difference, read_grid
from ..files import write_nifti

__all__ = ["SaveNiftid"]


class SaveNiftid(MapTransform):
    """Write a map of each case to ``<case>_<postfix>.nii.gz``, on the map's own grid.

    In place of MONAI's ``SaveImaged``, which writes in place and, where that fails, takes the half that another library
    leaves for success.

    Args:
        key: the map, a ``MetaTensor`` (1, *spatial) that knows the file it was predicted from.
        output_dir: folder of the files.
        postfix: what their names end on.
        dtype: type of their voxels.

    Raises:
        BadInput: when called, if the file can't be written. What it held before stays.
    """

    def __init__(self, key: str, output_dir: str | os.PathLike[str], postfix: str, dtype: np.typing.DTypeLike) -> None:
        super().__init__(key)
        self.key = key
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.dtype = np.dtype(dtype)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the map of ``data``, which is returned as it is."""
        found: MetaTensor = data[self.key]
        affine = _whole_affine(found)
        image = nibabel.Nifti1Image(found.as_tensor()[0].cpu().numpy().astype(self.dtype, copy=False), affine)
        # Some readers take the one, some the other.
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        name = f"{case_name(found.meta)}_{self.postfix}.nii.gz"
        write_nifti(self.output_dir / name, image)
        return dict(data)


def _whole_affine(found: MetaTensor) -> np.ndarray:
    """The affine (4, 4) of a map; of a 2D one that of its image's file, which alone says how a slice is tilted."""
    affine = found.affine.cpu().numpy()
    source = found.meta.get("filename_or_obj")
    if found.ndim == 3 and source and os.path.exists(source):
        own = Grid(tuple(found.shape[1:]), 1, affine)
        whole = read_grid(source)
        if grid_difference(own, whole) is None:
            return whole.affine
    return to_affine_nd(3, affine)
