"""Load a case's files and check them, so that what is wrong with a file is said with its name."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.transforms import LoadImage, MapTransform

from ..data.datalist import case_name
from ..data.grids import (
    Grid,
    check_right_angles,
    describe_error,
    grid_difference,
    is_nifti,
    plane_affine,
    read_grid,
)
from ..errors import BadInput
from ..targets import dense_names, is_dense

__all__ = [
    "LoadCased",
    "LoadReferencesd",
    "case_loader",
    "check_label",
    "check_values",
    "image_loader",
    "read_image",
    "read_map",
]

# What nibabel and ITK say of a file that is shorter than its header promises.
_CUT_SHORT = ("ended before the end-of-stream marker", " bytes, got ", "fread got only", " bytes but received ")
LABEL_ROUNDING = 1e-3  # labels stored with a scale factor come back a little off their ids
_LARGEST = 1e14  # intensity whose squares, a billion of them, have a sum in float32


def image_loader(**options: Any) -> LoadImage:
    """MONAI's ``LoadImage`` for images without their meta data, with ``options`` of it."""
    with warnings.catch_warnings():
        # MONAI tries all its readers, and warns twice of a decoder for GPUs that none of the files needs.
        warnings.filterwarnings("ignore", message=".*nvImageCodec.*")
        logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
        return LoadImage(image_only=True, **options)


