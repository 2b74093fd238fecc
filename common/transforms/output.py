"""From the network's one tensor to what a user gets: a label map, a map a target, and the case's numbers.

None of these transforms writes files, so that they serve a bundle's inference, its evaluation and MONAI Label alike.
The usual order, where :class:`.restoring.RestoreGridd` brings all to the image's own grid::

    SplitOutputd(key="pred", num_classes=3, targets=targets)
    RestoreGridd(preprocessing, targets)
    MaskTargetd(targets=targets)
    CaseSummaryd(labels=labels, targets=targets)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform

from ..errors import BadInput
from ..metrics.uncertainty import foreground_entropy
from ..networks.reductions import reduce_to_case
from ..targets import check_targets, is_dense, structure_ids

__all__ = ["CaseSummaryd", "GeometricThicknessd", "MaskTargetd", "SplitOutputd", "voxel_spacing"]

Target = Mapping[str, Any]


def _inside(segmentation: torch.Tensor, structures: Sequence[int]) -> torch.Tensor:
    return torch.isin(segmentation, torch.as_tensor(structures, dtype=segmentation.dtype, device=segmentation.device))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def voxel_spacing(tensor: torch.Tensor) -> list[float]:
    """Size of a voxel in mm, one number an axis of a channel-first tensor; 1 where the tensor knows no affine."""
    dimensions = tensor.ndim - 1
    if not isinstance(tensor, MetaTensor):
        return [1.0] * dimensions
    return [float(size) for size in affine_to_spacing(tensor.affine, r=dimensions)]


class SplitOutputd(MapTransform):
    """Split the network's output of one case into segmentation logits and a map a target.

    The parts keep the output's meta data and its applied operations, so that ``Invertd`` can take each of them back. A
    target with one number a case (kind ``sum`` or ``mean``) is reduced here, on the grid the network worked on: a sum
    over voxels would change with the number of voxels once the map is resampled.

    Adds ``segmentation`` (num_classes, *spatial), ``entropy`` (a number, :func:`.uncertainty.foreground_entropy`),
    ``<target>_pred`` (1, *spatial) and, where the network also predicts
    log variances, ``<target>_std`` (1, *spatial); for kinds ``sum`` and ``mean`` also the number ``<target>_case``.

    Args:
        key: where the network's output lies: (num_classes + R, *spatial), or (num_classes + 2 R, *spatial) with log
            variances.
        num_classes: number of classes with the background; 0 for a network that only regresses.
        targets: the targets' descriptions, in the order of the channels.
        segmentation_key: where the logits go.
        image_key: the image whose meta data is used when the output carries none.

    Raises:
        BadInput: the number of channels is not what classes and targets ask for.
    """

    def __init__(
        self,
        key: str = "pred",
        num_classes: int = 2,
        targets: Sequence[Target] = (),
        segmentation_key: str = "segmentation",
        image_key: str = "image",
    ) -> None:
        super().__init__(key)
        self.key = key
        self.num_classes = num_classes
        self.targets = list(targets)
        self.segmentation_key = segmentation_key
        self.image_key = image_key

    def _with_meta(self, part: torch.Tensor, source: object) -> torch.Tensor:
        if not isinstance(source, MetaTensor):
            return part
        return MetaTensor(part, meta=dict(source.meta), applied_operations=list(source.applied_operations))

    def _reduce(self, target: Target, channel: torch.Tensor, logits: torch.Tensor) -> float:
        structures = structure_ids(target)
        probabilities = None
        if target["kind"] == "mean" and structures and self.num_classes:
            probabilities = torch.softmax(logits.double(), dim=0)[structures].sum(dim=0)[None, None]
        return float(reduce_to_case(channel[None].double(), target["kind"], probabilities))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        output = d[self.key]
        source = output if isinstance(output, MetaTensor) else d.get(self.image_key)
        channels = _plain(torch.as_tensor(output))
        count = len(self.targets)
        with_variance = count > 0 and len(channels) == self.num_classes + 2 * count
        if not with_variance and len(channels) != self.num_classes + count:
            raise BadInput(
                f"the network's output has {len(channels)} channels, expected {self.num_classes} classes + {count} "
                f"targets (or + {2 * count} with log variances): `labels` and `targets` must be those of the training."
            )
        logits = channels[: self.num_classes]
        if self.num_classes:
            d[self.segmentation_key] = self._with_meta(logits, source)
            d["entropy"] = foreground_entropy(logits)
        for index, target in enumerate(self.targets):
            name = target["name"]
            channel = channels[self.num_classes + index][None]
            d[f"{name}_pred"] = self._with_meta(channel, source)
            if with_variance:
                log_variance = channels[self.num_classes + count + index][None]
                d[f"{name}_std"] = self._with_meta(torch.exp(log_variance / 2), source)
            if not is_dense(target):
                d[f"{name}_case"] = self._reduce(target, channel, logits)
        return d


class MaskTargetd(MapTransform):
    """Keep a dense target's map only where it has a meaning: inside its structure in the predicted segmentation.

    A target's ``minimum`` (0 unless it says otherwise: no wall has a negative thickness; null for none) bounds its map.

    Args:
        targets: the targets' descriptions; those of one number a case are left alone.
        segmentation_key: the predicted label map (1, *spatial), on the grid of the maps; without it nothing is masked.
        mask: whether to set a map to 0 outside its structure.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        segmentation_key: str = "segmentation",
        mask: bool = True,
    ) -> None:
        super().__init__(segmentation_key, allow_missing_keys=True)
        self.targets = [target for target in targets if is_dense(target)]
        self.segmentation_key = segmentation_key
        self.mask = mask

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for target in self.targets:
            key, deviation_key = f"{target['name']}_pred", f"{target['name']}_std"
            if target.get("minimum", 0) is not None:
                d[key] = d[key].clamp_min(float(target.get("minimum", 0)))
            structures = structure_ids(target)
            if self.mask and structures and self.segmentation_key in d:
                inside = _inside(_plain(d[self.segmentation_key]), structures)
                for masked in (key, deviation_key):
                    if masked in d:
                        # A product would keep a NaN outside the structure.
                        d[masked] = torch.where(inside, d[masked], torch.zeros_like(d[masked]))
        return d


