from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundle_runs import PLAN, config
from monai.bundle import ConfigParser
from torch import Tensor, nn

from common.data import generate_phantoms
from common.errors import BadInput
from common.losses import SegmentationLoss
from common.methods import aggregating_decoupling
from common.methods.aggregating_decoupling import (
    AggregatingDecoupling,
    DifficultyWeights,
    ddim_sample,
    reparameterize_and_smooth,
    weighted_loss,
)
from common.networks import SegmentationNetwork

NAMES = ("background", "lumen", "wall")
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SIGNAL = (1 - BETAS).cumprod(0)
ABLATIONS = ("augmentation", "diffusion", "difficulty_weights", "reparameterize_and_smooth", "background_weight")


def small(seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return SegmentationNetwork(3, 1, 3, [2, 4], [3, 3], [1, 2])


def make(seed: int = 0, **settings) -> AggregatingDecoupling:
    return AggregatingDecoupling(small(seed), NAMES, **{"sampling_steps": 2, **settings}).train()


def batch_of(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    image, unlabeled = torch.randn(2, 2, 1, 8, 8, 8, generator=generator)
    label = torch.randint(3, (2, 1, 8, 8, 8), generator=generator)
    return {"labeled": {"image": image, "label": label}, "unlabeled": {"image": unlabeled}}


def gradients(module: nn.Module) -> list[bool]:
    return [parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in module.parameters()]


def logits_of(prediction: Tensor, num_classes: int) -> Tensor:
    return 10.0 * F.one_hot(prediction[:, 0].long(), num_classes).movedim(-1, 1).float()


def test_difficulty_weights_over_three_steps_by_hand():
    """Five of ten voxels are class 1; the prediction finds two of them, then four, then one."""
    label = torch.tensor([1] * 5 + [0] * 5).reshape(1, 1, 10)
    difficulty = DifficultyWeights(2, window=50)
    # Dice of background and class 1: 2 |P and Y| / (|P| + |Y|).
    dice = [(10 / 13, 4 / 7), (10 / 11, 8 / 9), (10 / 14, 2 / 6)]
    learned, unlearned, error = [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]
    for step, found in enumerate((2, 4, 1)):
        prediction = torch.tensor([1] * found + [0] * (10 - found)).reshape(1, 1, 10)
        weights = difficulty(logits_of(prediction, 2), label)
        for k in range(2):
            error[k] = 49 / 50 * error[k] + 1 / 50 * (1 - dice[step][k])
            if step > 0:
                delta = dice[step][k] - dice[step - 1][k]
                change = delta * math.log(dice[step][k] / dice[step - 1][k])
                learned[k] = 49 / 50 * learned[k] + (change / 50 if delta > 0 else 0)
                unlearned[k] = 49 / 50 * unlearned[k] + (change / 50 if delta <= 0 else 0)
        expected = [2 * error[k] * ((unlearned[k] + 1e-8) / (learned[k] + 1e-8)) ** 0.2 for k in range(2)]
        assert weights.tolist() == pytest.approx(expected, rel=1e-4), step
    assert learned[1] > 0
    assert unlearned[1] > 0


def test_class_that_gets_worse_weighs_more():
    """Classes 1 and 2 end at the same Dice, the one from above, the other from below."""
    label = torch.tensor([0] * 4 + [1] * 4 + [2] * 4).reshape(1, 1, 12)
    difficulty = DifficultyWeights(3)
    for found in ((4, 1), (2, 2)):
        prediction = torch.zeros(1, 1, 12)
        prediction[..., 4 : 4 + found[0]], prediction[..., 8 : 8 + found[1]] = 1, 2
        weights = difficulty(logits_of(prediction, 3), label)
    assert weights[1] > 10 * weights[2]


def test_dice_of_zero_and_absent_classes_give_finite_weights():
    label = torch.zeros(1, 1, 6)
    label[..., :2] = 1
    nothing, found = torch.zeros(1, 1, 6), label.clone()
    difficulty = DifficultyWeights(3)
    for prediction in (nothing, nothing, found, nothing, nothing, found):
        weights = difficulty(logits_of(prediction, 3), label)
        assert torch.isfinite(weights).all()
        assert (weights > 0).all()
    assert weights[2] == 3, "a class never seen stays as it was: K, the weight of a Dice of 0"
    before = {name: value.clone() for name, value in difficulty.state_dict().items()}
    difficulty(logits_of(torch.ones(1, 1, 6), 3), torch.zeros(1, 1, 6))
    for name, value in difficulty.state_dict().items():
        assert torch.equal(value[1:], before[name][1:]), f"{name}: class 1 isn't in this label"
    assert difficulty.dice[0] == 0


def test_weighted_loss_by_hand():
    """Two voxels with p = (0.5, 0.3, 0.2) and (0.25, 0.5, 0.25), labels 1 and 2, weights (9, 2, 3)."""
    probabilities = torch.tensor([[[0.5, 0.25], [0.3, 0.5], [0.2, 0.25]]])
    label = torch.tensor([[[1, 2]]])
    cross_entropy = -(2 * math.log(0.3) + 3 * math.log(0.25)) / (2 + 3)
    dice = [2 * 0.3 / (0.8 + 1), 2 * 0.25 / (0.45 + 1)]
    expected = cross_entropy + (2 * (1 - dice[0]) + 3 * (1 - dice[1])) / 2
    loss = weighted_loss([probabilities.log()], label, torch.tensor([9.0, 2.0, 3.0]))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"squared": True}, {"batch_dice": False, "include_background": True}])
