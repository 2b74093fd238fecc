"""The exports that docs/export.md shows, of networks whose attention does something."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from bundle_runs import BUNDLES, ROOT, config
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ckpt_export, onnx_export
from torch import nn

from common.networks import save_weights

PAGE = (ROOT / "docs" / "export.md").read_text()


# Beside a plan of cubes: crops of two dimensions, and flat ones of thick slices, whose attention sees no edge across.
FLAT = {
    "spatial_dims": 3,
    "patch_size": [16, 16, 8],
    "kernel_sizes": [[3, 3, 1], 3, 3, 3],
    "strides": [1, [2, 2, 1], 2, 1],
    "edge_kernel": [3, 3, 1],
}
PLANE = {"spatial_dims": 2, "spacing": [1.0, 1.0], "patch_size": [16, 16], "attention_window": [2, 2]}


def documented(text: str) -> str:
    """The code block of the page that has ``text`` in it."""
    return next(block for block in re.findall(r"```(?:python)?\n(.*?)```", PAGE, re.DOTALL) if text in block)


class Exported:
    """A bundle's network with weights that leave nothing idle, and what it predicts."""

    def __init__(self, bundle: str, plan: Path, folder: Path) -> None:
        self.bundle, self.folder, self.patch = bundle, folder, json.loads(plan.read_text())["patch_size"]
        self.files = [config(bundle, "inference.json"), str(plan)]
        parser = ConfigParser()
        parser.read_config(self.files)
        torch.manual_seed(0)
        self.network = parser.get_parsed_content("network_def").eval()
        for name, parameter in self.network.named_parameters():
            if parameter.dim() == 1 or ".output." in name:  # attention's output starts as zero
                nn.init.normal_(parameter, std=0.5)
        folder.mkdir(exist_ok=True)
        save_weights(self.network, folder / "model.pt")

    def arguments(self, command: str) -> list[str]:
        """The documented command of that name, for this bundle, with the test's plan and files."""
        words = shlex.split(documented(command).replace("dual_decoder", self.bundle))
        changes = {
            "--filepath": str(self.folder / words[words.index("--filepath") + 1]),
            "--ckpt_file": str(self.folder / "model.pt"),
            "--config_file": str(self.files),
            "--input_shape": str([1, 1, *self.patch]),
        }
        return [words[0], *(changes.get(before, word) for before, word in itertools.pairwise(words))]

    def keywords(self, command: str) -> dict:
        words = self.arguments(command)[4:]
        values = {key[2:]: DefaultParseValue(value) for key, value in zip(words[1::2], words[2::2], strict=True)}
        return {"net_id": words[0], **values}

    def expect_same(self, predict, atol: float = 5e-4) -> None:
        for batch in (1, 3):
            patches = torch.randn(batch, 1, *self.patch)
            with torch.no_grad():
                expected = self.network(patches)
            assert expected.std() > 0.1
            np.testing.assert_allclose(predict(patches), expected, rtol=0, atol=atol)

    def onnx(self):
        session = onnxruntime.InferenceSession(self.folder / "model.onnx")
        return lambda patches: session.run(None, {"image": patches.numpy()})[0]


@pytest.fixture(params=[*((bundle, {}) for bundle in BUNDLES), ("dual_decoder", FLAT), ("dual_decoder", PLANE)])
def exported(request: pytest.FixtureRequest, plan: Path, tmp_path: Path) -> Exported:
    bundle, changes = request.param
    changed = tmp_path / "plan.json"
    changed.write_text(json.dumps({**json.loads(plan.read_text()), **changes}))
    return Exported(bundle, changed, tmp_path / "models")


def test_torchscript(exported: Exported) -> None:
    ckpt_export(**exported.keywords("ckpt_export"))
    exported.expect_same(lambda patches: torch.jit.load(exported.folder / "model.ts")(patches).detach(), atol=1e-5)


def test_onnx(exported: Exported) -> None:
    onnx_export(**exported.keywords("onnx_export"))
    exported.expect_same(exported.onnx())
    assert sorted(path.name for path in exported.folder.iterdir()) == ["model.onnx", "model.pt"]


def test_torch_export(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    code = documented("program = torch.export.export").replace("bundles/dual_decoder/models", ".")
    code = code.replace('"bundles/dual_decoder/configs/inference.json"', ", ".join(map(repr, exported.files)))
    monkeypatch.chdir(exported.folder)
    exec(code, {})
    program = torch.export.load("model.pt2").module()
    exported.expect_same(lambda patches: program(patches).detach())


def test_the_command_line_and_a_whole_volume(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Exported("teacher", plan, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *exported.arguments("onnx_export")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    exported.expect_same(exported.onnx())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(documented("SlidingWindowInferer"), names)
    with torch.no_grad():
        expected = names["inferer"](names["image"], exported.network)
    torch.testing.assert_close(names["output"], expected, rtol=0, atol=1e-4)
