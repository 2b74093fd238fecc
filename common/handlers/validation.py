"""When a training is validated."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

from ..errors import BadInput

__all__ = ["Validation"]


class Validation(ValidationHandler):
    """MONAI's handler for every so many epochs, which validates after the last epoch as well, once.

    So the last figures and pictures are of the weights that the training ends with, whatever the number of epochs.

    Args:
        validator: the evaluator to run.
        interval: epochs from one validation to the next.

    Raises:
        BadInput: the interval is not a whole number from 1 on.
    """

    def __init__(self, validator: Evaluator, interval: int) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise BadInput(f"val_interval: found {interval!r}, expected a number of epochs: 1, 2 ...")
        super().__init__(interval=interval, validator=validator)

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs
