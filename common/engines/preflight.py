"""What a run does before its first step: settle the process, and find bad input while it costs nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.utils import set_determinism

from ..data.checks import check_cases, check_labels, check_output
from ..data.datalist import load_section, read_datalist
from ..errors import BadInput, report_plainly
from ..targets import check_targets
from .allocator import keep_pages
from .configuration import read_json_words
from .occupancy import occupy

__all__ = ["check_evaluation", "preflight", "start"]

logger = logging.getLogger(__name__)


def start(seed: int | None, device: str | torch.device | None = None) -> None:
    """Settle the process: plain errors, the command line's null, true and false, random state, allocator, a quiet log.

    Args:
        seed: base of all random states; None leaves them as they are.
        device: the device of the run; the allocator is only tuned for a CPU.

    Raises:
        BadInput: ``device`` names a GPU where none can be used, or an option was given as ``None``.
    """
    report_plainly()
    read_json_words()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*TF32.*|.*lr_scheduler.step.*|.*torch.jit.*|.*nvImageCodec.*")
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    if seed is not None:
        set_determinism(int(seed))
    kind = torch.device(device or "cpu").type
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device: {device!r} was asked for, but torch sees no GPU; use --device cpu.")
    if kind == "cpu":
        keep_pages()


def preflight(
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    datalist: str,
    labels: Mapping[str, str],
    channels: int,
    output_dir: str,
    ckpt_dir: str,
    unlabeled: Sequence[Mapping[str, Any]] = (),
    targets: Sequence[Mapping[str, Any]] = (),
    divisor: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
) -> None:
    """Check the input of a training before it starts, and log what was found.

    Args:
        training: labelled entries.
        validation: entries of the validation; may be empty.
        datalist: where they come from; its ``labels`` must be those of the config, and its ``testing`` section must
            share no patient and no image with the training. Not read when it does not exist, as when MONAI Label
            gives the entries.
        labels: names of the classes by id, background as ``"0"``.
        channels: number of the image's channels.
        output_dir: must be writable, and no other training may be writing there.
        ckpt_dir: likewise.
        unlabeled: entries without labels.
        targets: regression targets.
        divisor: what every side of the patch must be divisible by.
        patch_size: size of the crops in voxels.

    Raises:
        BadInput: with everything that was found.
    """
    folders = [check_output(output_dir, "output_dir"), check_output(ckpt_dir, "ckpt_dir")]
    if not training:
        raise BadInput("the section 'training' is empty; at least one labelled case is needed.")
    check_targets(targets, labels)
    for target in targets:
        if not any(entry.get(target["name"]) is not None for entry in training):
            raise BadInput(
                f"`targets` names {target['name']!r}, but no training case of {datalist} has that key: nothing to "
                "learn it from."
            )
    testing = _check_datalist(datalist, labels)
    if divisor is not None and patch_size is not None:
        wrong = [size for size, by in zip(patch_size, divisor, strict=False) if size % by]
        if len(patch_size) != len(divisor) or wrong:
            raise BadInput(
                f"patch_size: {list(patch_size)} does not fit the network, whose strides need sides divisible by "
                f"{list(divisor)}. Choose another patch_size, or other strides."
            )
    check_cases([*training, *unlabeled], labels, channels, targets, patch_size, validation, testing)
    for folder in folders:
        occupy(folder)
    logger.info(
        "%d labelled, %d unlabelled, %d validation cases; classes: %s; results in %s, weights in %s",
        *map(len, (training, unlabeled, validation)),
        ", ".join(labels.values()),
        Path(output_dir),
        Path(ckpt_dir),
    )


def check_evaluation(
    cases: Sequence[Mapping[str, Any]],
    datalist: str,
    labels: Mapping[str, str],
    channels: int,
    output_dir: str,
    targets: Sequence[Mapping[str, Any]] = (),
    patch_size: Sequence[int] | None = None,
) -> None:
    """Check the input of an evaluation before it starts, and keep others out of its folder until :func:`leave`.

    Args:
        cases: the labelled entries to evaluate.
        datalist: where they come from; its ``labels`` must be those of the config.
        labels: names of the classes by id, background as ``"0"``.
        channels: number of the image's channels.
        output_dir: must be writable.
        targets: regression targets.
        patch_size: its length is the number of spatial dimensions.

    Raises:
        BadInput: with everything that was found.
    """
    check_output(output_dir)
    check_targets(targets, labels)
    _check_datalist(datalist, labels)
    check_cases(cases, labels, channels, targets, patch_size)
    occupy(output_dir)


def _check_datalist(datalist: str, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Check that a datalist, where there is one, has the same structures; returns its testing entries."""
    if not Path(datalist).is_file():
        return []
    content = read_datalist(datalist)
    check_labels(content, labels)
    return load_section(content, "testing", keys=("image",), required=False, exist=False)