def test_weights_of_one_give_the_plain_loss(settings):
    label = batch_of()["labeled"]["label"]
    logits = [torch.randn(2, 3, size, size, size) for size in (8, 4, 2)]
    plain = SegmentationLoss(**settings)
    torch.testing.assert_close(weighted_loss(logits, label, torch.ones(3), plain), plain(logits, label))


def test_all_terms_have_the_dice_of_the_given_loss(monkeypatch):
    method, seen = make(segmentation_loss=SegmentationLoss(squared=True)), []
    given = lambda logits, label, weights, loss: seen.append(loss) or logits[0].sum()  # noqa: E731
    monkeypatch.setattr(aggregating_decoupling, "weighted_loss", given)
    method(batch_of())
    assert seen == [method.segmentation_loss]


def test_dice_of_one_foreground_class_is_weighted_too():
    label, logits = torch.tensor([[[0, 1, 1]]]), torch.randn(1, 2, 3)
    once, twice = (weighted_loss([logits], label, weight * torch.ones(2)) for weight in (1.0, 2.0))
    cross_entropy = F.cross_entropy(logits, label[:, 0])
    assert (twice - once).item() == pytest.approx((once - cross_entropy).item(), rel=1e-4)


def test_noise_on_labels_follows_the_closed_form(monkeypatch):
    """x_t = sqrt(a_t) (2 y - 1) + sqrt(1 - a_t) noise, with a_t the product of 1 - beta up to t."""
    method, batch, seen = make(), batch_of()["labeled"], {}
    steps = torch.tensor([0, 700])
    noise = torch.randn(2, 3, 8, 8, 8)
    monkeypatch.setattr(aggregating_decoupling.torch, "randint", lambda *size, **settings: steps)
    monkeypatch.setattr(aggregating_decoupling.torch, "randn_like", lambda like: noise)
    monkeypatch.setattr(method.network, "denoise", lambda image, noisy, step: seen.update(noisy=noisy, step=step))
    method._denoise(batch["image"], batch["label"])
    assert torch.equal(seen["step"], steps)
    clean = 2.0 * F.one_hot(batch["label"][:, 0], 3).movedim(-1, 1) - 1
    for case, step in enumerate(steps.tolist()):
        expected = SIGNAL[step].sqrt() * clean[case] + (1 - SIGNAL[step]).sqrt() * noise[case]
        torch.testing.assert_close(seen["noisy"][case], expected.float(), atol=1e-4, rtol=1e-4)


