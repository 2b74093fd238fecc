from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import BadInput
from common.handlers import LockIn
from common.losses import FeatureAlignment, MaskedRegression, SegmentationLoss
from common.methods import DualDecoder
from common.networks import DualDecoderNetwork, RegressionNetwork, SegmentationNetwork, reduce_to_case

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum"}
SEVERITY = {"name": "severity", "unit": "", "kind": "mean", "structure": 1}
LAYERS = {"features": [4, 8], "kernel_sizes": [3, 3], "strides": [1, 2], "convolutions_per_stage": 1}


class Fixed(nn.Module):
    """Says what it is told: segmentation logits and regression channels."""

    def __init__(self, regression: Tensor) -> None:
        super().__init__()
        self.regression = nn.Parameter(regression)
        self.logits = nn.Parameter(torch.zeros(regression.shape[0], 3, *regression.shape[2:]))

    def forward_all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [image], [self.logits], self.regression


def dual(targets=(THICKNESS,), seed: int = 0, **settings) -> DualDecoderNetwork:
    torch.manual_seed(seed)
    return DualDecoderNetwork(
        2, 1, 3, targets=targets, **{**LAYERS, "attention_stages": [0], "attention_heads": 2, **settings}
    )


def row(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def labeled_row(**targets: Tensor) -> dict[str, dict[str, Tensor]]:
    label = torch.tensor([0, 1, 2, 2, 2]).reshape(1, 1, 1, -1)
    return {"labeled": {"image": torch.zeros(1, 1, 1, 5), "label": label, **targets}}


def real_batch() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(3, (2, 1, 16, 16), generator=generator)
    thickness = 1 + torch.rand(2, 1, 16, 16, generator=generator)
    image = torch.randn(2, 1, 16, 16, generator=generator)
    return {"labeled": {"image": image, "label": label, "thickness": thickness * (label == 2)}}


@pytest.mark.parametrize(
    # Inside the wall: an error of 4 mm and one of 1 mm, which are 2 and 0.5 in units of the scale of 2 mm; the third
    # wall voxel has no target, the voxels outside do not count.
    ("kind", "expected"),
    [("l1", (2.0 + 0.5) / 2), ("smooth_l1", (1.5 + 0.125) / 2), ("mse", (4.0 + 0.25) / 2)],
)
def test_dense_loss_by_hand(kind, expected):
    network = Fixed(row(50.0, 50.0, 7.0, 4.0, 90.0))
    method = DualDecoder(network, [THICKNESS], 3, (1, 5), MaskedRegression(kind))
    terms = method(labeled_row(thickness=row(9.0, 9.0, 3.0, 3.0, 0.0)))
    for name in ("regression/thickness", "regression", "loss"):
        assert terms[name].item() == pytest.approx(expected)
    terms["loss"].backward()
    assert (network.regression.grad.flatten() != 0).tolist() == [False, False, True, True, False]


def test_missing_may_be_any_value_and_the_structure_none():
    target = {"name": "thickness", "missing": -1}
    method = DualDecoder(Fixed(row(1.0, 1.0, 1.0, 1.0, 1.0)), [target], 3, (1, 5), MaskedRegression("l1"))
    terms = method(labeled_row(thickness=row(0.0, -1.0, math.nan, 4.0, -1.0)))
    assert terms["loss"].item() == pytest.approx((1 + 3) / 2)


def test_crop_without_a_target_gives_exactly_zero():
    network = Fixed(row(1.0, 2.0, 3.0, 4.0, 5.0))
    loss = DualDecoder(network, [THICKNESS], 3, (1, 5))(labeled_row(thickness=row(5.0, 5.0, 0.0, 0.0, 0.0)))["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert network.regression.grad.abs().max() == 0.0


def test_several_targets_read_their_own_channels_and_count_alike():
    other = {"name": "density", "kind": "dense", "structure": [1, 2], "scale": 10.0}
    regression = torch.cat([row(0.0, 0.0, 4.0, 4.0, 4.0), row(0.0, 30.0, 30.0, 30.0, 30.0)], dim=1)
    method = DualDecoder(Fixed(regression), [THICKNESS, other], 3, (1, 5), MaskedRegression("l1"), regression_weight=3)
    terms = method(labeled_row(thickness=row(0.0, 0.0, 2.0, 2.0, 2.0), density=row(0.0, 10.0, 20.0, 30.0, 0.0)))
    assert terms["regression/thickness"].item() == pytest.approx(1.0)
    assert terms["regression/density"].item() == pytest.approx((2 + 1 + 0) / 3)
    assert terms["regression"].item() == pytest.approx(1.0)
    assert terms["loss"].item() == pytest.approx(3.0)


def test_heteroscedastic_loss_by_hand():
    """The log-variance channels follow the values; they are in mm^2, the loss in units of the scale."""
    other = {"name": "density", "kind": "dense", "structure": 1}
    silent = torch.zeros(1, 1, 1, 5)
    log_variance = row(9.0, 9.0, 1.0, 2.0, 9.0)
    regression = torch.cat([row(0.0, 0.0, 7.0, 4.0, 0.0), silent, log_variance, silent], dim=1)
    method = DualDecoder(Fixed(regression), [THICKNESS, other], 3, (1, 5), MaskedRegression("heteroscedastic"))
    terms = method(labeled_row(thickness=row(0.0, 0.0, 3.0, 3.0, 0.0), density=silent))
    expected = 0.0
    for error, s in ((4 / 2, 1 - math.log(4)), (1 / 2, 2 - math.log(4))):
        expected += 0.5 * (math.exp(-s) * error**2 + s) / 2
    assert terms["regression/thickness"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", [VOLUME, SEVERITY], ids=["sum", "mean"])
def test_case_loss_and_gradient_on_one_window_are_those_of_a_plain_forward(target):
    """Sliding window and checkpointing leave nothing out and add nothing where the volume is one window."""
    targets = [THICKNESS, target]
    network = dual(targets)
    plain = copy.deepcopy(network)
    image = torch.randn(1, 1, 16, 16)
    truth = torch.tensor([0.7])
    loss = MaskedRegression("mse")
    method = DualDecoder(network, targets, 3, (16, 16), loss)
    batch = {**real_batch(), "case": {"image": image, target["name"]: truth}}
    terms = method(batch)
    terms[f"regression/{target['name']}"].backward()

    output = plain(image)
    structure = output[:, :3].detach().softmax(1)[:, 1:2] if target is SEVERITY else None
    prediction = reduce_to_case(output[:, 4:5], target["kind"], structure)
    expected = (prediction - truth).square().mean()
    expected.backward()
    torch.testing.assert_close(terms[f"regression/{target['name']}"], expected)
    found = dict(network.named_parameters())
    moved = 0
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            moved += 1
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert moved > 5


def test_case_level_sum_collects_all_windows():
    network = dual([VOLUME])
    image = torch.randn(1, 1, 16, 48)
    windows = [network(image[..., start : start + 16])[:, 3].sum() for start in (0, 16, 32)]
    expected = sum(windows)
    method = DualDecoder(network, [VOLUME], 3, (16, 16), MaskedRegression("l1"))
    truth = expected.detach() - 2.0
    terms = method({**real_batch(), "case": {"image": image, "volume": truth[None]}})
    assert terms["loss"].item() == pytest.approx(2.0, rel=1e-3)
    terms["loss"].backward()
    gradient = network.regression_decoder.heads[-1].weight.grad.clone()
    network.zero_grad()
    expected.backward()
    torch.testing.assert_close(gradient, network.regression_decoder.heads[-1].weight.grad, rtol=1e-4, atol=1e-6)


def test_a_case_without_its_number_teaches_nothing():
    network = dual([VOLUME])
    method = DualDecoder(network, [VOLUME], 3, (16, 16))
    terms = method({**real_batch(), "case": {"image": torch.randn(1, 1, 16, 16), "volume": torch.tensor([math.nan])}})
    terms["loss"].backward()
    assert terms["loss"].item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0.0 for p in network.parameters())


def test_a_number_a_case_is_divided_by_its_scale():
    target = {**VOLUME, "scale": 4.0}
    network = dual([target])
    image = torch.randn(1, 1, 16, 16)
    truth = network(image)[:, 3].sum(dim=(1, 2)).detach() + 8.0
    method = DualDecoder(network, [target], 3, (16, 16), MaskedRegression("l1"))
    assert method({**real_batch(), "case": {"image": image, "volume": truth}})["loss"].item() == pytest.approx(2.0)


def test_locked_parts_have_no_gradient_and_do_not_move():
    network = dual()
    lock_in = LockIn(network, ["encoder", "segmentation_decoder"])
    method = DualDecoder(network, [THICKNESS], 3, (16, 16)).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(lock_in.trainable_parameters(method), lr=0.1, momentum=0.9, weight_decay=0.1)
    terms = method(real_batch())
    assert "segmentation" not in terms, "it could teach nobody"
    terms["loss"].backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        locked = not name.startswith("regression_decoder.")
        assert (parameter.grad is None) == locked, name
        assert not locked or torch.equal(parameter, before[name]), name
    assert not torch.equal(network.regression_decoder.heads[-1].weight, before["regression_decoder.heads.0.weight"])


def test_segmentation_is_a_part_of_the_loss_when_it_has_a_weight():
    network = dual()
    method = DualDecoder(network, [THICKNESS], 3, (16, 16), segmentation_weight=0.4, regression_weight=2.0)
    batch = real_batch()
    terms = method(batch)
    segmentation = SegmentationLoss()(network.forward_all(batch["labeled"]["image"])[1], batch["labeled"]["label"])
    torch.testing.assert_close(terms["segmentation"], segmentation)
    torch.testing.assert_close(terms["loss"], 0.4 * segmentation + 2 * terms["regression"])
    terms["loss"].backward()
    assert network.segmentation_decoder.heads[-1].weight.grad.abs().max() > 0


def test_learnt_weights_by_hand():
    method = DualDecoder(dual(), [THICKNESS], 3, (16, 16), segmentation_weight=7.0, learn_weights=True)
    batch = real_batch()
    with torch.no_grad():
        method.weighting.log_variances.copy_(torch.tensor([0.5, -1.0]))
    terms = method(batch)
    segmentation, regression = terms["segmentation"].item(), terms["regression"].item()
    expected = 0.5 * (math.exp(-0.5) * segmentation + 0.5) + 0.5 * (math.exp(1.0) * regression - 1.0)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5), "the fixed weight has no say"
    terms["loss"].backward()
    gradient = [0.5 - 0.5 * math.exp(-0.5) * segmentation, 0.5 - 0.5 * math.exp(1.0) * regression]
    assert method.weighting.log_variances.grad.tolist() == pytest.approx(gradient, rel=1e-4)
    assert any(parameter is method.weighting.log_variances for parameter in method.trainable_parameters())


def test_a_batch_without_values_leaves_the_regressions_learnt_weight_alone():
    method = DualDecoder(dual(), [THICKNESS], 3, (16, 16), learn_weights=True)
    batch = real_batch()
    batch["labeled"]["thickness"] = torch.zeros_like(batch["labeled"]["thickness"])
    method(batch)["loss"].backward()
    segmentation, regression = method.weighting.log_variances.grad.tolist()
    assert segmentation != 0
    assert regression == 0


def test_heteroscedastic_loss_and_a_number_a_case_are_refused_together():
    with pytest.raises(BadInput, match=r"\['volume'\] are numbers a case"):
        DualDecoder(dual(), [THICKNESS, VOLUME], 3, (16, 16), MaskedRegression("heteroscedastic"))


def test_a_loss_that_falls_below_zero_has_no_learnt_weight():
    with pytest.raises(BadInput, match="learn_weights is on"):
        DualDecoder(dual(), [THICKNESS], 3, (16, 16), MaskedRegression("heteroscedastic"), learn_weights=True)


def test_a_perfect_regression_keeps_its_learnt_weight():
    """A loss of 0 where there are values is no sign that there are none."""
    method = DualDecoder(dual(), [THICKNESS], 3, (16, 16), learn_weights=True)
    method.regression_loss.forward = lambda prediction, truth, mask, log_variance: prediction.sum() * 0.0
    method(real_batch())["loss"].backward()
    assert method.weighting.log_variances.grad.tolist()[1] == pytest.approx(0.5)


def test_alignment_keeps_a_moving_encoder_near_the_reference():
    network = dual()
    reference = SegmentationNetwork(2, 1, 3, **LAYERS)
    reference.encoder.load_state_dict(network.encoder.state_dict())
    alignment = FeatureAlignment([0, 1])
    method = DualDecoder(
        network, [THICKNESS], 3, (16, 16), reference=reference, alignment=alignment, alignment_weight=0.3
    ).train()
    assert not reference.training
    batch = real_batch()
    assert method(batch)["alignment"].item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        network.encoder.stages[0][0].conv.weight.add_(0.3)
    terms = method(batch)
    image = batch["labeled"]["image"]
    torch.testing.assert_close(terms["alignment"], alignment(network.encoder(image), reference.encoder(image)))
    assert terms["alignment"].item() > 0.01
    torch.testing.assert_close(terms["loss"], terms["regression"] + 0.3 * terms["alignment"])
    terms["alignment"].backward()
    assert network.encoder.stages[0][0].conv.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert not [name for name in method.state_dict() if name.startswith("reference.")]


def test_stand_alone_regression_network():
    torch.manual_seed(0)
    network = RegressionNetwork(2, 1, targets=[THICKNESS], **LAYERS)
    terms = DualDecoder(network, [THICKNESS], 0, (16, 16))(real_batch())
    terms["loss"].backward()
    assert terms["loss"].item() > 0
    assert network.encoder.stages[0][0].conv.weight.grad.abs().max() > 0


def test_what_is_missing_is_said():
    with pytest.raises(BadInput, match="targets: the list is empty"):
        DualDecoder(dual(), [], 3, (16, 16))
    with pytest.raises(BadInput, match="alignment"):
        DualDecoder(dual(), [THICKNESS], 3, (16, 16), reference=SegmentationNetwork(2, 1, 3, **LAYERS))


def locked(network: DualDecoderNetwork, **settings: Any) -> DualDecoder:
    LockIn(network, ["encoder", "segmentation_decoder"])
    return DualDecoder(network, [VOLUME, SEVERITY], 3, (16, 16), MaskedRegression("l1"), **settings)


def whole_volumes() -> list[dict[str, dict[str, Tensor]]]:
    """Two cases of four windows each."""
    images = torch.randn(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(4))
    numbers = {"volume": torch.tensor([900.0]), "severity": torch.tensor([2.0])}
    return [{"labeled": {}, "case": {"image": image, **numbers}} for image in images]


@pytest.mark.parametrize("settings", [{}, {"regression_stage": 1, "attention_stages": []}, {"prior": False}])
def test_cached_features_train_the_same_and_run_locked_parts_once(settings: dict[str, Any]) -> None:
    shape = {"features": [4, 8, 8], "kernel_sizes": [3, 3, 3], "strides": [1, 2, 2], **settings}
    passes, losses, weights = [], [], []
    for size in (0.0, 1.0):
        method = locked(dual([VOLUME, SEVERITY], **shape), feature_cache=size)
        counted: list[int] = []
        method.network.encoder.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(3):
            for batch in whole_volumes():
                optimizer.zero_grad()
                loss = method(batch)["loss"]
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        losses.append(found)
        passes.append(len(counted))
        weights.append(method.network.regression_decoder.state_dict())
    # Twice a window, for the backward pass runs it again, in each of three epochs; or once a window in all.
    assert passes == [2 * 2 * 4 * 3, 2 * 4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][4] - losses[0][0]) > 1e-3
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_feature_cache_keeps_no_more_than_it_may() -> None:
    method = locked(dual([VOLUME, SEVERITY]), feature_cache=1.0)
    for batch in whole_volumes():
        method(batch)
    half = method.feature_cache.held // 2
    assert half > 0
    small = locked(dual([VOLUME, SEVERITY]), feature_cache=half / 1e9)
    counted: list[int] = []
    small.network.encoder.register_forward_hook(lambda *_: counted.append(1))
    for _ in range(2):
        for batch in whole_volumes():
            small(batch)
    assert small.feature_cache.held == half
    assert len(counted) == 8 + 4


