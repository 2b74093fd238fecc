from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Invertd
from nibabel.orientations import axcodes2ornt, ornt_transform
from torch import Tensor

from common.__main__ import main
from common.errors import BadInput
from common.import_nnunet import import_nnunet
from common.networks import SegmentationNetwork, hand_over, read_record
from common.transforms import preprocessing

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"background": 0, "lumen": 1, "wall": 2}
CT = {"mean": 40.5, "std": 20.25, "percentile_00_5": -100.0, "percentile_99_5": 300.0, "median": 41.0, "max": 900.0}
UNCHANGED = {"kind": "ct", "lower": -100, "upper": 100, "mean": 0, "std": 1}

# Axes as nnU-Net writes them: z, y, x for files whose axes are x, y, z.
ISOTROPIC = {
    "patch_size": [16, 24, 8],
    "spacing": [1.5, 1.0, 0.5],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 1]],
}
ANISOTROPIC = {
    "patch_size": [4, 16, 24],
    "spacing": [5.0, 0.8, 0.7],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
}
FLAT = {
    "patch_size": [16, 24],
    "spacing": [0.8, 0.7],
    "kernel_sizes": [[3, 3]] * 3,
    "strides": [[1, 1], [2, 2], [2, 1]],
}


def plans(
    shape: Mapping[str, Any],
    old: bool = False,
    transpose_forward: Sequence[int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
    normalization: Sequence[str] = ("CTNormalization",),
) -> dict[str, Any]:
    """What nnU-Net's planner writes, in the layout of version 2.3 or in that of the versions before."""
    dims, stages = len(shape["patch_size"]), len(shape["strides"])
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 4,
        "patch_size": shape["patch_size"],
        "spacing": shape["spacing"],
        "normalization_schemes": list(normalization),
        "use_mask_for_norm": [False] * len(normalization),
    }
    if old:
        configuration |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 4,
            "unet_max_num_features": 8,
            "n_conv_per_stage_encoder": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "num_pool_per_axis": [1] * dims,
            "pool_op_kernel_sizes": shape["strides"],
            "conv_kernel_sizes": shape["kernel_sizes"],
        }
    else:
        configuration["architecture"] = {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [4, 8, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": shape["kernel_sizes"],
                "strides": shape["strides"],
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    return {
        "dataset_name": "Dataset001_Bulla",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": reader,
        "transpose_forward": list(transpose_forward),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose_forward)],
        # Version 2.0 inherited this way too.
        "configurations": {"3d_fullres": configuration, "mine": {"inherits_from": "3d_fullres", "batch_size": 6}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): CT for channel in range(len(normalization))},
    }


def random_weights(shape: Mapping[str, Any], channels: int = 1, classes: int = 3) -> dict[str, Tensor]:
    """A PlainConvUNet's state dict: every layer under two names, and the encoder once more inside the decoder."""
    generator = torch.Generator().manual_seed(0)
    features, kernels, strides = [4, 8, 8], shape["kernel_sizes"], shape["strides"]
    dims = len(shape["patch_size"])
    weights: dict[str, Tensor] = {}

    def layer(name: str, *size: int) -> None:
        weights[f"{name}.weight"] = torch.randn(size, generator=generator) / np.sqrt(np.prod(size[1:]))
        weights[f"{name}.bias"] = torch.randn(size[0], generator=generator) / 2

    def block(name: str, before: int, after: int, kernel: Sequence[int]) -> None:
        layer(f"{name}.conv", after, before, *kernel)
        for part in ("weight", "bias"):
            weights[f"{name}.norm.{part}"] = torch.randn(after, generator=generator)
            weights[f"{name}.all_modules.0.{part}"] = weights[f"{name}.conv.{part}"]
            weights[f"{name}.all_modules.1.{part}"] = weights[f"{name}.norm.{part}"]

    for stage, (before, after) in enumerate(zip([channels, *features], features, strict=False)):
        for index in range(2):
            block(f"encoder.stages.{stage}.0.convs.{index}", after if index else before, after, kernels[stage])
    weights |= {f"decoder.{name}": value for name, value in weights.items()}
    for index, stage in enumerate((1, 0)):
        for number in range(2):
            block(
                f"decoder.stages.{index}.convs.{number}",
                features[stage] * (1 if number else 2),
                features[stage],
                kernels[stage],
            )
        name = f"decoder.transpconvs.{index}"
        layer(name, features[stage + 1], features[stage], *strides[stage + 1])
        weights[f"{name}.bias"] = weights[f"{name}.bias"][: features[stage]]
        layer(f"decoder.seg_layers.{index}", classes, features[stage], *[1] * dims)
    return weights


