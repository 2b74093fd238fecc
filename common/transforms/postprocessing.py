"""The chains of transforms after the network: to monitor a training, to evaluate, and to write results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.transforms import AsDiscreted, Compose, InvertibleTransform, KeepLargestConnectedComponentd

from ..switches import is_on
from ..targets import dense_names
from .loading import LoadReferencesd
from .output import CaseSummaryd, GeometricThicknessd, MaskTargetd, SplitOutputd
from .restoring import RestoreGridd
from .saving import SaveNiftid

__all__ = ["load_references", "monitor_postprocessing", "postprocessing"]

Target = Mapping[str, Any]


def monitor_postprocessing(num_classes: int, targets: Sequence[Target] = ()) -> Compose:
    """Label map and target maps on the network's own grid: cheap, for the validation during a training."""
    steps: list[Callable] = [SplitOutputd("pred", num_classes, targets)]
    if num_classes:
        steps.append(AsDiscreted("segmentation", argmax=True))
    return Compose(steps)


def load_references(targets: Sequence[Target] = ()) -> LoadReferencesd:
    """Load the files to compare with as they are, under ``reference`` and ``reference_<target>``."""
    return LoadReferencesd(targets)


def postprocessing(
    preprocessing: InvertibleTransform,
    labels: Mapping[str, str],
    targets: Sequence[Target] = (),
    segments: bool = True,
    mask: bool = True,
    geometric: Mapping[str, Any] | None = None,
    output_dir: str | None = None,
    largest_component: bool = False,
    warn: Callable | None = None,
) -> Compose:
    """From the network's output to label map, target maps and numbers on the input's own grid.

    Args:
        preprocessing: what was done to the image, to be undone.
        labels: names of the classes by id.
        targets: regression targets in the order of the network's channels.
        segments: whether the network's output begins with segmentation logits.
        mask: whether a target's map is set to 0 outside its structure.
        geometric: measure a thickness in the predicted mask instead of reading the network's map: ``target``,
            ``structure``, ``inner``, ``slicewise``, ``axis`` and ``smallest_cavity`` of
            :class:`GeometricThicknessd`. The network then has no channel for it.
        output_dir: write ``<case>_seg.nii.gz`` and ``<case>_<target>.nii.gz`` there; None writes nothing.
        largest_component: keep only the largest connected component of each structure, voxels touching at a corner
            being connected, and give the others to the background. Only where each structure is known to be one piece.
        warn: a :class:`.familiarity.CaseWarningsd`; None for no warnings.
    """
    channels = [target for target in targets if geometric is None or target["name"] != geometric["target"]]
    steps: list[Callable] = [
        SplitOutputd("pred", len(labels) if segments else 0, channels),
        RestoreGridd(preprocessing, channels),
    ]
    if segments and is_on(largest_component, "largest_component"):
        steps.append(KeepLargestConnectedComponentd("segmentation", is_onehot=False))
    if geometric is not None:
        steps.append(GeometricThicknessd(**geometric))
    steps += [MaskTargetd(targets, mask=mask), CaseSummaryd(labels, targets), *([] if warn is None else [warn])]
    if output_dir is not None:
        if segments:
            steps.append(SaveNiftid("segmentation", output_dir, "seg", "uint8" if len(labels) <= 256 else "int16"))
        steps += [SaveNiftid(f"{name}_pred", output_dir, name, "float32") for name in dense_names(targets)]
    return Compose(steps)
