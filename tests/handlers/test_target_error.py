from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator

from common.handlers import TargetError
from common.transforms import monitor_postprocessing

THICKNESS = {"name": "thickness", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}
DENSITY = {"name": "density", "missing": -1}


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, -1)


def case(prediction: torch.Tensor, truth: torch.Tensor, *label: int) -> dict:
    return {"thickness_pred": prediction, "thickness": truth, "label": torch.tensor(label).reshape(1, 1, -1)}


def measure(targets: list, *iterations: list) -> float:
    evaluator = Engine(lambda engine, batch: batch)
    TargetError(targets).attach(evaluator, "val_error")
    return evaluator.run(list(iterations)).metrics["val_error"]


def test_mean_over_voxels_of_all_cases_by_hand():
    """First case: errors 1 and 3 mm; outside the wall and without a target nothing counts. Second case: 2 mm. All in
    units of the scale of 2 mm: (0.5 + 1.5 + 1) / 3."""
    first = case(row(4.0, 6.0, 9.0, 9.0), row(3.0, 3.0, 0.0, 5.0), 2, 2, 2, 1)
    second = case(row(1.0, 1.0, 1.0, 1.0), row(3.0, 0.0, 0.0, 0.0), 2, 2, 2, 2)
    assert measure([THICKNESS], [first], [second]) == pytest.approx(1.0)
    assert measure([THICKNESS], [first, second]) == pytest.approx(1.0)


def test_all_targets_weigh_the_same_whatever_their_voxels():
    wall = case(row(5.0, 5.0), row(3.0, 3.0), 2, 2)  # 1 and 1 in units of the scale
    both = {**wall, "density_pred": row(4.0, 0.0), "density": row(0.0, -1.0)}  # 4
    assert measure([THICKNESS, DENSITY], [both]) == pytest.approx((1 + 4) / 2)
    volume = {"name": "volume", "kind": "sum", "scale": 10.0}
    numbers = {**both, "volume_case": 25.0, "volume": torch.tensor([5.0])}
    assert measure([THICKNESS, DENSITY, volume], [numbers]) == pytest.approx((1 + 4 + 2) / 3)
    unknown = {**both, "volume_case": 25.0, "volume": torch.tensor([math.nan])}
    assert measure([THICKNESS, DENSITY, volume], [unknown]) == pytest.approx((1 + 4) / 2)


def test_monais_evaluator_whose_output_lacks_the_targets():
    """MONAI hands on image, label and prediction alone; what else was loaded stays in the batch."""
    cases = [
        {"image": torch.full((1, 2, 2), value), "label": torch.ones(1, 2, 2), "density": torch.zeros(1, 2, 2)}
        for value in (1.0, 3.0)
    ]
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        DataLoader(cases, batch_size=1),
        torch.nn.Identity(),
        postprocessing=monitor_postprocessing(0, [DENSITY]),
        key_val_metric={"val_error": TargetError([DENSITY])},
    )
    evaluator.run()
    assert evaluator.state.metrics["val_error"] == pytest.approx(2.0)


def test_a_case_without_the_target_is_left_out():
    wall = case(row(5.0, 5.0), row(3.0, 3.0), 2, 2)
    without = {key: value for key, value in wall.items() if key != "thickness"}
    assert measure([THICKNESS], [without, wall]) == pytest.approx(1.0)
    assert math.isnan(measure([THICKNESS], [without]))
    assert math.isnan(measure([THICKNESS], [case(row(5.0), row(0.0), 2)])), "no voxel has a target"


def test_it_starts_anew_with_every_validation():
    metric = TargetError([THICKNESS])
    for error in (2.0, 4.0):
        metric.reset()
        metric.update([case(row(3.0 + error), row(3.0), 2)])
        assert metric.compute() == pytest.approx(error / 2)


def test_tensors_with_meta_data_and_half_precision():
    half = case(MetaTensor(row(5.0, 4.0).half()), MetaTensor(row(3.0, 3.0)), 2, 2)
    assert measure([THICKNESS], [half]) == pytest.approx(0.75)