class CaseSummaryd(MapTransform):
    """Put the case's numbers into ``result``: a dict of plain numbers that JSON and MONAI Label take as it is.

    Example of a result::

        {"volumes": {"wall": {"value": 1.7, "unit": "mL"}},
         "thickness": {"unit": "mm", "structures": {"wall": {"mean": 2.1, "median": 2.0, "p5": 1.1, "p95": 3.4,
                                                             "voxels": 812}}},
         "severity": {"value": 0.4, "unit": ""}}

    In 2D ``volumes`` becomes ``areas`` in mm2. Numbers that do not exist, as the mean in a structure that was not
    found, are None. With a predicted standard deviation its mean is added as ``uncertainty``.

    Args:
        labels: label id (as a string) to name; the background is left out.
        targets: the targets' descriptions.
        segmentation_key: the predicted label map (1, *spatial) on the image's own grid; absent for a network that only
            regresses, and then volumes and structures stay empty.
        result_key: where the result goes.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        targets: Sequence[Target] = (),
        segmentation_key: str = "segmentation",
        result_key: str = "result",
    ) -> None:
        super().__init__(segmentation_key, allow_missing_keys=True)
        check_targets(targets)
        self.names = {int(label): name for label, name in labels.items() if int(label) != 0}
        self.targets = list(targets)
        self.segmentation_key = segmentation_key
        self.result_key = result_key

    @staticmethod
    def _statistics(values: torch.Tensor, deviations: torch.Tensor | None) -> dict[str, Any]:
        array = values.detach().cpu().numpy().astype(np.float64)
        if not array.size:
            return {"mean": None, "median": None, "p5": None, "p95": None, "voxels": 0}
        p5, median, p95 = (float(value) for value in np.percentile(array, (5, 50, 95)))
        statistics = {"mean": float(array.mean()), "median": median, "p5": p5, "p95": p95, "voxels": int(array.size)}
        if deviations is not None:
            statistics["uncertainty"] = float(deviations.double().mean())
        return statistics

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        segmentation = d.get(self.segmentation_key)
        result: dict[str, Any] = {}
        if segmentation is not None:
            spacing = voxel_spacing(segmentation)
            voxel_size = float(np.prod(spacing))
            segmentation = _plain(segmentation)
            in_space = len(spacing) == 3
            result["volumes" if in_space else "areas"] = {
                name: {
                    "value": int((segmentation == label).sum()) * (voxel_size / 1000 if in_space else voxel_size),
                    "unit": "mL" if in_space else "mm2",
                }
                for label, name in self.names.items()
            }
        for target in self.targets:
            name, unit = target["name"], target.get("unit", "")
            if not is_dense(target):
                result[name] = {"value": float(d[f"{name}_case"]), "unit": unit}
                continue
            structures: dict[str, Any] = {}
            if segmentation is not None:
                values, deviations = _plain(d[f"{name}_pred"]), d.get(f"{name}_std")
                for label in structure_ids(target) or list(self.names):
                    inside = segmentation == label
                    structures[self.names.get(label, str(label))] = self._statistics(
                        values[inside], None if deviations is None else _plain(deviations)[inside]
                    )
            result[name] = {"unit": unit, "structures": structures}
        d[self.result_key] = result
        return d


class GeometricThicknessd(MapTransform):
    """Replace a target's map by the thickness measured geometrically from the predicted segmentation.

    This is what a user without a regression network would do, and the comparison a regression has to win. Where the
    wall does not close there is no measurement: ``<target>_measured`` (1, *spatial) says where there is.

    Args:
        target: name of the thickness target; the map goes to ``<target>_pred``.
        structure: label id of the wall.
        inner: label ids of the cavity that the wall encloses.
        slicewise: whether to measure slice by slice instead of in space.
        axis: of the file, through the slices.
        smallest_cavity: cavities of fewer voxels are left out.
        segmentation_key: the predicted label map (1, *spatial) on the image's own grid.
    """

    OPTIONS = ("slicewise", "axis", "smallest_cavity")

    def __init__(
        self,
        target: str,
        structure: int,
        inner: Sequence[int],
        slicewise: bool = False,
        axis: int = -1,
        smallest_cavity: int = 1,
        segmentation_key: str = "segmentation",
    ) -> None:
        # Imported when it is made, since that module imports this one; not on a call, when MONAI Label has unloaded
        # the modules of a packed bundle.
        from ..data.thickness import wall_thickness

        super().__init__(segmentation_key)
        self.measure = wall_thickness
        self.target = target
        self.structure = structure
        self.inner = list(inner)
        self.slicewise = slicewise
        self.axis = axis
        self.smallest_cavity = smallest_cavity
        self.segmentation_key = segmentation_key

    @staticmethod
    def measurable(targets: Sequence[Target]) -> Target:
        """The first target whose description says which labels are the cavity inside its wall.

        Raises:
            BadInput: there is none.
        """
        found = next((target for target in targets if is_dense(target) and target.get("inner")), None)
        if found is None:
            raise BadInput(
                "targets: none says which labels are the cavity inside its wall, so no thickness can be measured in a "
                'mask. Add `inner` to its description, such as "inner": [1].'
            )
        return found

    @classmethod
    def arguments(cls, target: Target) -> dict[str, Any]:
        """The arguments to measure a target just as its description says that its reference was.

        Raises:
            BadInput: its structure is not one label.
        """
        structures = structure_ids(target)
        if len(structures) != 1:
            raise BadInput(
                f"targets: {target['name']} is measured in the labels {structures}; expected one label id, its wall, "
                "as its `structure`."
            )
        options = {key: target[key] for key in cls.OPTIONS if key in target}
        return {"target": target["name"], "structure": structures[0], "inner": target["inner"], **options}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        segmentation = d[self.segmentation_key]
        thickness = self.measure(
            _plain(segmentation)[0].cpu().numpy(),
            spacing=voxel_spacing(segmentation),
            wall=self.structure,
            inner=self.inner,
            slicewise=self.slicewise,
            axis=self.axis,
            smallest_cavity=self.smallest_cavity,
        )
        measured = torch.as_tensor(np.ascontiguousarray(thickness), dtype=torch.float32, device=segmentation.device)[
            None
        ]
        if isinstance(segmentation, MetaTensor):
            measured = MetaTensor(measured, meta=dict(segmentation.meta))
        d[f"{self.target}_pred"], d[f"{self.target}_measured"] = measured, measured > 0
        return d
