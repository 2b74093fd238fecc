"""MONAI Label's folder of images and labels, which refuses labels that nobody could learn from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag

from common.data.grids import grid_difference, is_nifti, read_grid
from common.errors import BadInput
from common.transforms import LoadCased

__all__ = ["CheckedDatastore"]

MAPS = ("_original", "_final")  # how the tags of a target's maps end


class CheckedDatastore(LocalDatastore):
    """A folder of images with their labels.

    Args:
        datastore_path: the folder.
        labels: ids of the structures by name.
        kwargs: everything else that MONAI Label's datastore takes.
    """

    def __init__(self, datastore_path: str, labels: Mapping[str, int], **kwargs: Any) -> None:
        self.labels = dict(labels)
        super().__init__(datastore_path, **kwargs)

    @property
    def _datastore(self) -> LocalDatastoreModel:
        return self._model

    @_datastore.setter
    def _datastore(self, model: LocalDatastoreModel) -> None:
        # MONAI Label puts a record that it has read again in the place of the former one before it says to it which
        # folder it is of: whoever asks for an image in between, such as the scoring, would get a path to nowhere.
        model.base_path = self._datastore_path
        self._model = model

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label or a map of an image.

        Raises:
            HTTPException: there is no such image, the file can't be read, is on another grid than the image, or names
                structures that there are not. What was saved before stays.
        """
        image = self.get_image_uri(image_id)
        if not image:
            raise HTTPException(404, f"There is no image {image_id!r} in {self._datastore_path}.")
        with TemporaryDirectory() as folder:
            try:
                if label_tag.endswith(MAPS):
                    difference = grid_difference(read_grid(image), read_grid(label_filename))
                    if difference:
                        raise BadInput(f"image and map are not on one grid: {difference}")
                else:
                    label_filename = self._by_name(label_filename, (label_info or {}).get("label_info") or [], folder)
                    ids = {str(index): name for name, index in {"background": 0, **self.labels}.items()}
                    LoadCased(("label",), labels=ids)({"image": image, "label": label_filename})
            except BadInput as error:
                raise HTTPException(400, f"The label of {image_id!r} was not saved: {error}.") from error
            return super().save_label(image_id, label_filename, label_tag, label_info)

    def _by_name(self, path: str, segments: Sequence[Mapping[str, Any]], folder: str) -> str:
        """A label with the ids of the structures, from one whose ids are the order of a viewer's segments."""
        unknown = [segment["name"] for segment in segments if segment["name"] not in self.labels]
        if unknown:
            raise BadInput(f"it has the segments {unknown}; expected {list(self.labels)}")
        ids = {int(segment["idx"]): self.labels[segment["name"]] for segment in segments}
        if all(found == wanted for found, wanted in ids.items()):
            return path
        if not is_nifti(path):
            raise BadInput(f"its segments are in another order than {list(self.labels)}; send NIfTI, or reorder them")
        label: Any = nib.load(path)
        order = np.asarray(label.dataobj)
        result = np.zeros(order.shape, dtype=np.uint8 if max(self.labels.values()) < 256 else np.int16)
        for found, wanted in ids.items():
            result[order == found] = wanted
        target = Path(folder) / os.path.basename(path)
        nib.save(nib.Nifti1Image(result, label.affine), target)
        return str(target)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """The labelled images by name: where links lead to says nothing of the folder they are in."""
        labels = self._datastore.filter_by_tag(DefaultLabelTag.FINAL)
        images, finals = self._datastore.image_path(), self._datastore.label_path(DefaultLabelTag.FINAL)
        return [
            {
                "image": os.path.normpath(os.path.join(images, f"{name}{item.image.ext}")),
                "label": os.path.normpath(os.path.join(finals, f"{name}{item.labels[DefaultLabelTag.FINAL].ext}")),
            }
            for name, item in sorted(labels.items())
        ]
