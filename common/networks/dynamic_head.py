"""A segmentation network whose last layers are made for the task: one encoder-decoder for many partly labelled organs.

Zhang et al., "DoDNet: Learning to segment multi-organ and tumors from multiple partially labeled datasets", CVPR 2021.
A controller looks at the image's bottleneck and at the code of a task, and gives the parameters of a small head, three
1x1 convolutions, that segments that task's organ and its tumour from features which all tasks share. So K tasks cost
one pass through encoder and decoder, and K heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from ..errors import BadInput
from .unet import Decoder, Encoder, PerAxis, full_precision, initialise

__all__ = ["DynamicHeadNetwork", "apply_heads", "split_parameters"]

#: channels that all tasks share, as many as each hidden layer of a head has
SHARED_CHANNELS = 8
#: of a head: convolutions from 8 channels to 8, to 8 and to 2
PARAMETERS = 64 + 64 + 16 + 8 + 8 + 2


def split_parameters(parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A head's parameters as those of its convolutions, weights first: 64, 64, 16, then the biases 8, 8, 2.

    Args:
        parameters: (N, 162), one row a head.

    Returns:
        Weights (N, out, in) and biases (N, out, 1) of the three 1x1 convolutions.
    """
    # Plain numbers, because TorchScript knows no module's constants.
    parts = parameters.split([64, 64, 16, 8, 8, 2], dim=1)
    weights = [part.reshape(parameters.shape[0], -1, 8) for part in parts[:3]]
    return weights, [part.unsqueeze(2) for part in parts[3:]]


def apply_heads(features: Tensor, parameters: Tensor) -> Tensor:
    """Every task's head on features that all tasks share: three 1x1 convolutions with ReLU between them.

    Args:
        features: (B, 8, *spatial).
        parameters: (B, T, 162), one row a task.

    Returns:
        Logits of organ and tumour, (B, T, 2, *spatial).
    """
    batch, tasks, number = parameters.shape
    weights, biases = split_parameters(parameters.reshape(batch * tasks, number))
    # A 1x1 convolution is a matrix on the channels; the first one's, of all tasks, are one matrix on the same features.
    first, bias = weights[0].reshape(batch, -1, weights[0].shape[2]), biases[0].reshape(batch, -1, 1)
    x = torch.baddbmm(bias, first, features.flatten(2)).reshape(batch * tasks, weights[0].shape[1], -1)
    for index in range(1, len(weights)):
        x = torch.baddbmm(biases[index], weights[index], F.relu(x))
    return x.reshape([batch, tasks, 2] + list(features.shape[2:]))  # noqa: RUF005 (TorchScript)


class DynamicHeadNetwork(nn.Module):
    """nnU-Net's U-Net with dynamic heads: ``encoder``, ``segmentation_decoder`` and ``controller``.

    The decoder's head gives the 8 channels that all tasks share, at full resolution alone. With :meth:`forward` it is a
    network of K classes like any other. Its logit of the background is 0, that of an organ its own sigmoid's, and that
    of a tumour its sigmoid's plus the organ's where this is positive. So the most probable class is

    - the background where no task claims the voxel (no sigmoid above 1/2);
    - of several that claim it, the one with the highest logit, where a tumour inside its organ has the sum of both.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes K, background included.
        features: channels of each stage, highest resolution first.
        kernel_sizes: odd kernel size of each stage, an integer or one an axis.
        strides: stride of each stage's first convolution, an integer or one an axis.
        convolutions_per_stage: convolution blocks in a stage, in encoder and decoder.
        dropout: probability of dropping a channel after a convolution.
        tasks: class ids of each task, ``[organ]`` or ``[organ, tumour]``; by default every class is an organ.

    Raises:
        BadInput: the tasks do not have each class but the background once; and as
            :class:`~common.networks.SegmentationNetwork`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[PerAxis],
        strides: Sequence[PerAxis],
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        tasks: Sequence[Sequence[int]] | None = None,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        classes = range(1, out_channels)
        self.tasks = [[organ] for organ in classes] if tasks is None else [list(task) for task in tasks]
        given = [number for task in self.tasks for number in task]
        if sorted(given) != list(classes) or not all(len(task) in (1, 2) for task in self.tasks):
            raise BadInput(
                f"tasks: found {self.tasks}, expected [organ] or [organ, tumour] each, and every class from 1 to "
                f"{out_channels - 1} once."
            )
        # Of each class but the background: its task, and its channel of the task's head.
        places = {number: (i, j) for i, task in enumerate(self.tasks) for j, number in enumerate(task)}
        self.places = [places[number] for number in classes]
        self.encoder = Encoder(
            spatial_dims, in_channels, features, kernel_sizes, strides, convolutions_per_stage, dropout, channels_last
        )
        self.divisor = self.encoder.divisor
        self.segmentation_decoder = Decoder(
            self.encoder, SHARED_CHANNELS, convolutions_per_stage, dropout, deep_supervision=False
        )
        pointwise = Conv[Conv.CONV, spatial_dims]
        self.controller = pointwise(features[-1] + len(self.tasks), PARAMETERS, kernel_size=1)
        initialise(self.controller)

    def forward_tasks(self, x: Tensor) -> Tensor:
        """Logits (B, T, 2, *spatial) of every task's organ and tumour, of an image (B, C, *spatial).

        One pass through encoder and decoder. The second channel of a task that has no tumour means nothing.
        """
        if not torch.jit.is_scripting():
            self.encoder.check_size(x)
        features = self.encoder(x)
        shared = self.segmentation_decoder.full_resolution(self.segmentation_decoder(features))
        return full_precision(apply_heads(shared, self.parameters_of_heads(features[-1])))

    def parameters_of_heads(self, bottleneck: Tensor) -> Tensor:
        """The parameters (B, T, 162) of every task's head, from the encoder's last features (B, C, *spatial)."""
        batch, tasks = bottleneck.shape[0], len(self.tasks)
        pooled = bottleneck.flatten(2).mean(2).unsqueeze(1).expand(-1, tasks, -1)
        codes = torch.eye(tasks, dtype=pooled.dtype, device=pooled.device).expand(batch, -1, -1)
        condition = torch.cat([pooled, codes], dim=2).flatten(0, 1)
        # As an image of one voxel.
        made = self.controller(condition.reshape(list(condition.shape) + [1] * (bottleneck.dim() - 2)))
        return made.reshape(batch, tasks, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, *spatial) of an image (B, C, *spatial); see the class for how tasks are merged."""
        heads = self.forward_tasks(x)
        classes = [torch.zeros_like(heads[:, 0, 0])]
        for task, channel in self.places:
            logit = heads[:, task, channel]
            classes.append(logit + F.relu(heads[:, task, 0]) if channel == 1 else logit)
        return torch.stack(classes, dim=1)
