"""Every method tells its supervised loss which structures a case's label knows, or refuses such cases."""

from __future__ import annotations

import pytest
from tiny_networks import real_batch, small

from common.errors import BadInput
from common.methods import (
    AggregatingDecoupling,
    BidirectionalCopyPaste,
    CrossPseudoSupervision,
    Distillation,
    KnowledgeDistillation,
    MeanTeacher,
    Supervised,
    UncertaintyAwareMeanTeacher,
)

METHODS = {
    "supervised": lambda: Supervised(small(0)),
    "distillation": lambda: Distillation(small(0), small(1), ["a", "b", "c"]),
    "mean teacher": lambda: MeanTeacher(small(0)),
    "ua-mt": lambda: UncertaintyAwareMeanTeacher(small(0), ["a", "b", "c"]),
    "cps": lambda: CrossPseudoSupervision(small(0)),
    "bcp": lambda: BidirectionalCopyPaste(small(0), pretraining=0.0),
    "knowledge distillation": lambda: KnowledgeDistillation(small(0), small(1)),
}


def partly_labeled() -> dict[str, dict]:
    batch = real_batch()
    batch["labeled"]["label"][batch["labeled"]["label"] == 2] = 0
    return {**batch, "labeled": {**batch["labeled"], "annotated": [[0, 1], [0, 1]]}}


@pytest.mark.parametrize("name", METHODS)
def test_a_structure_that_no_label_knows_gets_no_dice(name: str) -> None:
    method = METHODS[name]()
    seen = []

    def look(module, arguments, options):
        annotated = arguments[3] if len(arguments) > 3 else options.get("annotated")
        seen.append([ids for ids in annotated or [] if ids is not None])

    method.segmentation_loss.register_forward_pre_hook(look, with_kwargs=True)
    method(partly_labeled())
    assert sum(len(known) for known in seen) >= 2
    assert all(ids == [0, 1] for known in seen for ids in known)


@pytest.mark.parametrize("method", [AggregatingDecoupling, BidirectionalCopyPaste])
def test_methods_that_need_whole_labels_say_so(method: type) -> None:
    arguments = (["a", "b", "c"],) if method is AggregatingDecoupling else ()
    trained = method(small(0), *arguments)
    with pytest.raises(BadInput, match="annotated"):
        trained(partly_labeled())
