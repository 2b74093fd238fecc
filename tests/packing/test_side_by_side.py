"""Two packed versions of one bundle, run one after the other in one process as MONAI runs bundles."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from common.packing import pack_bundle

RUNS = """
import sys
from monai.bundle import run

first, second, scan = sys.argv[1:]
for root, results in ((first, "first"), (second, "second"), (first, "again")):
    run(config_file=f"{root}/configs/inference.json", input=scan, output_dir=results, device="cpu")
assert not any(name.split(".")[0] == "scripts" for name in sys.modules)
# A run that is not ended properly leaves its code behind.
run(config_file=f"{first}/configs/inference.json", input=scan, output_dir="left", device="cpu", finalize=[])
settings = {"ckpt_dir": f"{second}/models", "input": scan, "output_dir": "mixed", "device": "cpu"}
try:
    run(config_file=f"{second}/configs/inference.json", **settings)
except Exception as error:
    while error is not None:
        print(error)
        error = error.__cause__ or error.__context__
"""


def test_each_run_has_its_own_code_and_weights(
    trained: dict[str, Path], train: Callable[..., Path], tmp_path: Path
) -> None:
    roots = []
    for version in ("1.0.0", "2.0.0"):
        folder = tmp_path / version
        weights = train("teacher", folder / "trained", trained["plan"], seed=int(version[0]))
        pack_bundle("teacher", folder / "packed.zip", trained["plan"], weights, version=version)
        with zipfile.ZipFile(folder / "packed.zip") as archive:
            archive.extractall(folder)
        roots.append(folder / "teacher")
    volume = np.random.default_rng(3).normal(-600, 300, (22, 20, 18)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "scan.nii.gz")
    (tmp_path / "away").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUNS, *map(str, roots), str(tmp_path / "scan.nii.gz")],
        cwd=tmp_path / "away",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, again = (
        np.asarray(nibabel.load(tmp_path / "away" / name / "scan_seg.nii.gz").dataobj)
        for name in ("first", "second", "again")
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert f"The code in this process is that of another packed bundle, {roots[0]}" in done.stdout
    assert not list((tmp_path / "away" / "mixed").glob("*_seg*"))
    stamps = [json.loads((root / "configs/inference.json").read_text())["bundle_root"] for root in roots]
    assert stamps[0] != stamps[1]
