"""Aggregating & Decoupling: a diffusion branch labels, a decoder that sees no label learns.

Wang & Li, "Towards Generic Semi-Supervised Framework for Volumetric Medical Image Segmentation", NeurIPS 2023.

The loss is ``L_deno + L_diff + mu R(t) L_u`` on one encoder with three decoders:

- *Aggregating*: the diffusion decoder xi predicts the clean label from the image and the label under noise of a random
  step, ``L_deno = DiceCE(xi, y)``.
- *Decoupling*: the difficulty-aware decoder psi reads the image alone, ``L_diff = DiceCE(psi, y)`` with a weight a
  class that is large where xi's Dice is low or falls. The decoder theta, the one that is deployed, learns only the
  unlabelled crops, ``L_u = DiceCE(theta, y_u)``, and follows the average of xi and psi. No label trains it directly.
- *Pseudo-labels* by "Reparameterize & Smooth":
  ``y_u = argmax(G * GumbelSoftmax(p_u_xi) + Softmax(p_u_psi))``, with ``p_u_xi`` sampled by DDIM from noise.

The method is one and the same in the paper's four settings; the datalist says which it is:

- *semi-supervised*, plain or class-imbalanced: ``training`` and ``unlabeled`` from one source;
- *unsupervised domain adaptation*: ``training`` from the source domain, ``unlabeled`` from the target domain (as are
  ``validation`` and ``testing``);
- *domain generalisation*: ``training`` and ``unlabeled`` from several source domains, ``testing`` from a domain that
  neither has.

Where the paper leaves a choice, or its released code has another answer:

- The clean label that the sampler steps with is ``2 softmax(xi) - 1``, the mean of the scaled label, which is within
  -1 and 1. The released code clips the logits, by which every class above 1 becomes equally likely. As there,
  ``p_u_xi`` in -1 to 1 serves as the logits of the Gumbel-softmax, so a single voxel's vote is weak and noisy, and the
  smoothing over its neighbours makes it count.
- The smoothing repeats the crop's border where the released code has zeros, which would take weight from xi's votes.
- A class that a batch's labels lack leaves its difficulty as it was, and its first Dice is no change yet. Logarithms
  and ratios have a floor, so a Dice of 0 gives finite weights.
- All three losses use deep supervision, as all methods here do.
- The background has a weight of its difficulty, as any class. It is the easiest by far, so psi, whose cross-entropy
  then counts it a tenth as much as a structure, segments too much, and theta learns that. ``weigh_background`` False
  gives it the structures' mean weight.
- Pseudo-labels are made in training mode: with dropout, where the network has any, as in the released code.
- theta is pulled towards the mean of two decoders that start apart and stay apart, which labels nothing by itself; what
  it knows it has from the pseudo-labels.
- Without the diffusion branch, psi alone labels, measures the difficulty, and is what theta follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss
from monai.networks import one_hot
from monai.networks.layers import separable_filtering
from monai.networks.layers.convutils import gaussian_1d
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor, nn

from ..errors import BadInput
from ..losses import SegmentationLoss, deep_supervision_weights, sigmoid_ramp_up
from ..losses.processes import mean_over_processes
from ..networks.diffusion import AggregatingDecouplingNetwork
from ..networks.reductions import likeliest_class
from .base import Method, Segmenter, refuse_partial_labels

__all__ = ["AggregatingDecoupling", "DifficultyWeights", "ddim_sample", "reparameterize_and_smooth"]

DIFFUSION_STEPS = 1000
FLOOR = 1e-8


class DifficultyWeights(nn.Module):
    """A weight a class, large for classes whose Dice is low, or has fallen of late more than it has risen.

    With the Dice ``d`` of this step and ``d'`` of the last one, ``learned`` is the moving average of
    ``(d - d') ln(d / d')`` where the Dice rose, ``unlearned`` that where it fell, and ``error`` that of ``1 - d``. The
    weight is ``K error (unlearned / learned)^(1/5)``.

    Args:
        num_classes: K.
        window: number of steps that the moving averages look back.
    """

    def __init__(self, num_classes: int, window: int = 50) -> None:
        super().__init__()
        self.window = window
        self.seen: Tensor
        self.dice: Tensor
        self.learned: Tensor
        self.unlearned: Tensor
        self.error: Tensor
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("dice", torch.zeros(num_classes))
        self.register_buffer("learned", torch.zeros(num_classes))
        self.register_buffer("unlearned", torch.zeros(num_classes))
        self.register_buffer("error", torch.ones(num_classes))

    @torch.no_grad()
    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Look at one more step, and give the weights (K,).

        Args:
            logits: (B, K, *spatial).
            label: (B, 1, *spatial), class ids.
        """
        num_classes = logits.shape[1]
        axes = [0, *range(2, logits.dim())]
        prediction, reference = one_hot(likeliest_class(logits), num_classes), one_hot(label, num_classes)
        sums = torch.stack([volume.sum(axes) for volume in (prediction * reference, prediction, reference)])
        overlap, found, size = mean_over_processes(sums)  # the buffers are one for all processes
        dice = 2 * overlap / (found + size).clamp(min=1)
        present = size > 0
        known = present & self.seen
        change = (dice - self.dice) * (dice.clamp(min=FLOOR) / self.dice.clamp(min=FLOOR)).log()
        rose = dice > self.dice
        self._follow(self.learned, change * rose, known)
        self._follow(self.unlearned, change * ~rose, known)
        self._follow(self.error, 1 - dice, present)
        self.dice.copy_(torch.where(present, dice, self.dice))
        self.seen |= present
        speed = (self.unlearned + FLOOR) / (self.learned + FLOOR)
        return (num_classes * self.error * speed**0.2).clamp(min=FLOOR)

    def _follow(self, average: Tensor, value: Tensor, where: Tensor) -> None:
        average.copy_(torch.where(where, torch.lerp(average, value, 1 / self.window), average))