def nnunet_logits(weights: Mapping[str, Tensor], strides: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """The forward pass of nnU-Net's PlainConvUNet, from the names and the strides alone."""
    dims = x.dim() - 2
    convolution = {2: F.conv2d, 3: F.conv3d}[dims]
    transposed = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]

    def of(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def block(name: str, x: Tensor, stride: Sequence[int]) -> Tensor:
        kernel, bias = of(f"{name}.conv")
        x = convolution(x, kernel, bias, list(stride), [size // 2 for size in kernel.shape[2:]])
        return F.leaky_relu(F.instance_norm(x, None, None, *of(f"{name}.norm"), eps=1e-5), 0.01)

    skips = []
    for stage, stride in enumerate(strides):
        x = block(f"encoder.stages.{stage}.0.convs.0", x, stride)
        x = block(f"encoder.stages.{stage}.0.convs.1", x, [1] * dims)
        skips.append(x)
    for index, (stride, skip) in enumerate(zip(strides[:0:-1], skips[-2::-1], strict=True)):
        x = transposed(x, *of(f"decoder.transpconvs.{index}"), stride=list(stride))
        x = torch.cat([x, skip], dim=1)
        for number in range(2):
            x = block(f"decoder.stages.{index}.convs.{number}", x, [1] * dims)
    return convolution(x, *of(f"decoder.seg_layers.{len(strides) - 2}"))


def write_folder(
    folder: Path,
    plans: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    labels: Mapping[str, Any] = LABELS,
    mirrored: Sequence[int] | None = (0, 1, 2),
    configuration: str = "3d_fullres",
    channels: Sequence[str] = ("CT",),
    **change: Any,
) -> Path:
    """A results folder with a checkpoint in the format of nnU-Net's trainer, log of numpy numbers included."""
    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    arguments = {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": dataset}
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.99)
    content = {
        "network_weights": weights,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {
            "mean_fg_dice": [np.float64(0.5)],
            "dice_per_class_or_region": [[np.float32(0.1), np.float32(0.2)]],
        },
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {**arguments, "device": torch.device("cuda", 0)},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": mirrored,
        **change,
    }
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def stored(image: Tensor, orientation: str, transpose_forward: Sequence[int] = (0, 1, 2)) -> Tensor:
    """A RAS image (B, C, x, y, z) as nnU-Net sees it: stored in another orientation, read as z, y, x, transposed."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    arrays = [[nib.apply_orientation(channel.numpy(), turn).T for channel in sample] for sample in image]
    return torch.tensor(np.array(arrays)).permute(0, 1, *(2 + axis for axis in transpose_forward))


def unstored(logits: Tensor, orientation: str, transpose_forward: Sequence[int] = (0, 1, 2)) -> Tensor:
    """The reverse of :func:`stored`."""
    logits = logits.permute(0, 1, *(2 + int(axis) for axis in np.argsort(transpose_forward)))
    turn = ornt_transform(axcodes2ornt(orientation), axcodes2ornt("RAS"))
    return torch.tensor(np.array([[nib.apply_orientation(c.numpy().T, turn) for c in sample] for sample in logits]))


def teacher(plan: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SegmentationNetwork:
    """The network that the teacher bundle makes of a plan, with the weights."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles/teacher/configs/inference.json"))
    for key, value in plan.items():
        parser[key] = value
    network = parser.get_parsed_content("network_def")
    hand_over(network, weights)
    return network.eval()


def image(*size: int, batch: int = 2, channels: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("old", [False, True], ids=["new plans", "old plans"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [(ISOTROPIC, (8, 24, 16)), (ANISOTROPIC, (24, 16, 4)), (FLAT, (24, 16))],
    ids=["3D", "thick", "2D"],
)
def test_the_teacher_has_nnunets_logits(shape: dict, size: tuple[int, ...], old: bool, tmp_path: Path) -> None:
    weights = random_weights(shape)
    mirrored = tuple(range(len(size)))
    folder = write_folder(tmp_path / "results", plans(shape, old), weights, mirrored=mirrored)
    plan, converted, _ = import_nnunet(folder)
    assert plan["patch_size"] == list(size)
    x = image(*size)
    reverse = (0, 1, *range(len(size) + 1, 1, -1))
    with torch.no_grad():
        found = teacher(plan, converted)(x)
    expected = nnunet_logits(weights, shape["strides"], x.permute(reverse)).permute(reverse)
    assert (expected.amax() - expected.amin()) > 1
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("orientation", ["RAS", "SAR", "LPS", "PIR"])
@pytest.mark.parametrize("transpose_forward", [(0, 1, 2), (2, 0, 1)])
def test_files_stored_in_any_orientation(orientation: str, transpose_forward: tuple, tmp_path: Path) -> None:
    """The logits are nnU-Net's of the file as it is stored, whichever way ours is stored."""
    weights = random_weights(ISOTROPIC)
    content = plans(ISOTROPIC, transpose_forward=transpose_forward)
    folder = write_folder(tmp_path / "results", content, weights, mirrored=None)
    plan, converted, origin = import_nnunet(folder, orientation=orientation)
    assert origin["orientation"] == orientation
    x = image(8, 12, 16, batch=1)
    seen = stored(x, orientation, transpose_forward)
    expected = unstored(nnunet_logits(weights, ISOTROPIC["strides"], seen), orientation, transpose_forward)[0]

    nib.save(nib.Nifti1Image(x[0, 0].numpy(), np.diag([0.5, 1.0, 1.5, 1.0])), tmp_path / "ras.nii.gz")
    prepare = preprocessing(intensity=UNCHANGED, orientation=plan["orientation"])
    prepared = prepare({"image": tmp_path / "ras.nii.gz"})
    with torch.no_grad():
        prepared["pred"] = MetaTensor(teacher(plan, converted)(prepared["image"][None])[0], meta=prepared["image"].meta)
    found = Invertd("pred", prepare, "image", nearest_interp=False)(prepared)["pred"]
    assert torch.allclose(found.as_tensor(), expected, atol=1e-4)


def test_the_plan_is_nnunets(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results", plans(ANISOTROPIC), random_weights(ANISOTROPIC))
    plan, _, origin = import_nnunet(folder)
    assert plan == {
        "spatial_dims": 3,
        "channels": 1,
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "targets": [],
        "orientation": "RAS",
        "spacing": [0.7, 0.8, 5.0],
        "patch_size": [24, 16, 4],
        "batch_size": 4,
        "intensity": {"kind": "ct", "lower": -100.0, "upper": 300.0, "mean": 40.5, "std": 20.25},
        "features": [4, 8, 8],
        "kernel_sizes": [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
        "edge_kernel": [3, 3, 1],
        "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
        "thick_axis": 2,
        "mirror_axes": [0, 1, 2],
    }
    assert origin["epochs"] == 1000
    assert origin["trainer"] == "nnUNetTrainer"


def test_what_differs_between_models(tmp_path: Path) -> None:
    # Sagittal slices, thick from left to right, never mirrored from front to back; a configuration that inherits.
    sagittal = plans(ANISOTROPIC, normalization=["ZScoreNormalization"])
    sagittal["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    folder = write_folder(
        tmp_path / "sagittal",
        sagittal,
        random_weights(ANISOTROPIC),
        labels={**LABELS, "ignore": 3},
        mirrored=(0, 1),
        configuration="mine",
    )
    plan, _, _ = import_nnunet(folder, orientation="PSR")
    assert (plan["spacing"], plan["orientation"]) == ([5.0, 0.7, 0.8], "RPS")
    assert (plan["thick_axis"], plan["mirror_axes"], plan["batch_size"]) == (0, [0, 2], 6)
    assert plan["intensity"] == {"kind": "zscore", "nonzero": True}
    assert plan["labels"] == {"0": "background", "1": "lumen", "2": "wall"}

    both = plans(ISOTROPIC, normalization=["CTNormalization", "ZScoreNormalization"])
    folder = write_folder(tmp_path / "both", both, random_weights(ISOTROPIC, channels=2), channels=["CT", "PET"])
    plan, _, _ = import_nnunet(folder)
    ct = {"kind": "ct", "lower": -100.0, "upper": 300.0, "mean": 40.5, "std": 20.25}
    assert plan["intensity"] == [ct, {"kind": "zscore"}]

    photographs = plans(FLAT, reader="NaturalImage2DIO", normalization=["RGBTo01Normalization"])
    folder = write_folder(tmp_path / "photographs", photographs, random_weights(FLAT), mirrored=None)
    plan, _, origin = import_nnunet(folder)
    assert plan["intensity"] == {"kind": "ct", "lower": 0.0, "upper": 255.0, "mean": 0.0, "std": 255.0}
    assert plan["mirror_axes"] == []
    assert origin["orientation"] == "LPS"  # rows run down, columns to the patient's left, as ITK reads a PNG


def test_orientation_of_a_training_image(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results", plans(ISOTROPIC), random_weights(ISOTROPIC), mirrored=(0, 1))
    with pytest.raises(BadInput, match="--orientation"):
        import_nnunet(folder)
    path = tmp_path / "bulla_0000.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), np.diag([-1.0, 1.0, 1.0, 1.0])), path)
    assert import_nnunet(folder, orientation=str(path))[2]["orientation"] == "LAS"
    for wrong in ("LLS", "xyz", "missing.nii.gz"):
        with pytest.raises(BadInput, match=f"--orientation {wrong}"):
            import_nnunet(folder, orientation=wrong)


def edited(**change: Any) -> dict[str, Any]:
    """Plans with keys of the configuration, or of its ``arch_kwargs``, changed."""
    content = plans(ISOTROPIC)
    configuration = content["configurations"]["3d_fullres"]
    arguments = configuration["architecture"]["arch_kwargs"]
    for key, value in change.items():
        (arguments if key in arguments or key == "nonlin_first" else configuration)[key] = value
    return content


RESIDUAL = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": {},
}


@pytest.mark.parametrize(
    ("content", "labels", "message"),
    [
        (edited(architecture=RESIDUAL), LABELS, "ResidualEncoderUNet"),
        (edited(previous_stage="3d_lowres"), LABELS, "cascade.*3d_lowres"),
        (edited(n_conv_per_stage=[1, 2, 2]), LABELS, r"n_conv_per_stage is \[1, 2, 2\]"),
        (edited(nonlin_first=True), LABELS, "nonlin_first is True"),
        (edited(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"), LABELS, "BatchNorm3d"),
        (edited(normalization_schemes=["NoNormalization"]), LABELS, "NoNormalization"),
        (plans(ISOTROPIC), {"background": 0, "whole": [1, 2], "core": 2}, "whole are regions"),
        (plans(ISOTROPIC), {"background": 0, "wall": 2}, "without a gap"),
        (plans(ISOTROPIC), {"air": 0, "lumen": 1, "wall": 2}, "expected `background`"),
        (edited(preprocessor_name="MyPreprocessor"), LABELS, "MyPreprocessor"),
        (edited(inherits_from="3d_fullres"), LABELS, "inherits from itself"),
        (edited(strides=None), LABELS, "isn't what nnU-Net v2 writes"),
        (plans(ISOTROPIC), {"background": 0, "lumen": 1}, "segmentation_decoder.heads"),
        (
            {key: value for key, value in plans(ISOTROPIC).items() if key != "transpose_forward"},
            LABELS,
            "is missing in",
        ),
        (plans(ANISOTROPIC), LABELS, "of another shape"),
    ],
)
def test_what_has_no_counterpart_is_refused(content: dict, labels: dict, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results", content, random_weights(ISOTROPIC), labels=labels)
    with pytest.raises(BadInput, match=message):
        import_nnunet(folder)


def test_each_channel_of_ct_has_its_own_numbers(tmp_path: Path) -> None:
    content = plans(ISOTROPIC, normalization=["CTNormalization", "CTNormalization"])
    folder = write_folder(tmp_path / "same", content, random_weights(ISOTROPIC, channels=2))
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**dataset, "channel_names": {"0": "CT", "1": "CT"}}))
    plan, _, _ = import_nnunet(folder)
    assert (plan["channels"], plan["intensity"]["mean"]) == (2, 40.5)
    content["foreground_intensity_properties_per_channel"]["1"] = {**CT, "mean": 7.0}
    (folder / "plans.json").write_text(json.dumps(content))
    assert [channel["mean"] for channel in import_nnunet(folder)[0]["intensity"]] == [40.5, 7.0]


class Harmful:
    """Stands for a program inside a pickle."""

    def __reduce__(self) -> tuple:
        return (print, ("ran",))


def test_a_checkpoint_runs_no_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "results", plans(ISOTROPIC), random_weights(ISOTROPIC), logging=Harmful())
    with pytest.raises(BadInput, match=r"holds a print"):
        import_nnunet(folder)
    assert "ran" not in capsys.readouterr().out


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "Dataset001" / "nnUNetTrainer", plans(ISOTROPIC), random_weights(ISOTROPIC))
    with pytest.raises(BadInput, match=r"There are models in .*nnUNetTrainer"):
        import_nnunet(folder.parent)
    with pytest.raises(BadInput, match=r"fold_1.*fold_0/checkpoint_final.pth"):
        import_nnunet(folder, fold=1)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"checkpoint_final.pth.*damaged"):
        import_nnunet(folder)
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(BadInput, match="nnU-Net v1"):
        import_nnunet(folder)
    (folder / "plans.json").write_text("{")
    with pytest.raises(BadInput, match=r"plans.json.*JSON"):
        import_nnunet(folder)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "results", plans(ISOTROPIC), random_weights(ISOTROPIC))
    output = tmp_path / "models" / "model.pt"
    command = ["import-nnunet", str(folder), "--output", str(output)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Dataset001_Bulla, 3d_fullres, fold 0" in printed
    plan = json.loads((tmp_path / "models" / "plan.json").read_text())
    teacher(plan, torch.load(output, weights_only=True)["model"])
    # The next stages compare this with their own settings.
    record = read_record(output)
    assert record["config"]["spacing"] == [0.5, 1.0, 1.5]
    assert record["nnunet"]["dataset"] == "Dataset001_Bulla"

    assert main(command) == 1
    assert "model.pt: exists already" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "other.pt"), "--plan", str(tmp_path / "models" / "plan.json")]) == 1
    assert not (tmp_path / "other.pt").exists()

    folder = write_folder(tmp_path / "one side", plans(ISOTROPIC), random_weights(ISOTROPIC), mirrored=())
    output = tmp_path / "one side" / "model.pt"
    assert main(["import-nnunet", str(folder), "--output", str(output), "--orientation", "lps"]) == 0
    assert read_record(output)["config"]["orientation"] == "LPS"
    assert "warning" not in capsys.readouterr().out

    own = "nnUNetTrainerMyActivation"
    folder = write_folder(tmp_path / "own", plans(ISOTROPIC), random_weights(ISOTROPIC), trainer_name=own)
    assert main(["import-nnunet", str(folder), "--output", str(tmp_path / "own" / "model.pt")]) == 0
    assert f"warning: trained by {own}" in capsys.readouterr().out


