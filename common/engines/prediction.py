"""Predicting case by case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.data import list_data_collate
from monai.engines import Evaluator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.datalist import case_name
from ..data.grids import describe_error
from ..errors import BadInput, explain, root_cause

__all__ = ["leave_in_place", "predict"]

logger = logging.getLogger(__name__)


def leave_in_place(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What an evaluator hands to its inferer: the image where it is, not moved to the accelerator as MONAI does.

    :class:`common.inferers.SlidingWindow` moves windows there and stitches what comes back beside the image, so that
    an accelerator's memory has to hold a few windows, whatever the size of the volume.
    """
    return batch["image"], None


def _reason(error: BaseException) -> str:
    return explain(error) or describe_error(root_cause(error))


class _Attempts(Dataset):
    """A data set as batches of one case; in place of a case that can't be loaded, the reason, a string.

    An exception would end the loader, and those that come out of a worker process have lost their cause.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's base class doesn't say that there is a length

    def __getitem__(self, index: int) -> Any:
        try:
            return list_data_collate([self.dataset[index]])
        except Exception as error:
            return _reason(error)


def _as_it_is(item: Any) -> Any:
    return item


def predict(evaluator: Evaluator, cases: Sequence[Mapping[str, Any]]) -> None:
    """Run an evaluator over its data set, a case at a time; a case that fails does not stop the others.

    With ``num_workers`` in the evaluator's loader, each worker loads a case ahead while another one is predicted, at
    the price of that case's memory. Nothing of a case is kept when the next one is taken.

    Args:
        evaluator: predicts, and writes what it predicts. Its loader has one case a batch.
        cases: the entries of the loader's data set, for their names.

    Raises:
        BadInput: at the end, when cases failed: which, and why.
    """
    errors: list[str] = []

    def note(error: BaseException) -> None:
        if not isinstance(error, Exception):  # somebody wants the run to end
            raise error
        errors.append(_reason(error))

    handler = evaluator.add_event_handler(Events.EXCEPTION_RAISED, note)
    loader = evaluator.data_loader
    assert isinstance(loader, DataLoader)
    attempts = iter(
        DataLoader(
            _Attempts(loader.dataset),
            batch_size=None,
            num_workers=loader.num_workers,
            prefetch_factor=1 if loader.num_workers else None,
            collate_fn=_as_it_is,
        )
    )
    failures: list[str] = []
    with tqdm(cases, desc="predicting", unit="case", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(case_name(case))
            loaded = next(attempts)
            if isinstance(loaded, str):
                errors.append(loaded)
            else:
                evaluator.data_loader, loaded = [loaded], None
                evaluator.state.epoch_length = 1
                evaluator.run()
                state = evaluator.state
                evaluator.data_loader = []
                state.dataloader = state.batch = state.output = None
            if errors:
                named = str(case["image"]) in errors[0]
                failures.append(errors[0] if named else f"{case['image']}: {errors[0]}")
                logger.error("failed: %s", failures[-1])
                errors.clear()
    next(attempts, None)  # at its end a loader stops its workers
    handler.remove()
    evaluator.data_loader = loader
    if failures:
        listed = "\n  ".join(failures)
        raise BadInput(
            f"{len(failures)} of {len(cases)} cases failed, the others are written:\n  {listed}\n"
            "Correct what is named, and run these cases again."
        )
