"""Predicting case by case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import Evaluator
from torch.utils.data import Subset
from tqdm import tqdm

from ..data.datalist import case_name, describe_error
from ..errors import BadInput, explain, root_cause

__all__ = ["predict"]

logger = logging.getLogger(__name__)


def predict(evaluator: Evaluator, cases: Sequence[Mapping[str, Any]], dataset: Dataset) -> None:
    """Run an evaluator over a data set, a case at a time; a case that fails does not stop the others.

    Args:
        evaluator: predicts, and writes what it predicts.
        cases: the entries of the data set, for their names.
        dataset: the cases, loaded and preprocessed when they are asked for.

    Raises:
        BadInput: at the end, when cases failed: which, and why.
    """
    errors: list[BaseException] = []

    def note(error: BaseException) -> None:
        if not isinstance(error, Exception):  # somebody wants the run to end
            raise error
        errors.append(error)

    handler = evaluator.add_event_handler(Events.EXCEPTION_RAISED, note)
    failures: list[str] = []
    with tqdm(cases, desc="predicting", unit="case", disable=None) as bar:
        for index, case in enumerate(bar):
            bar.set_postfix_str(case_name(case))
            errors.clear()
            evaluator.data_loader = DataLoader(Subset(dataset, [index]), batch_size=1)
            evaluator.state.epoch_length = 1
            evaluator.run()
            if errors:
                failures.append(f"{case['image']}: {explain(errors[0]) or describe_error(root_cause(errors[0]))}")
                logger.error("failed: %s", failures[-1])
    handler.remove()
    if failures:
        listed = "\n  ".join(failures)
        raise BadInput(
            f"{len(failures)} of {len(cases)} cases failed, the others are written:\n  {listed}\n"
            "Correct or remove these files, and run again with them alone."
        )