def test_steps_are_drawn_over_the_whole_range(monkeypatch):
    method, seen = make(), []
    monkeypatch.setattr(method.network, "denoise", lambda image, noisy, step: seen.append(step))
    torch.manual_seed(0)
    batch = batch_of()["labeled"]
    for _ in range(100):
        method._denoise(batch["image"], batch["label"])
    steps = torch.cat(seen)
    assert steps.min() < 50
    assert 949 < steps.max() < 1000


def test_ddim_against_the_closed_form():
    """A denoiser that knows the clean sample c leaves the noise direction alone, so on the grid's point t the sample is
    sqrt(a_t) c + sqrt(1 - a_t) e with the e of the start."""
    clean = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=torch.float64)
    start, visited = torch.randn(4, dtype=torch.float64), []

    def denoise(sample: Tensor, step: int) -> Tensor:
        visited.append(step)
        direction = (start - SIGNAL[999].sqrt() * clean) / (1 - SIGNAL[999]).sqrt()
        torch.testing.assert_close(sample, SIGNAL[step].sqrt() * clean + (1 - SIGNAL[step]).sqrt() * direction)
        return clean

    torch.testing.assert_close(ddim_sample(denoise, start, SIGNAL, 10), clean)
    assert visited == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


def test_ddim_of_a_normal_distribution():
    """Data of mean 0 and variance v have the best estimate sqrt(a) v / (a v + 1 - a) x: each step is a product."""
    variance = 0.01
    grid = (999, 500, 0)  # 499.5 rounds to even
    alphas = [SIGNAL[step].item() for step in grid]
    shares = [alpha**0.5 * variance / (alpha * variance + 1 - alpha) for alpha in alphas]
    start = torch.tensor([-0.8, 0.3], dtype=torch.float64)
    expected = start
    for alpha, after, share in zip(alphas, [*alphas[1:], 1.0], shares, strict=True):
        clean = share * expected
        expected = after**0.5 * clean + (1 - after) ** 0.5 * (expected - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    lookup = dict(zip(grid, shares, strict=True))
    found = ddim_sample(lambda sample, step: lookup[step] * sample, start, SIGNAL, 3)
    torch.testing.assert_close(found, expected)


def test_ddim_clips_the_clean_sample():
    found = ddim_sample(lambda sample, step: torch.tensor([-3.0, 0.2, 5.0]), torch.randn(3), SIGNAL.float(), 10)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.2, 1.0]))


def test_sampler_is_given_the_scaled_probabilities_of_the_noisy_image(monkeypatch):
    method = make()
    image, noisy = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 3, 8, 8, 8)
    expected = 2 * method.network.denoise(image, noisy, torch.tensor([40, 40]))[0].softmax(1) - 1
    torch.testing.assert_close(method._clean_label(image, noisy, 40), expected)


def test_votes_are_smoothed_and_added_by_hand(monkeypatch):
    """One voxel votes for class 1, its neighbours for class 0. The kernel's centre is c^3 with c = 1 / (1 + 2 e^-1/2),
    so class 1 wins that voxel where c^3 + p > (1 - c^3) + (1 - p): psi must be surer than 1 - c^3."""
    monkeypatch.setattr(aggregating_decoupling.F, "gumbel_softmax", lambda votes, tau, dim: votes)
    votes = torch.zeros(1, 2, 5, 5, 5)
    votes[:, 0] = 1
    votes[0, :, 2, 2, 2] = torch.tensor([0.0, 1.0])
    limit = 1 - (1 / (1 + 2 * math.exp(-0.5))) ** 3
    for probability, won in ((limit - 1e-3, 0), (limit + 1e-3, 1)):
        psi = torch.tensor([1 - probability, probability]).log().reshape(1, 2, 1, 1, 1).expand_as(votes)
        label = reparameterize_and_smooth(votes, psi)
        assert label.shape == (1, 1, 5, 5, 5)
        assert label[0, 0, 2, 2, 2] == won
        assert label.sum() == won, "elsewhere class 0 has more of the votes"


