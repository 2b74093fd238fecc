from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import PLAN
from functorch.compile import make_boxed_func
from recipe_steps import train as train_recipe
from tiny_networks import real_batch, small
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from common.engines import SemiSupervisedTrainer, trainer
from common.engines.compilation import compiled_networks
from common.errors import BadInput
from common.methods import MeanTeacher, Method, Supervised


class Backend:
    """Compiles nothing, and keeps the strides of each image that came through what it was given."""

    def __init__(self) -> None:
        self.calls = 0
        self.images: list[tuple[int, ...]] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def call(*values: Tensor) -> Any:
            self.calls += 1
            self.images += [value.stride() for value in values if value.shape[1:] == (1, 16, 16)]
            return graph(*values)

        return call


class Numbers(Method):
    """No network whose passes could be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Any, optimizer: str = "") -> dict[str, Tensor]:
        return {"loss": self.weight.square()}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def make_boxed_func_of(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    return make_boxed_func(graph)


def train(method: Method, compile_it: bool | str) -> SemiSupervisedTrainer:
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
    engine = SemiSupervisedTrainer("cpu", 2, [real_batch()] * 2, method, optimizer, amp=False, compile=compile_it)
    engine.run()
    return engine


def test_compiled_training_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    monkeypatch.setattr(trainer, "compiled_networks", partial(compiled_networks, backend=backend))
    plain, compiled = MeanTeacher(small(0)), MeanTeacher(small(0))
    losses = [train(method, on).state.output["loss"] for method, on in ((plain, False), (compiled, "true"))]
    assert losses[0] == losses[1]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)
    # Both streams in one pass of each of four steps; the teacher, without gradients, has none.
    assert len(backend.images) == 4
    assert {stride[1] for stride in backend.images} == {1}, "the channels of a pixel lie side by side"


def test_nothing_is_compiled_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    train(Supervised(small(0)), "false")


def test_only_training_passes_with_gradients_are_compiled() -> None:
    method, backend, image = Supervised(small(0)), Backend(), torch.randn(2, 1, 16, 16)
    expected = method.network.eval()(image)
    with compiled_networks(method, backend):
        assert torch.equal(method.network(image), expected)
        method.network.train()
        with torch.no_grad():
            method.network(image)
        assert not backend.images
        method.network(image)
        assert len(backend.images) == 1


def test_a_copy_made_meanwhile_has_its_own_weights() -> None:
    method, image = Supervised(small(0)), torch.randn(2, 1, 16, 16)
    with compiled_networks(method, Backend()):
        copied = copy.deepcopy(method.network)
        torch.nn.init.zeros_(copied.segmentation_decoder.heads[-1].weight)
        for mode in (True, False):
            assert copied.train(mode)(image).std() < method.network.train(mode)(image).std()


def test_nothing_is_left_in_the_network_even_after_an_error() -> None:
    method, backend = Supervised(small(0)), Backend()
    with pytest.raises(KeyError), compiled_networks(method, backend):
        raise KeyError("a handler's")
    copied = copy.deepcopy(method.network)
    copied.train()(torch.randn(2, 1, 16, 16))
    assert not backend.images
    torch.jit.script(copied)


def test_a_method_that_takes_its_network_apart_says_so() -> None:
    with pytest.raises(BadInput, match=r"compile: found true, but Numbers .*Set compile to false"):
        train(Numbers(), True)


def test_what_cannot_be_compiled_says_why() -> None:
    def broken(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found")

    method = Supervised(small(0))
    with (
        pytest.raises(
            BadInput, match=r"compile: .*SegmentationNetwork.*No working C[+][+] compiler.*Set compile to false"
        ),
        compiled_networks(method, broken),
    ):
        method.network.train()(torch.randn(2, 1, 16, 16))


def test_a_backward_pass_that_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise BackendCompilerFailed(broken, RuntimeError("no backward today"), None)  # as PyTorch's own does

    backend = aot_autograd(fw_compiler=make_boxed_func_of, bw_compiler=broken)
    monkeypatch.setattr(trainer, "compiled_networks", partial(compiled_networks, backend=backend))
    with pytest.raises(BadInput, match=r"compile: .*no backward today"):
        train(Supervised(small(0)), True)


def test_an_error_of_the_network_itself_is_not_taken_for_the_compilers() -> None:
    method = Supervised(small(0))
    with pytest.raises(BadInput, match="patch_size"), compiled_networks(method, Backend()):
        method.network.train()(torch.randn(2, 1, 15, 16))


def test_the_switch_is_checked() -> None:
    with pytest.raises(BadInput, match="compile: found 'yes'"):
        train(Supervised(small(0)), "yes")


# Several networks and optimisers, a moving average, locked parts, kept features: what is trained is compiled in each.
@pytest.mark.parametrize(
    "name", ["distillation", "cps", "ase_net", "dual_decoder", "dual_decoder_severity", "dual_decoder_end_to_end"]
)
def test_everything_takes_the_same_steps_compiled(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = Backend()
    monkeypatch.setattr(trainer, "compiled_networks", partial(compiled_networks, backend=backend))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    states = [train_recipe(name, tmp_path, str(plan), (0,), amp="bf16", compile=on) for on in (False, True)]
    assert backend.calls
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, msg=key)
