from __future__ import annotations

from typing import Any

import pytest

from common.errors import BadInput
from common.targets import check_targets

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
GOOD = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": [1, 2], "scale": 2.0}


def test_good_descriptions_pass() -> None:
    check_targets([GOOD, {"name": "severity"}, {"name": "left-lung_2", "kind": "sum", "structure": None}], LABELS)
    check_targets([{**GOOD, "structure": 9}])  # without labels there is nothing to compare with


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"thickness": GOOD}, "expected a list"),
        ("thickness", "expected a list"),
        (["thickness"], "found 'thickness'"),
        ([{"unit": "mm"}], "expected one such as"),
        ([{**GOOD, "name": "seg"}], "'seg' is taken"),  # its file would be the label's
        ([{**GOOD, "name": "volumes"}], "'volumes' is taken"),
        ([{**GOOD, "name": "../evil"}], "letters, digits"),
        ([{**GOOD, "name": ""}], "letters, digits"),
        ([GOOD, GOOD], "two targets are called 'thickness'"),
        ([{**GOOD, "kind": "map"}], "kind 'map'"),
        ([{**GOOD, "scale": 0}], "scale 0"),
        ([{**GOOD, "scale": "2"}], "scale '2'"),
        ([{**GOOD, "structure": 3}], "structure 3; expected among the labels 0, 1, 2"),
        ([{**GOOD, "structure": "wall"}], "structure 'wall'"),
    ],
)
def test_bad_descriptions_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_targets(targets, LABELS)
