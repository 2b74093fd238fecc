"""What must hold of cases before a training."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import TARGETS, write

from common.data import check_cases, check_labels, check_output
from common.errors import BadInput

LABELS = {"0": "background", "1": "lumen", "2": "wall"}


@pytest.fixture
def case(tmp_path):
    return {
        "image": write(tmp_path / "image.nii.gz"),
        "label": write(tmp_path / "label.nii.gz"),
        "thickness": write(tmp_path / "thickness.nii.gz"),
        "volume": 0.1,
    }


def test_good_case_passes(case, tmp_path):
    other = {"image": write(tmp_path / "b.nii.gz")}
    check_cases([case, other], labels=LABELS, channels=1, targets=TARGETS, patch_size=(4, 4, 4), validation=[])


@pytest.mark.parametrize("key", ["label", "thickness"])
def test_maps_on_another_grid(case, key, tmp_path):
    check = {"labels": LABELS, "channels": 1, "targets": TARGETS}
    with pytest.raises(BadInput, match=rf"image and {key} are not on one grid: their shapes differ"):
        check_cases([{**case, key: write(tmp_path / "x.nii.gz", shape=(6, 5, 5))}], **check)
    moved = np.eye(4)
    moved[0, 3] = 0.5
    with pytest.raises(BadInput, match=rf"{key} are not on one grid: their corners lie up to 0.5 mm"):
        check_cases([{**case, key: write(tmp_path / "x.nii.gz", affine=moved)}], **check)
    moved[0, 3] = 0.01
    check_cases([{**case, key: write(tmp_path / "x.nii.gz", affine=moved)}], **check)


def test_every_problem_is_listed_at_once(case, tmp_path):
    no_image = tmp_path / "text.nii.gz"
    no_image.write_text("no image")
    cases = [
        {**case, "image": write(tmp_path / "two.nii.gz", shape=(6, 5, 4, 2))},
        {**case, "volume": "large"},
        {**case, "thickness": 3.0},
        {**case, "annotated": [0, 5]},
        {**case, "annotated": []},
        {"image": str(no_image)},
    ]
    with pytest.raises(BadInput) as caught:
        check_cases(cases, labels=LABELS, channels=1, targets=TARGETS, patch_size=(4, 4, 4))
    message = str(caught.value)
    for part in (
        "6 problem(s)",
        "two: the image has 2 channel(s), the network takes 1",
        "`volume` is 'large'",
        "`thickness` is 3.0",
        "['5']",
        "`annotated` is [], which names no structure",
        "text.nii.gz can't be opened",
    ):
        assert part in message
    with pytest.raises(BadInput, match=r"(?s)25 problem.*and 5 more"):
        check_cases([{**case, "volume": "large"}] * 25, targets=TARGETS)


def test_dimensions_must_be_the_networks(case):
    with pytest.raises(BadInput, match="3 spatial dimensions"):
        check_cases([case], patch_size=(4, 4))


def test_patients_and_images_stay_on_one_side(case, tmp_path):
    other = {"image": write(tmp_path / "b.nii.gz")}
    with pytest.raises(BadInput, match="image and b are of one patient, and in training and in validation") as caught:
        check_cases([{**case, "patient": "Mueller"}], validation=[{**other, "patient": "Mueller"}])
    assert "Mueller" not in str(caught.value)
    with pytest.raises(BadInput, match="are of one patient"):
        check_cases([{**case, "patient": 7}], validation=[{**other, "patient": "7"}])
    with pytest.raises(BadInput, match="are of one patient"):
        check_cases([{**case, "patient": "Mueller, A"}], validation=[{**other, "patient": " mueller,  a"}])
    with pytest.raises(BadInput, match="is in training and in validation"):
        check_cases([case], validation=[{**case}])
    check_cases([{**case, "patient": 7}], validation=[{**other, "patient": 8}])
    link = tmp_path / "link.nii.gz"
    link.symlink_to(case["image"])
    with pytest.raises(BadInput, match=r"image .*link\.nii\.gz is in training and in validation"):
        check_cases([case], validation=[{"image": str(link)}])


def test_testing_is_compared_though_its_files_may_be_elsewhere(case):
    absent = {"image": "absent.nii.gz"}
    check_cases([{**case, "patient": 7}], testing=[{**absent, "patient": 8}])
    check_cases(
        [{"image": case["image"]}], testing=[{"image": case["image"], "label": "absent.nii.gz"}]
    )  # transductive
    with pytest.raises(BadInput, match="image and absent are of one patient, and in training and in testing"):
        check_cases([{**case, "patient": 7}], testing=[{**absent, "patient": 7}])


@pytest.mark.parametrize(
    ("volume", "message"),
    [(0.13, "more than the whole image, which has 0.12 mL"), (-0.1, "negative"), (float("inf"), "expected a number")],
)
def test_a_volume_that_the_image_can_not_have(case, volume, message):
    with pytest.raises(BadInput, match=f"image: `volume` is .*{message}"):
        check_cases([{**case, "volume": volume}], targets=TARGETS)


def test_labels_of_datalist_and_config_agree():
    check_labels({"labels": dict(LABELS)}, LABELS)
    check_labels({}, LABELS)
    with pytest.raises(BadInput, match="make them the same"):
        check_labels({"labels": {"0": "background", "1": "wall", "2": "lumen"}}, LABELS)
    with pytest.raises(BadInput, match="without a gap"):
        check_labels({}, {"0": "background", "2": "wall"})


def test_output_folder(tmp_path):
    folder = check_output(tmp_path / "a/b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"can't be written .*set `ckpt_dir`"):
        check_output(tmp_path / "file" / "below", "ckpt_dir")
