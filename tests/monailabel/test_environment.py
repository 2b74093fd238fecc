"""What MONAI Label is installed with."""

from __future__ import annotations

from pathlib import Path

from label_server import APP, ROOT

# MONAI Label works with pydicom 2 alone.
DIFFERENT = {"pydicom"}


def pinned(path: Path) -> dict[str, str]:
    pairs = (line.split("==") for line in path.read_text().splitlines())
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_has_the_versions_that_everything_else_is_tested_with() -> None:
    """Weights, configs and code are those of this checkout: what runs them should be, too."""
    own, ours = pinned(APP / "constraints.txt"), pinned(ROOT / "constraints.txt")
    both = (set(own) & set(ours)) - DIFFERENT
    assert {name: own[name] for name in both} == {name: ours[name] for name in both}
    assert {"torch", "monai", "numpy", "nibabel", "itk"} <= both


def test_what_is_asked_for_is_pinned() -> None:
    lines = (APP / "requirements.txt").read_text().splitlines()
    asked = {line.split("[")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert asked <= set(pinned(APP / "constraints.txt"))
