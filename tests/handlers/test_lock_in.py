from __future__ import annotations

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from common.engines import SemiSupervisedTrainer
from common.handlers import Checkpoint, LockIn, LockInBroken
from common.methods import Method, MovingAverage
from common.networks import DualDecoderNetwork, state_digest


class Network(nn.Module):
    """Parts to lock with all that could move: weights, norm statistics, a counter, dropout, a buffer beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        self.encoder.register_buffer("passing", torch.zeros(1), persistent=False)
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


class Fit(Method):
    """Trains a network; ``spoil`` is called after every step, as whatever could move what is locked."""

    def __init__(self, network: nn.Module, spoil=lambda network: None) -> None:
        super().__init__()
        self.network, self.spoil = network, spoil

    def forward(self, batch, optimizer=""):
        return {"loss": (self.network(batch["labeled"]["image"]) - 1).square().mean()}

    def after_step(self) -> None:
        self.spoil(self.network)


def train(network: nn.Module, handlers: list, spoil=lambda network: None, optimizer=None) -> Fit:
    torch.manual_seed(1)
    batches = [{"labeled": {"image": torch.randn(4, 2)}} for _ in range(3)]
    method = Fit(network, spoil)
    optimizer = optimizer or torch.optim.SGD(method.trainable_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    SemiSupervisedTrainer("cpu", 2, batches, method, optimizer, False, train_handlers=handlers).run()
    return method


def norm_layer_in_training_mode(network: Network) -> None:
    """As a method that switches modes by itself, within its step."""
    network.encoder[1].register_forward_pre_hook(lambda layer, inputs: setattr(layer, "training", True))


def moving_average_that_writes_back(network: Network) -> None:
    average = MovingAverage(network, 0.5)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.add_(0.1)
    network.load_state_dict(average.module.state_dict())


def buffer_that_no_state_dict_has(network: Network) -> None:
    network.encoder.passing += 1


def one_weight_by_hand(network: Network) -> None:
    with torch.no_grad():
        network.encoder[0].weight[0, 0].mul_(1 + 1e-6)


def counter(network: Network) -> None:
    network.encoder[1].num_batches_tracked += 1


def test_locked_parts_stay_as_they_are_bit_for_bit(caplog):
    network = Network()
    lock_in = LockIn(network, ["encoder"])
    before = copy.deepcopy(network.state_dict())
    image = torch.randn(4, 2)
    answer = network.encoder(image)
    with caplog.at_level(logging.INFO):
        train(network, [lock_in])
    after = network.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("decoder.")
    }
    assert torch.equal(network.encoder(image), answer)
    assert lock_in.before == lock_in.digest() == state_digest(lock_in.locked_state())
    assert f"digest {lock_in.digest()[:12]}" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (norm_layer_in_training_mode, r"3 locked tensors changed.*encoder\.1\."),
        (moving_average_that_writes_back, r"encoder\.0\.weight"),
        (buffer_that_no_state_dict_has, r"encoder\.passing"),
        (one_weight_by_hand, r"1 locked tensors changed.*encoder\.0\.weight"),
        (counter, r"1 locked tensors changed.*encoder\.1\.num_batches_tracked"),
    ],
)
def test_whatever_moves_a_locked_tensor_is_caught_and_no_weights_are_written(tmp_path, spoil, named):
    network = Network()
    lock_in = LockIn(network, ["encoder"])
    model = tmp_path / "model.pt"
    model.write_bytes(b"old")
    handlers = [lock_in, Checkpoint({}, network, str(tmp_path), str(model))]
    with pytest.raises(LockInBroken, match=named):
        train(network, handlers, spoil)
    assert model.read_bytes() == b"old"


def two_epochs(folder: Path, resume: bool) -> Network:
    """Two epochs of three steps, with a checkpoint after each; the first run breaks off in the second epoch."""
    torch.manual_seed(1)
    network = Network()
    lock_in = LockIn(network, ["encoder"])

    def break_off(network: Network) -> None:
        if method.step == 4 and not resume:
            raise RuntimeError("power cut")

    method = Fit(network, break_off)
    handlers = [lock_in, Checkpoint({"method": method}, network, str(folder), str(folder / "model.pt"), resume)]
    batches = [{"labeled": {"image": torch.randn(4, 2)}} for _ in range(3)]
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
    SemiSupervisedTrainer("cpu", 2, batches, method, optimizer, False, train_handlers=handlers).run()
    return network


def test_a_resumed_run_keeps_the_lock(tmp_path, caplog):
    with pytest.raises(RuntimeError, match="power cut"):
        two_epochs(tmp_path, resume=False)
    with caplog.at_level(logging.INFO):
        network = two_epochs(tmp_path, resume=True)
    assert "after epoch 1" in caplog.text
    assert "Lock-in holds" in caplog.text
    before = Network().state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name
    assert (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("name", ["encoder.0.weight", "encoder.1.running_mean"])
def test_a_checkpoint_with_other_locked_weights_is_refused_before_the_first_step(tmp_path, name):
    with pytest.raises(RuntimeError, match="power cut"):
        two_epochs(tmp_path, resume=False)
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["method"][f"network.{name}"] += 1e-6
    torch.save(saved, path)
    pattern = rf"checkpoint to resume from has other values for 1 locked tensors.*{re.escape(name)}"
    with pytest.raises(LockInBroken, match=pattern):
        two_epochs(tmp_path, resume=True)
    assert torch.load(path, weights_only=True)["epoch"] == 1, "no epoch was trained"
    assert not (tmp_path / "model.pt").exists()


def test_without_the_lock_the_same_training_moves_everything():
    """So the proof above proves something."""
    network = Network()
    before = copy.deepcopy(network.state_dict())
    train(network, [])
    assert not any(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_optimizer_that_holds_a_locked_parameter_is_refused_before_the_first_step():
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    lock_in = LockIn(network, ["encoder"])
    before = copy.deepcopy(network.state_dict())
    for optimizers in (
        optimizer,
        {"first": torch.optim.SGD(network.decoder.parameters(), lr=0.1), "second": optimizer},
    ):
        with pytest.raises(LockInBroken, match=r"optimiser holds the locked parameter 'encoder\.0\.weight'"):
            train(network, [lock_in], optimizer=optimizers)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_parameters_for_the_optimizer():
    network = Network()
    lock_in = LockIn(network, ["encoder"])
    assert [id(p) for p in lock_in.trainable_parameters()] == [id(p) for p in network.decoder.parameters()]
    method = nn.ModuleDict({"network": network, "own": nn.Linear(1, 1)})
    expected = [*network.decoder.parameters(), *method["own"].parameters()]
    assert [id(p) for p in lock_in.trainable_parameters(method)] == [id(p) for p in expected]


def test_evaluation_mode_holds_through_every_way_to_train():
    network = Network().train()
    LockIn(network, ["encoder"])
    around = nn.Sequential(network)
    for switch in (network.train, network.encoder.train, network.encoder[1].train, around.train, around.requires_grad_):
        switch()
        assert not any(module.training for module in network.encoder.modules())
    assert all(module.training for module in network.decoder.modules())
    network.eval()
    assert not network.decoder.training


def test_a_copy_is_locked_by_itself():
    network = Network()
    LockIn(network, ["encoder"])
    other = copy.deepcopy(network)
    network.encoder[2].training = True
    other.train()
    assert network.encoder[2].training, "the copy's train() is not the original's"
    assert not other.encoder[2].training
    assert other.decoder[2].training


@pytest.mark.parametrize(
    ("patterns", "locked"),
    [
        (["encoder"], {"encoder.0", "encoder.1", "encoder.passing"}),
        (["encoder.*"], {"encoder.0", "encoder.1", "encoder.passing"}),
        (["*.0"], set()),
        (["*.0.*"], {"encoder.0", "decoder.0"}),
        (["encoder.?", "decoder.1"], {"encoder.0", "encoder.1", "decoder.1"}),
        (["encoder.1.running_*"], {"encoder.1"}),
        ([], set()),
    ],
)
def test_patterns(patterns, locked):
    network = Network()
    if patterns == ["*.0"]:
        # A star is taken as it stands, and no tensor's name ends so.
        with pytest.raises(ValueError, match="nothing in the network matches"):
            LockIn(network, patterns)
        return
    names = LockIn(network, patterns).locked_state()
    assert {".".join(name.split(".")[:2]) for name in names} == locked
    if patterns == ["encoder.1.running_*"]:
        assert sorted(names) == ["encoder.1.running_mean", "encoder.1.running_var"]
        assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("pattern", ["encodr", "encoder.9", "decoders.*", ""])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_parts(pattern):
    network = Network()
    with pytest.raises(ValueError, match=r"nothing in the network matches .*its parts are encoder, decoder"):
        LockIn(network, ["encoder", pattern])
    assert all(parameter.requires_grad for parameter in network.parameters()), "and nothing was locked"


def test_locking_nothing_proves_nothing_and_stops_nothing(caplog):
    network = Network()
    with caplog.at_level(logging.INFO):
        train(network, [LockIn(network, [])])
    assert "Lock-in" not in caplog.text


def test_any_engine_will_do():
    network = Network()
    engine = Engine(lambda engine, batch: None)
    LockIn(network, ["encoder"]).attach(engine)
    engine.run([0], 1)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: one_weight_by_hand(network))
    with pytest.raises(LockInBroken):
        engine.run([0], 1)


def test_below_locked_parts_of_the_dual_network_there_is_no_graph():
    target = {"name": "thickness", "kind": "dense"}
    network = DualDecoderNetwork(2, 1, 2, [2, 4], [3, 3], [1, 2], [target], attention_stages=[0], attention_heads=1)
    image = torch.randn(1, 1, 8, 8)
    features, logits, regression = network.forward_all(image)
    assert features[0].requires_grad
    assert logits[0].requires_grad
    LockIn(network, ["encoder", "segmentation_decoder"])
    features, logits, regression = network.train().forward_all(image)
    assert not any(feature.requires_grad for feature in features)
    assert not any(level.requires_grad for level in logits)
    assert regression.requires_grad