class LoadCased(MapTransform):
    """Load an entry's image, label and regression targets as channel-first tensors, and check them.

    The key ``image`` becomes a float32 ``MetaTensor`` (C, *spatial); ``label`` an integer one (1, *spatial); a dense
    target a float32 one (1, *spatial); a case-level target a float32 scalar tensor, NaN where the entry has none. A
    dense target that a labelled entry lacks is a map of its ``missing`` value. Other keys are left as they are; with
    ``completed`` among them, the label may hold more than the entry is ``annotated`` for. NIfTI is read by nibabel, all
    else (NRRD, MHA, a folder with a DICOM series) by ITK; several files for one image are its channels.

    Args:
        keys: what to load: ``image``, ``label``, names of targets.
        labels: label ids and names; ids in a file must be among them. None allows any.
        channels: channels that the image must have. None allows any.
        targets: descriptions of the regression targets.
        allow_missing_keys: whether an entry may lack any key but ``image``, as unlabelled ones do.
        dimensions: spatial axes that the image must have. None allows any.

    Raises:
        BadInput: a file can't be read, holds NaN, infinite or absurdly large voxels, has another number of channels or
            axes, label ids that are not in ``labels`` or not among those the case is ``annotated`` for, or lies on
            another grid than the image.
    """

    def __init__(
        self,
        keys: Sequence[str] = ("image", "label"),
        labels: Mapping[str, str] | None = None,
        channels: int | None = None,
        targets: Sequence[Mapping[str, Any]] = (),
        allow_missing_keys: bool = True,
        dimensions: int | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.dimensions = dimensions
        described = {target["name"]: target for target in targets}
        unknown = [key for key in self.keys if key not in ("image", "label") and key not in described]
        if unknown:
            raise BadInput(f"keys {unknown} are neither `image`, `label` nor among the targets {list(described)}")
        self.labels = None if labels is None else {int(key): name for key, name in labels.items()}
        self.channels = channels
        self.targets = {key: described[key] for key in self.keys if key in described}
        self.load = case_loader()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load what ``data`` names; see the class."""
        case = dict(data)
        if case.get("image") is None:
            raise BadInput(f"a case has no `image`; found the keys {sorted(map(str, case))}")
        if "fault" in case:
            raise BadInput(case["fault"])
        image_path = case["image"]
        if "image" in self.keys:
            case["image"] = self._image(image_path)
            case["image"].meta["case_name"] = case_name(data)  # results know their case by their meta data alone
            grid = _grid(case["image"])
        else:
            grid = read_grid(image_path)
        if "label" in self.keys and self._present(case, "label", image_path):
            # What predictions have completed holds more than the case is annotated for.
            annotated = None if case.get("completed") else case.get("annotated")
            convert = partial(check_label, labels=self.labels, annotated=annotated)
            case["label"] = self._map("label", case["label"], grid, image_path, convert)
        for name, target in self.targets.items():
            case[name] = self._target(target, case, grid, image_path)
            if case[name] is None:
                del case[name]
        return case

    def _present(self, case: Mapping[Hashable, Any], key: str, image_path: Any) -> bool:
        if case.get(key) is not None:
            return True
        if not self.allow_missing_keys:
            raise BadInput(f"case {case_name(image_path)} has no `{key}`; found the keys {sorted(map(str, case))}")
        return False

    def _image(self, path: Any) -> MetaTensor:
        image = read_image(self.load, path)
        if self.dimensions is not None and image.ndim - 1 != self.dimensions:
            raise BadInput(
                f"{_path(path)} has the shape {tuple(image.shape[1:])}; the network takes images of {self.dimensions} "
                "dimensions"
            )
        if self.channels is not None and image.shape[0] != self.channels:
            raise BadInput(f"image {_path(path)} has {image.shape[0]} channel(s); the network takes {self.channels}")
        return image

    def _map(self, key: str, path: Any, grid: Grid, image_path: Any, convert: Any) -> MetaTensor:
        value = read_map(self.load, key, path)
        difference = grid_difference(grid, _grid(value))
        if difference:
            raise BadInput(f"image {_path(image_path)} and {key} {_path(path)} are not on one grid: {difference}")
        value = convert(value, path)
        # The last digits of two headers differ; resampled by their own, the two would drift apart.
        affine = plane_affine(grid.affine) if value.ndim == 3 else grid.affine
        value.affine = torch.as_tensor(affine, dtype=torch.float64)
        return value

    def _target(self, target: Mapping[str, Any], case: Mapping[Hashable, Any], grid: Grid, image_path: Any) -> Any:
        name, value = target["name"], case.get(target["name"])
        if not is_dense(target):
            try:
                return torch.tensor(float("nan") if value is None else float(value), dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise BadInput(f"case {case_name(image_path)}: `{name}` is {value!r}; expected a number") from error
        missing = float(target.get("missing", 0))
        if value is None:
            label = case.get("label")
            self._present(case, name, image_path)  # raises where nothing may be missing
            if not isinstance(label, MetaTensor):
                return None
            return torch.full_like(label, missing, dtype=torch.float32)

        def convert(found: MetaTensor, path: Any) -> MetaTensor:
            return check_values(found, name, path, missing)

        return self._map(name, value, grid, image_path, convert)


def read_image(load: LoadImage, path: Any) -> MetaTensor:
    """Read an image as float32 (C, *spatial).

    Args:
        load: a :func:`case_loader`.
        path: a file, a folder with a DICOM series, or a list of files, one a channel.

    Raises:
        BadInput: it can't be read, its axes are not at right angles, or it holds NaN, infinite or far too large voxels.
    """
    image = cast(MetaTensor, _read(load, "image", path).to(torch.float32))
    broken = int((~torch.isfinite(image)).sum())
    if broken:
        raise BadInput(
            f"image {_path(path)} has {broken} NaN or infinite voxels of {image.numel()}; repair the file", kind="nan"
        )
    largest = max(map(abs, map(float, torch.aminmax(image.as_tensor()))))
    if largest > _LARGEST:
        raise BadInput(
            f"image {_path(path)} has intensities up to {largest:.3g}, which can't be normalised; correct the file, "
            "such as the scale factor in its header",
            kind="units",
        )
    return image


def read_map(load: LoadImage, key: str, path: Any) -> MetaTensor:
    """Read a label or a target's map, (1, *spatial); the arguments are those of :func:`read_image`.

    Raises:
        BadInput: it can't be read, its axes are not at right angles, or it has several channels.
    """
    value = _read(load, key, path)
    if value.shape[0] != 1:
        raise BadInput(f"{key} {_path(path)} has {value.shape[0]} channels; expected one map", kind="channels")
    return value


def check_label(
    value: MetaTensor, path: Any, labels: Mapping[int, str] | None = None, annotated: Sequence[int] | None = None
) -> MetaTensor:
    """A label map as whole numbers, uint8 or int16, in its own shape.

    Args:
        value: as read.
        path: of its file, for messages.
        labels: names by id; None allows any.
        annotated: the ids that the label speaks of; None for all.

    Raises:
        BadInput: it holds something else than label ids, or others than these.
    """
    array = value.as_tensor().numpy()
    rounded = np.round(array)
    finite = bool(np.isfinite(array).all())
    if not finite or np.abs(array - rounded).max(initial=0) > LABEL_ROUNDING:
        raise BadInput(
            f"label {_path(path)} holds values that are not whole numbers; expected label ids",
            kind="labels" if finite else "nan",
        )
    low, high = int(rounded.min(initial=0)), int(rounded.max(initial=0))
    if low < 0 or high > np.iinfo(np.int16).max:
        raise BadInput(f"label {_path(path)} holds ids from {low} to {high}; expected 0 to K - 1", kind="labels")
    small = max(high, *(labels or [0])) <= np.iinfo(np.uint8).max
    # Counting is many times faster than sorting, which np.unique would do.
    found = np.flatnonzero(np.bincount(rounded.astype(np.int16).ravel())).tolist()
    unknown = [identity for identity in found if identity not in labels] if labels is not None else []
    if labels is not None and unknown:
        expected = ", ".join(f"{identity} {name}" for identity, name in labels.items())
        raise BadInput(
            f"label {_path(path)} holds the ids {found[:20]}; {unknown[:20]} are not in `labels` ({expected})",
            kind="labels",
        )
    if annotated is not None and not {0, *map(int, annotated)}.issuperset(found):
        raise BadInput(
            f"label {_path(path)} holds the ids {found[:20]}, but the case's `annotated` is {list(annotated)}: add "
            "the ids that the label speaks of, or take the others out of the file",
            kind="annotated",
        )
    return cast(MetaTensor, value.round().to(torch.uint8 if small else torch.int16))


def check_values(value: MetaTensor, name: str, path: Any, missing: float) -> MetaTensor:
    """A dense target's map as float32, in its own shape.

    Args:
        value: as read.
        name: of the target.
        path: of its file, for messages.
        missing: the number that says "no value here".

    Raises:
        BadInput: it holds NaN or infinite voxels, and these are not what says so.
    """
    value = cast(MetaTensor, value.to(torch.float32))
    broken = int((~torch.isfinite(value)).sum()) if np.isfinite(missing) else 0
    if broken:
        raise BadInput(
            f"{name} {_path(path)} has {broken} NaN or infinite voxels; write {missing:g} (the target's `missing`) "
            "there",
            kind="nan",
        )
    return value


class LoadReferencesd(MapTransform):
    """Load what predictions are compared with as it is: ``label`` as ``reference``, each dense target's map as
    ``reference_<target>``, float32 ``MetaTensor`` (C, *spatial). A case may lack any; the paths stay where they are.

    Args:
        targets: descriptions of the regression targets.

    Raises:
        BadInput: when called, if a file can't be read.
    """

    def __init__(self, targets: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(["label", *dense_names(targets)], allow_missing_keys=True)
        self.load = case_loader()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load what ``data`` names; see the class."""
        case = dict(data)
        for key in self.key_iterator(data):
            value = _read(self.load, key, data[key])
            if key == "label":
                case["reference"] = _whole_numbers(value)
            else:
                case[f"reference_{key}"] = value
        return case


def _whole_numbers(value: MetaTensor) -> MetaTensor:
    """Label ids as they are meant, where a program has scaled them to floats and back, as :func:`check_label` does."""
    rounded = cast(MetaTensor, value.round())
    return rounded if float((value - rounded).abs().max()) <= LABEL_ROUNDING else value


def case_loader() -> LoadImage:
    """What reads a case's files: channel first, with the few keys of a header that are of use."""
    # Simple keys: the other fields of a header are of no use later, and each transform would copy them.
    return image_loader(ensure_channel_first=True, simple_keys=True)


def _read(load: LoadImage, key: str, path: Any) -> MetaTensor:
    first = path if isinstance(path, (str, os.PathLike)) else path[0]
    # A case is known by its image; only other files need a word.
    what = str(first) if key == "image" else f"{key} {first}"
    if not os.path.exists(first):
        raise BadInput(f"{what} does not exist", kind="missing")
    grid = read_grid(path)
    reader = NibabelReader() if is_nifti(first) else ITKReader()
    try:
        value = _own_rank(load(path, reader=reader))
    except Exception as error:
        raise BadInput(
            f"{what} can't be read ({describe_error(error)}); it is truncated, damaged or no image: copy it again",
            kind="truncated" if any(words in str(error) for words in _CUT_SHORT) else "unreadable",
        ) from error
    if value.ndim == 4:
        # ITK's reader knows no slice thickness, and takes the stack to be at a right angle to its slices. MONAI's takes
        # an affine of NIfTI for another one where its sides aren't the voxel size to the last digit.
        value.affine = torch.as_tensor(grid.affine, dtype=torch.float64)
    check_right_angles(value.affine.cpu().numpy(), what)
    return value


def _path(path: Any) -> str:
    return os.fspath(path if isinstance(path, (str, os.PathLike)) else path[0])


def _own_rank(value: MetaTensor) -> MetaTensor:
    if value.ndim == 3:
        value.affine = torch.as_tensor(plane_affine(value.affine.cpu().numpy()), dtype=torch.float64)
    return value


def _grid(value: MetaTensor) -> Grid:
    return Grid(tuple(value.shape[1:]), int(value.shape[0]), value.affine.cpu().numpy().astype(float))