@pytest.mark.parametrize("old", [False, True], ids=["new plans", "old plans"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [(ISOTROPIC, (8, 24, 16)), (ANISOTROPIC, (24, 16, 4)), (FLAT, (24, 16))],
    ids=["3D", "thick", "2D"],
)
def test_against_nnunet_itself(shape: dict, size: tuple[int, ...], old: bool, tmp_path: Path) -> None:
    """nnU-Net's own network, built from the plans by its own code and saved by its own trainer."""
    pytest.importorskip("nnunetv2", reason="make test-nnunet")
    from nnunetv2.training.logging.nnunet_logger import MetaLogger
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration = PlansManager(plans(shape, old)).get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        input_channels=1,
        output_channels=3,
        deep_supervision=True,
    )
    weights = random_weights(shape)
    network.load_state_dict(weights)
    folder = write_folder(tmp_path / "results", plans(shape, old), {}, mirrored=tuple(range(len(size))))
    content = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    logger = MetaLogger(str(tmp_path), False)
    for epoch in range(2):
        logger.log("mean_fg_dice", np.float64(0.5), epoch)
        logger.log("dice_per_class_or_region", [np.float32(0.4), np.float32(0.6)], epoch)
    trainer = SimpleNamespace(
        local_rank=0,
        disable_checkpointing=False,
        is_ddp=False,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        grad_scaler=None,
        logger=logger,
        _best_ema=np.float64(0.5),
        current_epoch=1,
        my_init_kwargs=content["init_args"],
        inference_allowed_mirroring_axes=tuple(range(len(size))),
    )
    nnUNetTrainer.save_checkpoint(trainer, str(folder / "fold_0" / "checkpoint_final.pth"))

    plan, converted, _ = import_nnunet(folder)
    x = image(*size)
    reverse = (0, 1, *range(len(size) + 1, 1, -1))
    network.decoder.deep_supervision = False
    with torch.no_grad():
        expected = network.eval()(x.permute(reverse)).permute(reverse)
        assert torch.allclose(teacher(plan, converted)(x), expected, atol=1e-5)
        assert torch.allclose(nnunet_logits(weights, shape["strides"], x.permute(reverse)).permute(reverse), expected)
