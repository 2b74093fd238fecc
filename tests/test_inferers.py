from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from common.errors import BadInput
from common.inferers import SlidingWindow


class FirstDifference(nn.Module):
    """Difference to the next voxel along each axis, a channel an axis: turns its sign when mirrored."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image.roll(-1, axis) - image for axis in range(2, image.ndim)], dim=1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(1, 3, 3, padding=1)


@pytest.mark.parametrize("size", [(16, 16), (23, 40), (9, 16)])
def test_without_mixed_precision_it_is_monais(network, size):
    image = torch.randn(2, 1, *size)
    expected = SlidingWindowInferer((16, 16), 3, 0.5, mode="gaussian", padding_mode="replicate")(image, network)
    found = SlidingWindow((16, 16), 3, 0.5, amp=False, padding_mode="replicate")(image, network)
    assert found.shape == (2, 3, *size)
    assert torch.equal(found, expected)


def test_mirrored_predictions_are_averaged_by_hand():
    """One window (1, 2, 4, 5): the network's rolled difference, and that of the mirrored row turned back, of which
    5 - 4 has become 4 - 5."""
    image = torch.tensor([[[[1.0, 2.0, 4.0, 5.0]]]])

    def network(window: Tensor) -> Tensor:
        return window.roll(-1, 3) - window

    plain = SlidingWindow((1, 4), amp=False)(image, network)
    assert plain.flatten().tolist() == pytest.approx([1.0, 2.0, 1.0, -4.0])
    mirrored = SlidingWindow((1, 4), amp=False, mirror_axes=[1])(image, network)
    # mirrored back: (5-1, 1-2, 2-4, 4-5) = (4, -1, -2, -1); the mean with (1, 2, 1, -4):
    assert mirrored.flatten().tolist() == pytest.approx([2.5, 0.5, -0.5, -2.5])


def test_windows_go_to_the_network_and_are_blended_beside_the_image(monkeypatch):
    """A device without memory stands for an accelerator, as far as torch lets it."""

    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))
            self.seen = []

        def forward(self, window: Tensor) -> Tensor:
            self.seen.append(window.device.type)
            return torch.ones(window.shape)

    entered = []
    monkeypatch.setattr(torch, "autocast", lambda device, *_, **__: entered.append(device) or nullcontext())
    network = Elsewhere()
    found = SlidingWindow((8, 8), amp=False)(torch.zeros(1, 1, 12, 8), network)
    assert network.seen == entered == ["meta"]
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.ones(1, 1, 12, 8))


@pytest.mark.parametrize(("axes", "passes"), [((), 1), ((0,), 2), ((0, 1), 4), ((0, 1, 2), 8)])
def test_every_combination_of_axes_is_seen_once(axes, passes):
    seen = []

    def network(window: Tensor) -> Tensor:
        seen.append(window.clone())
        return window

    image = torch.randn(1, 1, 4, 4, 4)
    found = SlidingWindow((4, 4, 4), amp=False, mirror_axes=axes)(image, network)
    assert len(seen) == passes
    assert len({tuple(window.flatten().tolist()) for window in seen}) == passes
    torch.testing.assert_close(found, image, msg="what does not depend on the direction comes back as it was")


def test_mirroring_makes_the_prediction_indifferent_to_mirroring(network):
    image = torch.randn(1, 1, 16, 16)
    inferer = SlidingWindow((16, 16), amp=False, mirror_axes=(0, 1))
    torch.testing.assert_close(inferer(image.flip(3), network).flip(3), inferer(image, network))
    plain = SlidingWindow((16, 16), amp=False)
    assert not torch.allclose(plain(image.flip(3), network).flip(3), plain(image, network))


def test_windows_are_mirrored_not_the_volume():
    """The same as mirroring each window by hand before blending."""
    network = FirstDifference()

    def both(window: Tensor) -> Tensor:
        return (network(window) + network(window.flip(2)).flip(2)) / 2

    image = torch.randn(1, 1, 20, 30)
    expected = SlidingWindowInferer((16, 16), 2, 0.5, mode="gaussian")(image, both)
    torch.testing.assert_close(SlidingWindow((16, 16), 2, 0.5, amp=False, mirror_axes=[0])(image, network), expected)


def test_mixed_precision_reaches_the_network(network):
    formats = []
    network.register_forward_hook(lambda module, inputs, output: formats.append(output.dtype))
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        exact = SlidingWindow((16, 16), amp=False)(image, network)
        mixed = SlidingWindow((16, 16), amp="bf16")(image, network)
    assert formats == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(mixed.float(), exact, atol=0.05, rtol=0.05)


def test_a_dense_grid_with_constant_weights_is_a_plain_loop_over_windows(network):
    """As the semi-supervised literature tests: windows every few voxels, the last ones moved back to fit, and of their
    softmax the plain mean of all that see a voxel."""
    image = torch.randn(1, 1, 23, 17)
    size, stride = (8, 16), (3, 2)
    starts = [(0, 3, 6, 9, 12, 15), (0, 1)]
    total, count = torch.zeros(1, 3, 23, 17), torch.zeros(23, 17)
    for x in starts[0]:
        for y in starts[1]:
            window = (..., slice(x, x + size[0]), slice(y, y + size[1]))
            with torch.no_grad():
                total[window] += network(image[window]).softmax(1)
            count[window] += 1
    settings = {"amp": False, "mode": "constant", "stride": stride, "average": "probabilities"}
    with torch.no_grad():
        found = SlidingWindow(size, 3, **settings)(image, network)
        other = SlidingWindow(size, 3, **{**settings, "average": "logits"})(image, network)
        weighted = SlidingWindow(size, 3, **{**settings, "mode": "gaussian"})(image, network)
    torch.testing.assert_close(found.softmax(1), total / count)
    assert torch.isfinite(found).all()
    assert not torch.allclose(other.softmax(1), total / count, atol=1e-4)
    assert not torch.allclose(weighted.softmax(1), total / count, atol=1e-4)


@pytest.mark.parametrize("length", [8, 80, 96, 112, 160])
def test_a_stride_is_kept_to_the_voxel(length):
    for stride in range(1, length + 1):
        starts = []
        image = torch.arange(float(length + 2 * stride)).reshape(1, 1, -1, 1)
        inferer = SlidingWindow((length, 1), 1, amp=False, mode="constant", stride=(stride, 1))
        inferer(image, lambda window, starts=starts: starts.append(int(window[0, 0, 0, 0])) or window)
        assert starts == [0, stride, 2 * stride]


def test_a_class_of_no_probability_stays_finite():
    image = torch.zeros(1, 1, 4, 4)
    found = SlidingWindow((4, 4), amp=False, average="probabilities")(
        image, lambda window: torch.cat([window, window - 1000], 1)
    )
    assert torch.isfinite(found).all()
    assert torch.equal(found.softmax(1)[:, 0], torch.ones(1, 4, 4))


@pytest.mark.parametrize("stride", [(4,), (0, 4), (4, 9)])
def test_impossible_strides_and_averages_are_explained(stride):
    with pytest.raises(BadInput, match=r"stride.*\[8, 8\]"):
        SlidingWindow((8, 8), stride=stride)
    with pytest.raises(BadInput, match="average: found 'labels'"):
        SlidingWindow((8, 8), average="labels")


def body_in_air(size: tuple[int, ...] = (40, 36)) -> Tensor:
    """A disc of 0 in noisy air of -5."""
    torch.manual_seed(0)
    image = -5 + 0.5 * torch.randn(1, 1, *size)
    image[..., 14:20, 17:25] = 0
    return image


def test_windows_of_air_alone_are_not_given_to_the_network(network):
    image, seen = body_in_air(), []
    counted = network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    settings = {"sw_batch_size": 1, "amp": False, "mode": "constant", "overlap": 0.0}
    with torch.no_grad():
        found = SlidingWindow((8, 8), air=-4.0, classes=2, **settings)(image, network)
        few = sum(seen)
        whole = SlidingWindow((8, 8), **settings)(image, network)
    counted.remove()
    # blocks of 4 with some of the body: rows 12-20, columns 16-28; half a window round them: 8-24 and 12-32
    assert few == 2 * 3 < sum(seen) - few == 5 * 5
    assert found.shape == whole.shape == (1, 3, 40, 36)
    assert torch.equal(found[..., 9:15, 13:19], network(image)[..., 9:15, 13:19].detach())
    outside = torch.ones(40, 36, dtype=torch.bool)
    outside[8:24, 12:32] = False
    assert torch.equal(found[0, :, outside].unique(dim=1), torch.tensor([[20.0], [0.0], [0.0]]))
    regression = SlidingWindow((8, 8), air=-4.0, classes=0, **settings)(image, network)
    assert not regression[0, :, outside].any(), "without classes no channel is the background's"


@pytest.mark.parametrize("where", [(0, 0), (39, 35), (20, 0)])
def test_a_body_at_the_border_is_seen_whole(where, network):
    image = body_in_air()
    image[..., where[0], where[1]] = 200.0  # of which its block has a mean far above air's
    with torch.no_grad():
        found = SlidingWindow((16, 16), amp=False, air=-4.0, classes=3)(image, network)
    assert found[..., where[0], where[1]].flatten().tolist() != [20.0, 0.0, 0.0]


def test_noise_is_air_and_a_volume_of_air_alone_is_predicted_whole(network):
    image = body_in_air()
    with torch.no_grad():
        for volume in (image[..., 26:, :], torch.zeros(1, 1, 40, 36)):
            expected = SlidingWindow((16, 16), amp=False)(volume, network)
            assert torch.equal(SlidingWindow((16, 16), amp=False, air=-4.0, classes=3)(volume, network), expected)
        small = image[..., 14:18, 18:22]
        assert SlidingWindow((16, 16), amp=False, air=-4.0)(small, network).shape == (1, 3, 4, 4)


def test_skipping_air_changes_inside_only_where_windows_begin(network):
    image = body_in_air()
    settings = {"roi_size": (16, 16), "amp": False, "average": "probabilities"}
    with torch.no_grad():
        found = SlidingWindow(**settings, air=-4.0, classes=3)(image, network)
        whole = SlidingWindow(**settings)(image, network)
    inside = (..., slice(16, 20), slice(16, 24))
    torch.testing.assert_close(found[inside].softmax(1), whole[inside].softmax(1), atol=5e-3, rtol=0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(1, 40, 36)), "logarithms of probabilities everywhere"


@pytest.mark.parametrize("size", [(64, 64, 1), (64, 64, 3), (3, 64, 64)])
def test_air_beside_a_body_of_few_slices(size):
    image = torch.full((2, 1, *size), -5.0)
    image[0, ..., :8, :8] = 0
    found = SlidingWindow((16, 16, 16), amp=False, air=-4.0, classes=1)(image, lambda window: window)
    assert found.shape == image.shape
    torch.testing.assert_close(found[..., :8, :8], image[..., :8, :8])
    assert found[1, 0, size[0] - 1, size[1] - 1, size[2] - 1] in (20.0, -5.0)


@pytest.mark.parametrize(("window", "expected"), [((16, 16, 16), 64), ((64, 64, 64), 1), ((128, 128, 128), 1)])
def test_a_cpu_takes_small_windows_together_and_large_ones_one_by_one(window, expected):
    seen = []
    image = torch.zeros(1, 1, *[5 * length // 2 for length in window])
    inferer = SlidingWindow(window, amp=False, overlap=0.5, mode="constant")
    inferer(image, lambda windows: seen.append(len(windows)) or windows)
    assert max(seen) == expected


def test_an_accelerator_takes_as_many_windows_as_fit(monkeypatch):
    """10 GB free and 2 GB that the allocator keeps; a window takes 0.5 GB beside the 1 GB of the network."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1e9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1.5e9)
    tried = []

    def predict(window):
        tried.append(tuple(window.shape))
        return torch.zeros(1, 5)

    inferer = SlidingWindow((8, -1), amp=False)
    volume = torch.zeros(2, 3, 20, 12)
    assert inferer._windows_at_once(volume, predict, torch.device("cuda")) == int(0.6 * 12e9 / 0.5e9) == 14
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100e9, 100e9))
    assert inferer._windows_at_once(volume, predict, torch.device("cuda")) == 16
    assert tried == [(1, 3, 8, 12)] * 2


def test_what_is_blended_on_an_accelerator_leaves_less_for_windows(monkeypatch):
    """A volume of 50 million voxels and 5 channels: 2 GB of the 10 GB, for sums and their quotient."""

    class OnAccelerator(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1e9)
    volume = torch.zeros(1).expand(1, 1, 5000, 10000).as_subclass(OnAccelerator)
    inferer = SlidingWindow((8, 8), amp=False)
    assert inferer._windows_at_once(volume, lambda window: torch.zeros(1, 5), torch.device("cuda")) == 4


@pytest.mark.parametrize("number", [0, -1, 1.5, "all"])
def test_an_impossible_number_of_windows_is_explained(number):
    with pytest.raises(BadInput, match=f"sw_batch_size: found {number!r}.*'auto'"):
        SlidingWindow((8, 8), sw_batch_size=number)
