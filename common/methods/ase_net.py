"""ASE-Net: a self-ensembled student, and two discriminators that tie its unlabelled predictions to better ones.

Lei et al., "Semi-Supervised Medical Image Segmentation Using Adversarial Consistency Learning and Dynamic Convolution
Network", IEEE TMI 2023. From the paper: the released 3D code does not run, and takes a softmax over one channel, by
which its consistency is always 0.

Each step trains first the discriminators, with the student fixed, then the student, with the discriminators fixed:

- D1 tells the student's predictions of labelled crops (real) from those of unlabelled ones; D2 tells the teacher's
  predictions of clean unlabelled crops (real) from the student's of noisy ones. The teacher is the student's moving
  average. Both see a map together with its clean image, since noise in the image would give D2's answer away.
- ``L = L_s + w(t) (L_con + L_adv)`` with ``L_s = (CE + Dice) / 2``; ``L_con`` the mean of the three squared differences
  among ``student(x_u)``, ``student(x_u + noise)`` and ``teacher(x_u + noise)`` (softmax), and
  ``L_adv = (CE(D1) + CE(D2)) / 2``, in which the student's predictions of unlabelled crops should pass for real ones.

The discriminators are in evaluation mode, without dropout, while they are fixed. The student never is: what the
discriminators learn to judge must be what they will judge, with its dropout and with batch norms by the batch; the
statistics that those keep for inference move in its own turn alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import BadInput
from ..losses import SegmentationLoss, sigmoid_ramp_up
from ..networks.vnet import without_running_statistics
from .base import Method, Segmenter
from .mean_teacher import clipped_noise
from .moving_average import MovingAverage

__all__ = ["ASENet", "three_way_consistency"]

FAKE, REAL = 0, 1


def add_noise(image: Tensor) -> Tensor:
    """``image`` with Gaussian noise of standard deviation 0.1, clipped to -0.2 and 0.2."""
    return image + clipped_noise(image, 0.1)


def three_way_consistency(clean: Tensor, noisy: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of probabilities (B, K, *spatial), averaged over the three pairs."""
    return (F.mse_loss(clean, noisy) + F.mse_loss(clean, teacher) + F.mse_loss(noisy, teacher)) / 3


def taken_for(logits: Tensor, verdict: int) -> Tensor:
    """Cross-entropy between a discriminator's logits (B, 2) and one verdict for all."""
    return F.cross_entropy(logits.float(), torch.full((logits.shape[0],), verdict, device=logits.device))


def fixed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """``module(*inputs)`` through which gradients reach the inputs, but no weight of the module."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, weights, inputs)


class ASENet(Method):
    """ASE-Net, for a trainer with two optimisers, ``discriminators`` first, then ``network``.

    Args:
        network: the student, a :class:`~common.networks.SegmentationNetwork`.
        discriminator: makes a discriminator, such as
            :class:`~common.networks.discriminator.Discriminator`; it is called twice.
        segmentation_loss: the sum of cross-entropy and Dice, which is halved.
        consistency_weight: w after the ramp-up.
        ramp_up: length of w's sigmoid ramp-up as a fraction of the run.
        decay: of the teacher, the student's moving average.
        annealing: fraction of the run in which dynamic convolutions, if there are any, reach the temperature 1.
        deploy: which weights :attr:`deployed` has: those of the ``"network"``, or their ``"moving_average"``.

    Raises:
        BadInput: an unknown ``deploy``, an ``annealing`` below 0; in use, an optimiser of another name.
    """

    def __init__(
        self,
        network: Segmenter,
        discriminator: Callable[[], nn.Module],
        segmentation_loss: SegmentationLoss | None = None,
        consistency_weight: float = 1.0,
        ramp_up: float = 1.0,
        decay: float = 0.99,
        annealing: float = 0.1,
        deploy: str = "moving_average",
    ) -> None:
        super().__init__()
        if deploy not in ("network", "moving_average"):
            raise BadInput(f"deploy: found {deploy!r}, expected 'network' or 'moving_average'.")
        if not annealing >= 0:
            raise BadInput(f"annealing: found {annealing!r}, expected a fraction of the run such as 0.1.")
        self.network = network
        self.average = MovingAverage(network, decay)
        self.discriminators = nn.ModuleDict({"labeled": discriminator(), "teacher": discriminator()})
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.consistency_weight = consistency_weight
        self.ramp_up = ramp_up
        self.annealing = annealing
        self.deploy = deploy

    @property
    def deployed(self) -> nn.Module:
        """The network to validate and to write; the discriminators are for training only."""
        return self.network if self.deploy == "network" else self.average.module

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        turns = {"discriminators": self._discriminators_turn, "network": self._network_turn}
        if optimizer not in turns:
            raise BadInput(
                f"ASE-Net: found the optimizer {optimizer!r}, expected two, 'discriminators' first and then 'network'."
            )
        self.discriminators.train(self.training and optimizer == "discriminators")
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]["image"]
        return turns[optimizer](labeled, unlabeled, add_noise(unlabeled))

    def _discriminators_turn(
        self, labeled: Mapping[str, Tensor], unlabeled: Tensor, noisy: Tensor
    ) -> dict[str, Tensor]:
        image = labeled["image"]
        with torch.no_grad(), without_running_statistics(self.network):
            logits = self.network(torch.cat([image, unlabeled, noisy]))
            of_labeled, of_clean, of_noisy = _split(logits.float().softmax(1), image, unlabeled, noisy)
            of_teacher = self.average(unlabeled).float().softmax(1)
        first, second = self.discriminators["labeled"], self.discriminators["teacher"]
        by_labeled = (taken_for(first(of_labeled, image), REAL) + taken_for(first(of_clean, unlabeled), FAKE)) / 2
        by_teacher = (taken_for(second(of_teacher, unlabeled), REAL) + taken_for(second(of_noisy, unlabeled), FAKE)) / 2
        return {"loss": by_labeled + by_teacher, "labeled": by_labeled, "teacher": by_teacher}

    def _network_turn(self, labeled: Mapping[str, Tensor], unlabeled: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        image = labeled["image"]
        with torch.no_grad():
            of_teacher = self.average(noisy).float().softmax(1)
        _, logits = self.network.forward_all(torch.cat([image, unlabeled, noisy]))
        supervised = self.supervise(logits, labeled) / 2
        _, of_clean, of_noisy = _split(logits[0].float().softmax(1), image, unlabeled, noisy)
        consistency = three_way_consistency(of_clean, of_noisy, of_teacher)
        first, second = self.discriminators["labeled"], self.discriminators["teacher"]
        adversarial = (
            taken_for(fixed(first, of_clean, unlabeled), REAL) + taken_for(fixed(second, of_noisy, unlabeled), REAL)
        ) / 2
        weight = self.consistency_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        loss = supervised + weight * (consistency + adversarial)
        return {"loss": loss, "segmentation": supervised, "consistency": consistency, "adversarial": adversarial}

    def after_step(self) -> None:
        self.average.update_parameters(self.network)


def _split(whole: Tensor, *parts: Tensor) -> Sequence[Tensor]:
    return whole.split([len(part) for part in parts])
