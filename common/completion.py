"""Complete the labels of partly labelled cases with the predictions of single-organ teachers, as files to look at.

Huang et al., "Multi-organ segmentation via co-training weight-averaged models from few-organ datasets", MICCAI 2020,
begin with it. What people have labelled stays as it is. Of a structure that a case is not annotated for, a voxel is
taken where its teacher gives it more than 1/2; where several do, the highest probability wins, of equal ones the first
structure. A voxel of a structure that the case is annotated for is never given to another one.

    python -m common complete --datalist DATA/datalist.json --teachers liver=liver/model.pt spleen=spleen/model.pt \\
        --output DATA/completed

The output is a folder with ``labels/<case>.nii.gz`` and a ``datalist.json``, whose training entries keep ``label`` and
``annotated`` and name the new file as ``completed``. A file that is there is not made again, so a run that was stopped
goes on, and what somebody has corrected by hand stays; delete a file to have it made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Activationsd, Compose, Invertd
from torch import nn
from tqdm import tqdm

from .data.checks import check_cases, check_output
from .data.datalist import SECTIONS, case_name, load_section, read_datalist
from .data.grids import read_grid
from .data.thickness import seen_from
from .engines.organ_teachers import read_organ_teacher, teachers_in_order
from .errors import BadInput
from .files import write_atomically, write_nifti
from .inferers import SlidingWindow
from .networks import read_weights, state_digest
from .processes import process_share
from .provenance import file_digest
from .transforms import LoadCased, SplitOutputd, preprocessing

__all__ = ["add_arguments", "complete", "completed_cases", "main", "merge_predictions"]

_RECORD = "completion.json"


def merge_predictions(
    label: np.ndarray, annotated: Sequence[int], probabilities: Mapping[int, np.ndarray]
) -> np.ndarray:
    """A completed label map.

    Args:
        label: the reference, (*spatial), class ids; 0 elsewhere than in the ``annotated`` structures.
        annotated: the ids that it knows.
        probabilities: of each other structure, (*spatial), by its id.

    Returns:
        (*spatial), uint8 or the label's type where that is larger.
    """
    ids = np.array(sorted(set(probabilities) - set(annotated)))
    completed = label.astype(np.promote_types(label.dtype, np.uint8))
    if ids.size:
        stacked = np.stack([probabilities[number] for number in ids])
        claimed = (stacked.max(0) > 0.5) & (label == 0)
        completed[claimed] = ids[stacked.argmax(0)][claimed]
    return completed


class _Teacher:
    """Predicts one organ on the image file's own grid, with the preprocessing that the teacher was trained with."""

    def __init__(self, path: str, organ: str, device: torch.device, amp: bool | str) -> None:
        network, settings = read_organ_teacher(path, organ)
        self.network: nn.Module = network.to(device)
        self.prepare = preprocessing(
            ["image"],
            channels=settings["channels"],
            spacing=settings["spacing"],
            intensity=settings["intensity"],
            orientation=settings.get("orientation", "RAS"),
        )
        self.inferer = SlidingWindow(settings["patch_size"], overlap=0.5, amp=amp)
        self.finish = Compose(
            [
                SplitOutputd("pred", 2),
                Activationsd("segmentation", softmax=True),
                Invertd("segmentation", self.prepare, orig_keys="image", nearest_interp=False, to_tensor=True),
            ]
        )

    @torch.no_grad()
    def __call__(self, image: str | Sequence[str]) -> np.ndarray:
        """The organ's probability, (*spatial)."""
        case = self.prepare({"image": image})
        case["pred"] = self.inferer(case["image"][None].as_tensor(), self.network)[0]
        return self.finish(case)["segmentation"][1].cpu().numpy()


def complete(
    datalist: str | os.PathLike[str],
    teachers: Mapping[str, str],
    output: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    amp: bool | str = "auto",
) -> Path:
    """Complete the training cases of a datalist; the processes of a distributed run share the cases.

    Args:
        datalist: JSON file; it must have ``labels``.
        teachers: weights of each structure's teacher by its name, as the teacher bundle wrote them.
        output: folder for the completed labels and the new datalist.
        device: where the teachers predict.
        amp: see :func:`common.engines.precision`.

    Returns:
        The new datalist.

    Raises:
        BadInput: the datalist, a case or a teacher can't be used, or the folder has labels that others completed.
    """
    content, output = read_datalist(datalist), check_output(output).resolve()
    labels = {str(number): str(name) for number, name in content.get("labels", {}).items()}
    if not labels:
        raise BadInput(
            f"datalist {datalist}: it has no `labels`, expected names by id. Add them, so that teachers can be named."
        )
    paths = teachers_in_order(teachers, labels)
    cases = load_section(content, "training")
    check_cases(cases, labels)
    _check_names(cases)
    rank, processes = process_share()
    if rank == 0:
        _check_record(output, _origins(teachers, labels, cases))
    _wait(processes)
    unknown = [case for case in cases if _unknown(case, paths)]
    waiting = [case for case in unknown[rank::processes] if not _file(case, output).exists()]
    if waiting:
        predict = {
            number: _Teacher(path, labels[str(number)], torch.device(device), amp) for number, path in paths.items()
        }
        for case in tqdm(waiting, desc="completing labels", unit="case", disable=None):
            _complete_case(case, labels, predict, _file(case, output))
    _wait(processes)
    if rank == 0:
        _write_datalist(content, cases, paths, output)
    _wait(processes)
    return output / "datalist.json"


def completed_cases(
    datalist: str | os.PathLike[str],
    teachers: Mapping[str, str] | None,
    output: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    amp: bool | str = "auto",
) -> list[dict[str, Any]]:
    """The training cases with their completed labels as ``label``, for a training; completes what is not yet.

    Args:
        datalist: JSON file; without teachers one that :func:`complete` wrote.
        teachers: as in :func:`complete`; None to take the completed labels that the datalist names.
        output: the completed labels go to a folder in it, another one for other teachers, labels or cases.
        device: as in :func:`complete`.
        amp: as in :func:`complete`.

    Returns:
        Entries with ``image``, ``label``, ``completed`` and, where not all of it is people's work, ``annotated``.
    """
    if teachers is not None:
        content = read_datalist(datalist)
        cases = load_section(content, "training")
        origins = _origins(teachers, content.get("labels", {}), cases)
        digest = hashlib.sha256(json.dumps(origins, sort_keys=True).encode()).hexdigest()
        datalist = complete(datalist, teachers, Path(output) / digest[:12], device, amp)
    content = read_datalist(datalist)
    if not any("completed" in entry for entry in content.get("training", [])):
        raise BadInput(
            f"datalist {datalist}: its training entries have no `completed` labels. Give `teacher_paths`, a mapping "
            "from organ to weights, or a datalist that `python -m common complete` wrote."
        )
    return [{**case, "label": case["completed"]} for case in load_section(content, "training", ("image", "completed"))]


def _unknown(case: Mapping[str, Any], structures: Iterable[int]) -> list[int]:
    """The structures that a case is not annotated for."""
    annotated = case.get("annotated")
    return [] if annotated is None else [number for number in structures if number not in map(int, annotated)]


def _file(case: Mapping[str, Any], output: Path) -> Path:
    return output / "labels" / f"{case_name(case)}.nii.gz"


def _check_names(cases: Sequence[Mapping[str, Any]]) -> None:
    names = [case_name(case) for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(
            f"two cases are called {', '.join(twice[:5])}; their completed labels would overwrite each other. Rename "
            "one image file."
        )


def _digests(teachers: Mapping[str, str]) -> dict[str, str]:
    return {organ: state_digest(read_weights(path)) for organ, path in teachers.items()}


def _origins(
    teachers: Mapping[str, str], labels: Mapping[str, str], cases: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What completed labels are made of: teachers, names by id, and of each case its label and what that speaks of."""
    own = {
        case_name(case): {
            "label": file_digest(case["label"]),
            "annotated": case.get("annotated"),
        }
        for case in cases
    }
    return {"teachers": _digests(teachers), "labels": dict(labels), "cases": own}


def _check_record(output: Path, origins: Mapping[str, Any]) -> None:
    """A completed label must not stand for what other teachers, other names or another label would give."""
    record = output / _RECORD
    if record.exists():
        earlier = json.loads(record.read_text())
        changed = [
            *(what for what in ("teachers", "labels") if earlier.get(what) != origins[what]),
            *(name for name, case in earlier.get("cases", {}).items() if origins["cases"].get(name, case) != case),
        ]
        if changed:
            raise BadInput(
                f"{output}: the labels there were completed from something else ({', '.join(changed[:5])}; see "
                f"{_RECORD}). Choose another folder, or delete this one."
            )
        origins = {**origins, "cases": {**earlier.get("cases", {}), **origins["cases"]}}
    write_atomically(record, json.dumps(origins, indent=1) + "\n")


def _complete_case(
    case: Mapping[Any, Any], labels: Mapping[str, str], predict: Mapping[int, _Teacher], path: Path
) -> None:
    label: MetaTensor = LoadCased(["label"], labels=labels)(case)["label"]
    probabilities = {number: predict[number](case["image"]) for number in _unknown(case, predict)}
    completed = merge_predictions(label[0].cpu().numpy(), [int(n) for n in case["annotated"]], probabilities)
    write_nifti(path, nibabel.Nifti1Image(completed, read_grid(case["label"]).affine))


def _write_datalist(
    content: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], paths: Mapping[int, str], output: Path
) -> None:
    folder = Path(content["folder"])
    new = {key: value for key, value in content.items() if key not in ("folder", "path")}
    for section in SECTIONS:
        for entry in new.get(section, []):
            for key in entry.keys() - {"annotated", "patient"}:
                entry[key] = seen_from(output, folder, entry[key])
    for entry, case in zip(new["training"], cases, strict=True):
        path = _file(case, output) if _unknown(case, paths) else case["label"]
        entry["completed"] = os.path.relpath(path, output)
    write_atomically(output / "datalist.json", json.dumps(new, indent=1) + "\n")


def _wait(processes: int) -> None:
    if processes > 1:
        torch.distributed.barrier()


def _teachers(pairs: Sequence[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(found.values()):
        raise BadInput(
            f"--teachers {' '.join(pairs)}: expected NAME=WEIGHTS each, such as liver=liver/models/model.pt."
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common complete``."""
    parser.add_argument("--datalist", type=Path, required=True, help="JSON file with the partly labelled cases")
    parser.add_argument("--teachers", nargs="+", required=True, metavar="NAME=WEIGHTS", help="one for each structure")
    parser.add_argument("--output", type=Path, required=True, help="folder for the labels and the new datalist")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:0")


def main(options: argparse.Namespace) -> int:
    """Complete the labels and say where they are."""
    path = complete(options.datalist, _teachers(options.teachers), options.output, options.device)
    print(f"{path}: look at the labels beside it; where one is wrong, correct it in place before you train with it.")
    return 0
