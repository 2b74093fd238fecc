"""Every method tells its supervised loss which structures a case's label knows, or refuses such cases.

Those that learn organs from several teachers or tasks (MS-KD, co-training, DoDNet) have tests of their own.
"""

from __future__ import annotations

import pytest
import torch
from tiny_networks import real_batch, small

from common.errors import BadInput
from common.methods import (
    AggregatingDecoupling,
    ASENet,
    BidirectionalCopyPaste,
    CrossPseudoSupervision,
    Distillation,
    DualDecoder,
    KnowledgeDistillation,
    MeanTeacher,
    Supervised,
    UncertaintyAwareMeanTeacher,
)
from common.networks import DualDecoderNetwork
from common.networks.discriminator import Discriminator

DEPTH = {"name": "depth", "unit": "mm", "structure": 2, "missing": 0}


def dual_decoder() -> DualDecoder:
    network = DualDecoderNetwork(
        2, 1, 3, [2, 4], [3, 3], [1, 2], [DEPTH], attention_stages=[0], attention_window=[2, 2]
    )
    return DualDecoder(network, [DEPTH], 3, (16, 16), segmentation_weight=1.0)


METHODS = {
    "supervised": lambda: Supervised(small(0)),
    "distillation": lambda: Distillation(small(0), small(1), ["a", "b", "c"]),
    "mean teacher": lambda: MeanTeacher(small(0)),
    "ua-mt": lambda: UncertaintyAwareMeanTeacher(small(0), ["a", "b", "c"]),
    "cps": lambda: CrossPseudoSupervision(small(0)),
    "bcp": lambda: BidirectionalCopyPaste(small(0), pretraining=0.0),
    "bcp's pre-training": lambda: BidirectionalCopyPaste(small(0), pretraining=1.0),
    "ase-net": lambda: ASENet(small(0), lambda: Discriminator(2, 3, 1, (2, 4), (3, 3), (2, 2))),
    "dual decoder": lambda: dual_decoder(),
    "knowledge distillation": lambda: KnowledgeDistillation(small(0), small(1)),
}


def partly_labeled() -> dict[str, dict]:
    """The first case knows class 1, the second class 2."""
    batch = real_batch()
    label = batch["labeled"]["label"]
    label[0][label[0] == 2] = 0
    label[1][label[1] == 1] = 0
    return {**batch, "labeled": {**batch["labeled"], "annotated": [[0, 1], [0, 2]], "depth": torch.ones_like(label)}}


@pytest.mark.parametrize("name", METHODS)
def test_a_structure_that_no_label_knows_gets_no_dice(name: str) -> None:
    method = METHODS[name]()
    seen = []

    def look(module, arguments, options):
        annotated = arguments[3] if len(arguments) > 3 else options.get("annotated")
        seen.append([ids for ids in annotated or [] if ids is not None])

    method.segmentation_loss.register_forward_pre_hook(look, with_kwargs=True)
    method(partly_labeled(), "network" if name == "ase-net" else "")
    known = [ids for call in seen for ids in call]
    assert len(known) >= 2
    assert known == [[0, 1], [0, 2]] * (len(known) // 2), "each case's own, in the order of the cases"


def test_a_method_that_needs_whole_labels_says_so() -> None:
    method = AggregatingDecoupling(small(0), ["a", "b", "c"])
    with pytest.raises(BadInput, match="annotated"):
        method(partly_labeled())
    whole = real_batch()
    whole["labeled"]["annotated"] = [[1, 2], [0, 1, 2]]  # all that there is
    assert torch.isfinite(method(whole)["loss"])


def test_bcp_s_pretraining_learns_each_region_by_what_its_label_knows() -> None:
    method = METHODS["bcp's pre-training"]()
    batch = partly_labeled()
    batch["labeled"]["label"] = torch.stack([torch.ones(1, 16, 16), torch.full((1, 16, 16), 2)]).long()
    seen: list[tuple] = []
    method.segmentation_loss.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1:]))
    assert torch.isfinite(method(batch)["loss"])
    for label, region, annotated in seen:
        (structure,) = label[region].unique().tolist()
        assert annotated == [[0, structure]]
    assert torch.equal(seen[0][1], ~seen[1][1])
