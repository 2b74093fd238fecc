from __future__ import annotations

import pytest

from common.errors import BadInput
from common.switches import is_on


@pytest.mark.parametrize(("value", "on"), [(True, True), ("true", True), ("False", False), (False, False)])
def test_a_switch(value: bool | str, on: bool) -> None:
    assert is_on(value, "overview") is on
    with pytest.raises(BadInput, match="overview: found 'maybe'"):
        is_on("maybe", "overview")