def test_border_keeps_the_votes_weight(monkeypatch):
    monkeypatch.setattr(aggregating_decoupling.F, "gumbel_softmax", lambda votes, tau, dim: votes)
    votes = torch.zeros(1, 2, 4, 4, 4)
    votes[:, 1] = 1
    psi = torch.tensor([0.95, 0.05]).log().reshape(1, 2, 1, 1, 1).expand_as(votes)
    assert (reparameterize_and_smooth(votes, psi) == 1).all()


def test_votes_are_gumbel_softmax_samples():
    """Formed again from the same random numbers: softmax(p + g), g = -log(exponential), with p in -1 to 1 as logits."""
    clean, psi = torch.rand(1, 3, 4, 4, 4) * 2 - 1, torch.randn(1, 3, 4, 4, 4)
    torch.manual_seed(5)
    label = reparameterize_and_smooth(clean, psi)
    torch.manual_seed(5)
    votes = (clean - torch.empty_like(clean).exponential_().log()).softmax(1)
    line = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0]) ** 2)
    kernel = torch.einsum("i,j,k->ijk", line, line, line) / line.sum() ** 3
    padded = F.pad(votes, [1] * 6, mode="replicate")
    smooth = F.conv3d(padded, kernel.expand(3, 1, 3, 3, 3), groups=3)
    assert torch.equal(label, (smooth + psi.softmax(1)).argmax(1, keepdim=True))


@pytest.mark.parametrize(("diffusion", "expected"), [(True, 0.99 * 1 + 0.01 * (3 + 5) / 2), (False, 0.99 + 0.01 * 5)])
def test_theta_moves_towards_the_others_before_each_step(diffusion, expected):
    method = make(diffusion=diffusion)
    parts = {"segmentation_decoder": 1.0, "diffusion_decoder": 3.0, "difficulty_decoder": 5.0}
    for name, value in parts.items():
        for parameter in getattr(method.network, name).parameters() if getattr(method.network, name) else ():
            nn.init.constant_(parameter, value)
    encoder = copy.deepcopy(method.network.encoder.state_dict())
    method.progress(0, 10)
    for parameter in method.network.segmentation_decoder.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))
    assert all((parameter == 5.0).all() for parameter in method.network.difficulty_decoder.parameters())
    assert all(torch.equal(value, encoder[name]) for name, value in method.network.encoder.state_dict().items())


@pytest.mark.parametrize(("step", "time"), [(0, 0.0), (3, 0.3), (10, 1.0)])
def test_loss_is_the_weighted_sum_of_its_parts(step, time):
    method = make(unlabeled_weight=10.0)
    method.progress(step, 10)
    terms = method(batch_of())
    mu = 10 * math.exp(-5 * (1 - time) ** 2)
    expected = terms["denoising"] + terms["difficulty"] + mu * terms["unlabeled"]
    torch.testing.assert_close(terms["loss"], expected)
    assert {f"weight/{name}" for name in NAMES} <= set(terms)


def test_each_branch_is_compared_with_what_it_has_to_learn(monkeypatch):
    method, batch = make(), batch_of()
    label = batch["labeled"]["label"]
    pseudo_label = (label + 1) % 3
    monkeypatch.setattr(method, "pseudo_label", lambda image, features: pseudo_label)
    monkeypatch.setattr(method.difficulty, "forward", lambda logits, label: torch.tensor([1.0, 2.0, 3.0]))
    torch.manual_seed(3)
    terms = method(batch)
    loss, network = SegmentationLoss(), method.network
    torch.manual_seed(3)
    by_xi = method._denoise(batch["labeled"]["image"], label)
    torch.testing.assert_close(terms["denoising"], loss(by_xi, label))
    psi, theta = network.difficulty_decoder, network.segmentation_decoder
    by_psi = psi.logits(psi(network.encode(batch["labeled"]["image"])))
    torch.testing.assert_close(terms["difficulty"], weighted_loss(by_psi, label, torch.tensor([1.0, 2.0, 3.0])))
    by_theta = theta.logits(theta(network.encode(batch["unlabeled"]["image"])))
    torch.testing.assert_close(terms["unlabeled"], loss(by_theta, pseudo_label))