def weighted_loss(
    logits: Sequence[Tensor], label: Tensor, weights: Tensor, segmentation_loss: SegmentationLoss | None = None
) -> Tensor:
    """Dice + cross-entropy under deep supervision with a weight a class; weights of 1 give ``segmentation_loss``.

    Args:
        logits: (B, K, *spatial) each, high to low resolution.
        label: (B, 1, *spatial), class ids.
        weights: (K,), above 0. The cross-entropy is divided by the sum of its voxels' weights, the Dice is not.
        segmentation_loss: of Dice and cross-entropy; by default as nnU-Net has it.
    """
    plain = segmentation_loss or SegmentationLoss()
    of_dice = weights if plain.include_background else weights[1:]

    def of_level(output: Tensor, target: Tensor) -> Tensor:
        ids = target.squeeze(1).long()
        of_voxels = mean_over_processes(weights[ids].sum())
        cross_entropy = F.cross_entropy(output, ids, weight=weights, reduction="sum") / of_voxels
        dice = plain.dice(output.softmax(1), one_hot(target, output.shape[1]))
        return cross_entropy + (of_dice * dice.flatten(0 if plain.batch_dice else 1)).mean()

    with torch.autocast(device_type=label.device.type, enabled=False):
        weights_of_levels = deep_supervision_weights(len(logits))
        loss = DeepSupervisionLoss(of_level, weights=weights_of_levels)  # type: ignore[arg-type]  # takes any function
        return loss([output.float() for output in logits], label.float())


