"""Tiny trained bundles of all three kinds, their records, and the same packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BUNDLES, PARENT, PLAN, config
from monai.bundle import ConfigParser

from common.engines.origin import trained_settings
from common.networks import save_weights, state_digest
from common.packing import pack_bundle


def make_weights(bundle: str, folder: Path, *overlays: Path, seed: int = 0) -> Path:
    """Random weights and the record that a training writes beside them, which says where it ran."""
    parser = ConfigParser()
    parser.read_config([config(bundle, "inference.json"), *map(str, overlays)])
    settings = trained_settings(json.loads(json.dumps(parser.config)))
    torch.manual_seed(seed)
    network = parser.get_parsed_content("network_def")
    path = folder / bundle / "models" / "model.pt"
    save_weights(network, path)
    where = {"run_id": "f1c5", "tracking_uri": f"sqlite:///{folder}/mlruns.db"}
    parent = {"stage": PARENT.get(bundle), "weights": "ab" * 32, **where, "parents": {}}
    record = {"stage": bundle, **where, "weights": state_digest(network.state_dict()), "config": settings}
    record["parents"] = {PARENT[bundle]: parent} if bundle in PARENT else {}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="session")
def train() -> Callable[..., Path]:
    """Make weights of a bundle, and their record, in a folder; see :func:`make_weights`."""
    return make_weights


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The plan, and the weights of each bundle."""
    folder = tmp_path_factory.mktemp("trained")
    plan = folder / "plan.json"
    plan.write_text(json.dumps(PLAN))
    return {"plan": plan, **{bundle: make_weights(bundle, folder, plan) for bundle in BUNDLES}}


@pytest.fixture(scope="session")
def packed(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An archive of each bundle, all in one folder."""
    folder = tmp_path_factory.mktemp("packed")
    for bundle in BUNDLES:
        pack_bundle(bundle, folder / f"{bundle}-1.0.0.zip", trained["plan"], trained[bundle], version="1.0.0")
    return {bundle: folder / f"{bundle}-1.0.0.zip" for bundle in BUNDLES}


@pytest.fixture
def pack(trained: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Pack the tiny dual decoder, or what the arguments say."""

    def call(bundle: str = "dual_decoder", name: str = "packed.zip", **arguments: Any) -> Path:
        path = tmp_path / name
        pack_bundle(bundle, path, **{"plan": trained["plan"], "weights": trained.get(bundle), **arguments})
        return path

    return call