def test_difficulty_is_measured_on_the_diffusion_branch(monkeypatch):
    """xi finds all labels, so every Dice is 1, whatever psi does."""
    method, batch = make(), batch_of()
    found = logits_of(batch["labeled"]["label"], 3)
    monkeypatch.setattr(method, "_denoise", lambda image, label: [found])
    monkeypatch.setattr(method, "pseudo_label", lambda image, features: batch["labeled"]["label"])
    method(batch)
    assert method.difficulty.dice.tolist() == [1.0, 1.0, 1.0]


def test_labels_never_train_theta():
    method = make()
    terms = method(batch_of())
    (terms["denoising"] + terms["difficulty"]).backward()
    network = method.network
    assert not any(gradients(network.segmentation_decoder))
    assert all(any(gradients(part)) for part in (network.encoder, network.diffusion_decoder, network.noisy_stem))
    assert any(gradients(network.difficulty_decoder))


def test_pseudo_labels_train_theta_and_the_encoder_alone():
    method = make()
    method(batch_of())["unlabeled"].backward()
    network = method.network
    assert any(gradients(network.segmentation_decoder))
    assert any(gradients(network.encoder))
    others = [network.diffusion_decoder, network.difficulty_decoder, network.noisy_stem, network.step_embedding]
    assert not any(any(gradients(part)) for part in others)


@pytest.mark.parametrize("autocast", [False, True])
def test_every_part_gets_a_gradient_also_in_mixed_precision(autocast):
    """Labels are formed without a graph under the same autocast as the losses; no cast weight of theirs may be used."""
    method = make()
    method.progress(5, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = method(batch_of())
    terms["loss"].backward()
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in terms.values())
    missing = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert not missing


def test_batch_without_structures_stays_finite():
    method, batch = make(), batch_of()
    batch["labeled"]["label"].zero_()
    for _ in range(2):
        terms = method(batch)
        terms["loss"].backward()
        assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters() if parameter.grad is not None)


def train(method: AggregatingDecoupling, optimizer: torch.optim.Optimizer, steps: range) -> float:
    for step in steps:
        torch.manual_seed(step)
        method.train()
        method.progress(step, 4)
        optimizer.zero_grad()
        loss = method(batch_of(step))["loss"]
        loss.backward()
        optimizer.step()
        method.after_step()
    return loss.item()


def sgd(method: AggregatingDecoupling) -> torch.optim.SGD:
    return torch.optim.SGD(method.trainable_parameters(), lr=0.01, momentum=0.9, nesterov=True)


def test_deployed_network_is_a_plain_one():
    method = make()
    before = copy.deepcopy(method.deployed.state_dict())
    train(method, sgd(method), range(2))
    state = method.deployed.state_dict()
    assert not torch.equal(state["encoder.stages.0.0.conv.weight"], before["encoder.stages.0.0.conv.weight"])
    plain = small(seed=9)
    plain.load_state_dict(state, strict=True)
    image = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain.eval()(image), method.eval().network(image))
    assert method.deployed.encoder is method.network.encoder
    names = [name for name in method.state_dict() if "segmentation_decoder" in name]
    assert sorted(names) == sorted(f"network.{name}" for name in plain.state_dict() if "segmentation_decoder" in name)


