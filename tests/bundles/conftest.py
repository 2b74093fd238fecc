"""Tiny phantoms, and the three stages trained on them once through MONAI's own command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import BUNDLES, PLAN, SHORT, Chain, config, run

from common.data import generate_phantoms


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    generate_phantoms(folder, labeled=2, unlabeled=2, validation=2, shape=(24, 24, 20), seed=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(PLAN))
    return path


@pytest.fixture(scope="session")
def chain(phantoms: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Teacher, student and dual decoder, each from the last one's weights."""
    chain = Chain(phantoms, plan, tmp_path_factory.mktemp("chain"))
    for bundle in BUNDLES:
        done = run(
            [config(bundle, "train.json"), str(plan)],
            {
                **chain.settings(bundle),
                "output_dir": str(chain.output(bundle)),
                "ckpt_dir": str(chain.model(bundle).parent),
            },
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return chain


@pytest.fixture
def workflow(plan: Path) -> Callable[..., None]:
    """A bundle's training, or what ``names`` say, in this process: seconds faster than a process of its own."""
    from monai.bundle import run as run_bundle

    def call(bundle: str, *overlays: str, names: Sequence[str] = ("train.json",), **settings: Any) -> None:
        files = [*(config(bundle, name) for name in names), *overlays, str(plan)]
        short = SHORT if "train.json" in names else {"device": "cpu", "amp": False}
        hook = sys.excepthook
        try:
            run_bundle(config_file=files, **{**short, **settings})
        finally:
            sys.excepthook = hook

    return call