def ddim_sample(
    denoise: Callable[[Tensor, int], Tensor], noise: Tensor, alphas_cumprod: Tensor, steps: int = 10
) -> Tensor:
    """From noise to a clean sample by deterministic steps (DDIM with eta 0; Song, Meng & Ermon, ICLR 2021).

    MONAI's ``DDIMScheduler`` steps by ``1000 // steps`` and so misses its own grid, 999, 888 ... 0; this steps on it.

    Args:
        denoise: the clean sample in -1 to 1 from a noisy one and the step it is at.
        noise: where to start, standard normal.
        alphas_cumprod: (T,), the share of signal (squared) at each step.
        steps: number of steps, from T - 1 to 0.
    """
    grid = torch.linspace(len(alphas_cumprod) - 1, 0, steps).round().long().tolist()
    after = [alphas_cumprod[step] for step in grid[1:]] + [torch.ones_like(alphas_cumprod[0])]
    sample = noise
    for step, next_alpha in zip(grid, after, strict=True):
        alpha = alphas_cumprod[step]
        clean = denoise(sample, step).clamp(-1, 1)
        noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        sample = next_alpha.sqrt() * clean + (1 - next_alpha).sqrt() * noise
    return sample


def reparameterize_and_smooth(clean: Tensor, logits: Tensor) -> Tensor:
    """The class ids (B, 1, *spatial) on which the smoothed random votes of one branch and the other one agree best.

    Args:
        clean: (B, K, *spatial), the diffusion branch's label in -1 to 1.
        logits: (B, K, *spatial) of the difficulty-aware branch.
    """
    votes = F.gumbel_softmax(clean.float(), tau=1.0, dim=1)
    kernel = gaussian_1d(torch.ones(()), truncated=1.0, approx="sampled", normalize=True)
    smooth = separable_filtering(votes, [kernel] * (votes.dim() - 2), mode="replicate")
    return likeliest_class(smooth + logits.float().softmax(1))