def test_state_read_back_continues_the_run():
    """A second method with other weights, given the first one's state, steps exactly as the first one goes on."""
    whole, resumed = make(0), make(5)
    first, second = sgd(whole), sgd(resumed)
    train(whole, first, range(2))
    assert whole.difficulty.seen.any()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(whole, first, range(2, 4)) == train(resumed, second, range(2, 4))
    other = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other[name]), name


def test_without_diffusion_psi_alone_labels():
    method, batch = make(diffusion=False), batch_of()
    terms = method(batch)
    assert "denoising" not in terms
    torch.testing.assert_close(terms["loss"], terms["difficulty"] + 10 * math.exp(-5) * terms["unlabeled"])
    psi, features = method.network.difficulty_decoder, method.network.encode(batch["unlabeled"]["image"])
    expected = psi.full_resolution(psi(features)).argmax(1, keepdim=True)
    assert torch.equal(method.pseudo_label(batch["unlabeled"]["image"], features), expected)
    assert not [name for name in method.state_dict() if "diffusion" in name or "noisy" in name or "shifts" in name]
    assert method.difficulty.seen.all(), "psi measures the difficulty"


def test_without_difficulty_weights_all_classes_weigh_the_same():
    method, batch = make(difficulty_weights=False), batch_of()
    terms = method(batch)
    psi = method.network.difficulty_decoder
    logits = psi.logits(psi(method.network.encode(batch["labeled"]["image"])))
    torch.testing.assert_close(terms["difficulty"], SegmentationLoss()(logits, batch["labeled"]["label"]))
    assert not [name for name in terms if name.startswith("weight/")]
    assert "difficulty" in make()(batch)
    assert not torch.equal(terms["difficulty"], make()(batch)["difficulty"])


def test_without_a_weight_of_its_own_the_background_weighs_as_the_structures(monkeypatch):
    weights = torch.tensor([0.02, 0.2, 0.4])
    seen = []
    monkeypatch.setattr(DifficultyWeights, "forward", lambda self, logits, label: weights.clone())
    monkeypatch.setattr(
        aggregating_decoupling, "weighted_loss", lambda logits, label, found, loss: seen.append(found) or found.sum()
    )
    make()(batch_of())
    terms = make(weigh_background=False)(batch_of())
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[0.02, 0.2, 0.4], [0.3, 0.2, 0.4]]))
    assert [round(float(terms[f"weight/{name}"]), 2) for name in make().class_names] == [0.3, 0.2, 0.4]


def test_without_reparameterize_and_smooth_probabilities_are_summed(monkeypatch):
    method = make(reparameterize=False)
    monkeypatch.setattr(aggregating_decoupling, "reparameterize_and_smooth", lambda *arguments: pytest.fail("called"))
    clean = torch.rand(2, 3, 8, 8, 8) * 2 - 1
    monkeypatch.setattr(aggregating_decoupling, "ddim_sample", lambda *arguments: clean)
    image = batch_of()["unlabeled"]["image"]
    features = method.network.encode(image)
    psi = method.network.difficulty_decoder
    expected = (clean.softmax(1) + psi.full_resolution(psi(features)).softmax(1)).argmax(1, keepdim=True)
    assert torch.equal(method.pseudo_label(image, features), expected)


def test_denoising_starts_from_new_normal_noise_each_time(monkeypatch):
    method, image = make(), batch_of()["unlabeled"]["image"]
    seen: list[Tensor] = []

    def denoise(image, noisy, steps):
        seen.append(noisy)
        return [torch.zeros_like(noisy)]

    monkeypatch.setattr(method.network, "denoise", denoise)
    for _ in range(2):
        method.pseudo_label(image, method.network.encode(image))
    first, _, second, _ = seen
    for noise in (first, second):
        assert noise.mean().item() == pytest.approx(0.0, abs=0.1)
        assert noise.std().item() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(first, second)