def test_features_that_may_change_are_not_cached() -> None:
    network = dual([VOLUME, SEVERITY])
    method = DualDecoder(network, [VOLUME, SEVERITY], 3, (16, 16), feature_cache=1.0)
    method(whole_volumes()[0])
    LockIn(network, ["encoder"])
    method(whole_volumes()[0])
    assert method.feature_cache.held == 0
    # Without gradients, but in training mode, where dropout would draw anew.
    for part in (network.encoder, network.segmentation_decoder):
        part.requires_grad_(False)
    method(whole_volumes()[0])
    assert method.feature_cache.held == 0


def test_only_what_the_regression_reads_is_kept() -> None:
    """Of a window of 16 x 16: the first of stages of 4, 8 and 8 channels is not read, nor are logits for a sum."""
    shape = {"features": [4, 8, 8], "kernel_sizes": [3, 3, 3], "strides": [1, 2, 2], "targets": [VOLUME]}
    network = dual(**shape, regression_stage=1, attention_stages=[1])
    LockIn(network, ["encoder", "segmentation_decoder"])
    method = DualDecoder(network, [VOLUME], 3, (16, 16), feature_cache=1.0)
    method({"labeled": {}, "case": {"image": torch.randn(1, 1, 16, 16), "volume": torch.tensor([9.0])}})
    encoder, attended, edge = 8 * 8 * 8 + 8 * 4 * 4, 8 * 8 * 8, 16 * 16
    assert method.feature_cache.held == 4 * (encoder + attended + edge)