class AggregatingDecoupling(Method):
    """A&D.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork` or a V-Net. Its encoder is the shared one and its
            decoder is theta; xi, psi and what else they need is added beside them.
        class_names: names of the classes, background first, for the log.
        segmentation_loss: Dice + cross-entropy; psi's has the classes' weights in it.
        unlabeled_weight: mu.
        ramp_up: length of mu's sigmoid ramp-up as a fraction of the run.
        decay: share of itself that theta keeps when it is moved towards xi and psi, before every step.
        sampling_steps: DDIM steps to a pseudo-label.
        window: steps that the difficulty looks back.
        diffusion: False is the ablation without the diffusion branch.
        difficulty_weights: False is the ablation with all classes' weights 1.
        weigh_background: whether the background is weighted by its own difficulty, which is the paper's way.
        reparameterize: False is the ablation without Reparameterize & Smooth: the two branches' softmax are summed.

    Raises:
        BadInput: ``decay`` is no share, or ``sampling_steps`` is below 1 or above the number of diffusion steps.
    """

    def __init__(
        self,
        network: Segmenter,
        class_names: Sequence[str],
        segmentation_loss: SegmentationLoss | None = None,
        unlabeled_weight: float = 10.0,
        ramp_up: float = 1.0,
        decay: float = 0.99,
        sampling_steps: int = 10,
        window: int = 50,
        diffusion: bool = True,
        difficulty_weights: bool = True,
        weigh_background: bool = True,
        reparameterize: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise BadInput(f"decay: found {decay!r}, expected a share from 0 to 1 such as 0.99.")
        if not 1 <= sampling_steps <= DIFFUSION_STEPS:
            raise BadInput(f"sampling_steps: found {sampling_steps!r}, expected 1 to {DIFFUSION_STEPS}, such as 10.")
        self.network = AggregatingDecouplingNetwork(network, diffusion)
        self._inference = (network,)  # in a tuple, or its weights would stand in the state twice
        self.class_names = list(class_names)
        self.segmentation_loss: SegmentationLoss = segmentation_loss or SegmentationLoss()
        self.difficulty = DifficultyWeights(self.network.num_classes, window) if difficulty_weights else None
        self.scheduler = DDPMScheduler(DIFFUSION_STEPS, "linear_beta", beta_start=1e-4, beta_end=0.02)
        self.unlabeled_weight = unlabeled_weight
        self.ramp_up = ramp_up
        self.decay = decay
        self.sampling_steps = sampling_steps
        self.weigh_background = weigh_background
        self.diffusion = diffusion
        self.reparameterize = reparameterize

    @property
    def deployed(self) -> nn.Module:
        """The network to validate and to write: encoder and theta, nothing else."""
        return self._inference[0]

    def progress(self, step: int, total_steps: int) -> None:
        """Called by the engine before every step: theta moves towards xi and psi."""
        super().progress(step, total_steps)
        self.aggregate()

    @torch.no_grad()
    def aggregate(self) -> None:
        """``theta = decay theta + (1 - decay) (xi + psi) / 2``."""
        theta, others = self.network.segmentation_decoder, [self.network.difficulty_decoder]
        if self.network.diffusion_decoder is not None:
            others.append(self.network.diffusion_decoder)
        for own, *towards in zip(theta.parameters(), *(other.parameters() for other in others), strict=True):
            own.lerp_(torch.stack(towards).mean(0), 1 - self.decay)

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        refuse_partial_labels(
            batch["labeled"], self.network.num_classes, "A&D, whose diffusion branch learns whole label maps"
        )
        image, label = batch["labeled"]["image"], batch["labeled"]["label"]
        unlabeled = batch["unlabeled"]["image"]
        theta, psi = self.network.segmentation_decoder, self.network.difficulty_decoder
        count = image.shape[0]
        features = self.network.encode(torch.cat([image, unlabeled]))
        labeled_features = [level[:count] for level in features]
        unlabeled_features = [level[count:] for level in features]
        terms: dict[str, Tensor] = {}

        by_psi = psi.logits(psi(labeled_features))
        by_xi = self._denoise(image, label) if self.diffusion else None
        if by_xi is not None:
            terms["denoising"] = self.segmentation_loss(by_xi, label)
        if self.difficulty is None:
            terms["difficulty"] = self.segmentation_loss(by_psi, label)
        else:
            weights = self.difficulty((by_xi or by_psi)[0], label)
            if not self.weigh_background:
                weights[0] = weights[1:].mean()
            terms["difficulty"] = weighted_loss(by_psi, label, weights, self.segmentation_loss)

        pseudo_label = self.pseudo_label(unlabeled, unlabeled_features)
        terms["unlabeled"] = self.segmentation_loss(theta.logits(theta(unlabeled_features)), pseudo_label)

        mu = self.unlabeled_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        terms["loss"] = terms.get("denoising", 0.0) + terms["difficulty"] + mu * terms["unlabeled"]
        if self.difficulty is not None:
            terms.update({f"weight/{name}": value for name, value in zip(self.class_names, weights, strict=True)})
        return terms

    def _denoise(self, image: Tensor, label: Tensor) -> list[Tensor]:
        """xi's logits of the label from the label under the noise of a random step, one a case."""
        clean = 2 * one_hot(label, self.network.num_classes) - 1
        step = torch.randint(DIFFUSION_STEPS, (image.shape[0],), device=image.device)
        noisy = self.scheduler.add_noise(clean, torch.randn_like(clean), step)
        return self.network.denoise(image, noisy, step)

    @torch.no_grad()
    def pseudo_label(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The class ids (B, 1, *spatial) for theta to learn.

        Args:
            image: (B, C, *spatial).
            features: the encoder's, of the image.
        """
        psi = self.network.difficulty_decoder
        logits = psi.full_resolution(psi(list(features)))
        if not self.diffusion:
            return likeliest_class(logits)
        clean = ddim_sample(
            lambda noisy, step: self._clean_label(image, noisy, step),
            torch.randn(logits.shape, device=logits.device),
            self.scheduler.alphas_cumprod.to(logits.device),
            self.sampling_steps,
        )
        with torch.autocast(device_type=image.device.type, enabled=False):
            if self.reparameterize:
                return reparameterize_and_smooth(clean, logits)
            return likeliest_class(clean.softmax(1) + logits.softmax(1))

    def _clean_label(self, image: Tensor, noisy: Tensor, step: int) -> Tensor:
        steps = torch.full((image.shape[0],), step, device=image.device)
        return 2 * self.network.denoise(image, noisy, steps)[0].softmax(1) - 1