def test_pseudo_labels_come_from_as_many_denoising_steps_as_asked_for(monkeypatch):
    method, steps = make(sampling_steps=10), []
    denoise = method.network.denoise

    def watched(image: Tensor, noisy: Tensor, step: Tensor) -> list[Tensor]:
        steps.append(step.tolist())
        return denoise(image, noisy, step)

    monkeypatch.setattr(method.network, "denoise", watched)
    image = batch_of()["unlabeled"]["image"]
    label = method.pseudo_label(image, method.network.encode(image))
    assert steps == [[step, step] for step in range(999, -1, -111)]
    assert label.shape == (2, 1, 8, 8, 8)
    assert not label.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"decay": 1.5}, "decay: found 1.5"), ({"sampling_steps": 0}, "sampling_steps: found 0")],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(BadInput, match=message):
        make(**settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    generate_phantoms(folder, labeled=2, unlabeled=2, validation=1, shape=(24, 24, 20), seed=1, progress=False)
    return folder


def recipe(data: Path, folder: Path, ablation: str | None = None) -> ConfigParser:
    plan = folder / "plan.json"
    plan.write_text(json.dumps({**PLAN, "dataset_dir": str(data), "device": "cpu", "amp": False}))
    names = ["aggregating_decoupling"] + ([f"aggregating_decoupling_without_{ablation}"] if ablation else [])
    parser = ConfigParser()
    files = [config("student", "train.json"), *(config("student", f"recipes/{name}.json") for name in names)]
    parser.read_config([*files, str(plan)])
    for key, value in {
        "train#trainer#max_epochs": 1,
        "iterations_per_epoch": 1,
        "train#method#sampling_steps": 2,
    }.items():
        parser[key] = value
    return parser


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_recipe_trains_on_the_bundle_s_streams(ablation, data, tmp_path):
    parser = recipe(data, tmp_path, ablation)
    method = parser.get_parsed_content("train#method")
    assert isinstance(method, AggregatingDecoupling)
    assert (method.diffusion, method.difficulty is not None, method.reparameterize) == (
        ablation != "diffusion",
        ablation != "difficulty_weights",
        ablation != "reparameterize_and_smooth",
    )
    for stream in ("train#augmentation", "train#unlabeled_augmentation"):
        drawn = parser.get_parsed_content(stream).transforms[0].max_num_transforms
        assert drawn == (0 if ablation == "augmentation" else 3)
    assert (method.unlabeled_weight, method.ramp_up, method.decay) == (10.0, 1.0, 0.99)
    assert method.deployed is parser.get_parsed_content("network")
    assert type(parser.get_parsed_content("network_def")) is SegmentationNetwork
    optimizer = parser.get_parsed_content("train#optimizer")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.9, 3e-5, True)
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in method.parameters()}
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert {name: sorted(stream) for name, stream in batch.items()} == {
        "labeled": ["image", "label"],
        "unlabeled": ["image"],
    }
    method.progress(0, 1)
    assert torch.isfinite(method(batch)["loss"])


def test_recipe_needs_no_teacher(data, tmp_path):
    parser = recipe(data, tmp_path)
    parser["teacher_path"] = None
    parser["output_dir"], parser["ckpt_dir"] = str(tmp_path / "eval"), str(tmp_path / "models")
    assert parser.get_parsed_content("start_from_teacher") is False
    assert parser.get_parsed_content("teacher") is None
    assert parser.get_parsed_content("initialize#2") is False


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_every_key_of_the_overlay_is_one_of_the_bundle(ablation):
    """A key that the config lacks would be set without effect."""
    parser = ConfigParser()
    parser.read_config(config("student", "train.json"))
    names = ["aggregating_decoupling"] + ([f"aggregating_decoupling_without_{ablation}"] if ablation else [])
    for name in names:
        overlay = json.loads(Path(config("student", f"recipes/{name}.json")).read_text())
        for key in overlay:
            known = key in parser or "_target_" in parser[key.rpartition("#")[0]]
            assert key.startswith("_") or known, key
        for key, value in overlay.items():
            parser[key] = value
