from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import itk
import nibabel
import numpy as np
import pytest

from common.data import case_keys, case_name, check_cases, check_labels, check_output, load_section, read_datalist
from common.data.datalist import read_grid
from common.data.inputs import find_cases
from common.errors import BadInput
from common.transforms import LoadCased

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
TARGETS = [
    {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 1.0},
    {"name": "volume", "unit": "mL", "kind": "sum"},
]


def write(path: Path, shape=(6, 5, 4), affine=None, dtype=np.float32) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, dtype), np.eye(4) if affine is None else affine), path)
    return str(path)


def write_datalist(folder: Path, **content) -> Path:
    path = folder / "datalist.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def case(tmp_path):
    return {
        "image": write(tmp_path / "image.nii.gz"),
        "label": write(tmp_path / "label.nii.gz"),
        "thickness": write(tmp_path / "thickness.nii.gz"),
        "volume": 0.1,
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/case.01.nii.gz", "case.01"),
        ("a/b.NII", "b"),
        ("b.nrrd", "b"),
        ("b.mha", "b"),
        ("series/ct-7", "ct-7"),
        (["m_0000.nii.gz", "m_0001.nii.gz"], "m"),
        (["t1.nii.gz", "t2.nii.gz"], "t1"),
        (["t1/p_0001.nii.gz", "t2/p_0001.nii.gz"], "p_0001"),
        (["a_0000.nii.gz", "b_0001.nii.gz"], "a_0000"),
        (["m_0000.nii.gz"], "m_0000"),
        ("m_0000.nii.gz", "m_0000"),
        ({"image": "x/y.mhd"}, "y"),
    ],
)
def test_case_name(path, name):
    assert case_name(path) == name


def test_case_keys():
    assert case_keys(TARGETS) == ["image", "label", "thickness", "volume"]
    assert case_keys(label=False) == ["image"]


def test_datalist_that_is_missing_or_broken(tmp_path):
    with pytest.raises(BadInput, match=r"none.json not found"):
        read_datalist(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{\n"training": [\n}')
    with pytest.raises(BadInput, match="line 3"):
        read_datalist(broken)
    broken.write_text("[]")
    with pytest.raises(BadInput, match="holds a list"):
        read_datalist(broken)
    for content in ("[" * 100_000, "9" * 5000, "\udcff"):
        broken.write_text(content, errors="surrogateescape")
        with pytest.raises(BadInput, match=r"broken\.json can't be read"):
            read_datalist(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"test": []}, "none of the sections"),
        ({"training": {}}, "expected a list"),
        ({"training": [{"image": "a"}, {"label": "b"}]}, "entry 1 of `training` has no `image`"),
        ({"training": [3]}, "entry 0 of `training` is a int"),
        ({"training": [{"image": 3}]}, "`image` is 3"),
        ({"training": [{"image": "a", "annotated": 1}]}, "list of label ids"),
        ({"training": [], "labels": ["background"]}, "`labels` must map"),
    ],
)
def test_malformed_datalist(tmp_path, content, message):
    with pytest.raises(BadInput, match=message):
        read_datalist(write_datalist(tmp_path, **content))


def test_sections_have_absolute_paths_relative_to_the_datalist(tmp_path):
    image = write(tmp_path / "images/a.nii.gz")
    label = write(tmp_path / "labels/a.nii.gz")
    entry = {
        "image": "images/a.nii.gz",
        "label": "./labels/a.nii.gz",
        "volume": 2.0,
        "annotated": [0, 1],
        "patient": 7,
        "note": "x",
    }
    path = write_datalist(tmp_path, training=[entry], unlabeled=["images/a.nii.gz"])
    expected = {"image": image, "label": label, "annotated": [0, 1], "patient": 7}
    assert load_section(path, "training") == [expected]
    assert load_section(path, "training", optional=("volume", "thickness")) == [{**expected, "volume": 2.0}]
    assert load_section(path, "training", keys=("image", "label", "volume")) == [{**expected, "volume": 2.0}]
    assert load_section(read_datalist(path), "unlabeled") == [{"image": image}]


def test_sections_that_lack_something(tmp_path):
    write(tmp_path / "a.nii.gz")
    path = write_datalist(tmp_path, training=[{"image": "a.nii.gz"}], unlabeled=[])
    with pytest.raises(BadInput, match=r"entry 0 of `training` \(a\) has no `label`"):
        load_section(path, "training")
    with pytest.raises(BadInput, match="teacher bundle"):
        load_section(path, "unlabeled")
    assert load_section(path, "unlabeled", required=False) == []
    assert load_section(path, "validation", required=False) == []
    with pytest.raises(BadInput, match="no section"):
        load_section(path, "train")


def test_all_absent_files_are_counted(tmp_path):
    path = write_datalist(tmp_path, unlabeled=[{"image": f"{index}.nii.gz"} for index in range(7)])
    with pytest.raises(BadInput, match=r"7 file\(s\).*0\.nii\.gz.*and 2 more"):
        load_section(path, "unlabeled")


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


def test_truncated_nifti_is_found_by_its_size(tmp_path):
    path = Path(write(tmp_path / "a.nii"))
    check_cases([{"image": str(path)}])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match="truncated"):
        check_cases([{"image": str(path)}])


def change_header(path: Path, **values) -> str:
    """Write fields of a plain NIfTI file's header that nibabel would keep right."""
    content = path.read_bytes()
    header = np.frombuffer(content[:348], nibabel.Nifti1Header.template_dtype).copy()
    for name, value in values.items():
        header[name][0] = value
    path.write_bytes(header.tobytes() + content[348:])
    return str(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dim": [3, 30_000, 30_000, 30_000, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [5, 6, 5, 4, 1, 1, 1, 1]}, "has the shape (6, 5, 4, 1, 1)"),
        ({"dim": [3, 6, 0, 4, 1, 1, 1, 1]}, "has the shape (6, 0, 4)"),
        ({"datatype": 32, "dim": [3, 2, 2, 2, 1, 1, 1, 1]}, "colours or complex numbers"),
        ({"pixdim": [1, 1, 1, 5, 1, 1, 1, 1]}, "two voxel sizes, 1 x 1 x 1 mm (its affine) and 1 x 1 x 5 mm (pixdim)"),
        ({"srow_x": [1, 0, 0, np.inf]}, "places it at"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "places it at"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_headers_that_can_t_be(tmp_path, values, words, suffix):
    path = Path(write(tmp_path / "a.nii"))
    change_header(path, **values)
    if suffix == ".nii.gz":
        path = tmp_path / "a.nii.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    for read in (read_grid, lambda path: LoadCased(("image",))({"image": path})):
        with pytest.raises(BadInput, match=re.escape(words)) as caught:
            read(str(path))
        assert str(path) in str(caught.value)


def test_the_grid_is_that_of_the_affine_to_the_last_digit(tmp_path):
    """MONAI takes that of the quaternion where the voxel size is rounded."""
    path = change_header(Path(write(tmp_path / "a.nii")), pixdim=[1, 1, 1, 1.002, 1, 1, 1, 1], qoffset_x=50)
    loaded = LoadCased(("image",))({"image": path})["image"]
    assert np.array_equal(loaded.affine, np.eye(4))
    assert np.array_equal(loaded.affine, read_grid(path).affine)


def test_the_home_of_nobody(tmp_path):
    path = write_datalist(tmp_path, testing=[{"image": "~no-such-user/a.nii"}])
    with pytest.raises(BadInput, match=r"do not exist: .*~no-such-user/a\.nii"):
        load_section(path, "testing", keys=["image"])
    with pytest.raises(BadInput, match="does not exist"):
        find_cases("~no-such-user/a.nii")


def test_patients_and_images_stay_on_one_side(case, tmp_path):
    other = {"image": write(tmp_path / "b.nii.gz")}
    with pytest.raises(BadInput, match="image and b are of one patient, and in training and in validation") as caught:
        check_cases([{**case, "patient": "Mueller"}], validation=[{**other, "patient": "Mueller"}])
    assert "Mueller" not in str(caught.value)
    with pytest.raises(BadInput, match="are of one patient"):
        check_cases([{**case, "patient": 7}], validation=[{**other, "patient": "7"}])
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


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_headers_agree_between_itk_and_nibabel(tmp_path, suffix):
    image = itk.image_from_array(np.zeros((4, 5, 6), np.float32))
    image.SetSpacing((0.5, 0.75, 2.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(itk.matrix_from_array(np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])))
    for name in (f"a.{suffix}", "a.nii.gz"):
        itk.imwrite(image, str(tmp_path / name))
    ours, nifti = read_grid(tmp_path / f"a.{suffix}"), read_grid(tmp_path / "a.nii.gz")
    assert ours.shape == nifti.shape == (6, 5, 4)
    assert ours.channels == nifti.channels == 1
    np.testing.assert_allclose(ours.affine, nifti.affine, atol=1e-5)


def test_channels_in_several_files(tmp_path):
    paths = [write(tmp_path / f"{index}.nii.gz") for index in range(2)]
    check_cases([{"image": paths}], channels=2)
    paths[1] = write(tmp_path / "1.nii.gz", shape=(3, 3, 3))
    with pytest.raises(BadInput, match="channels of one case"):
        check_cases([{"image": paths}], channels=2)


def put(source, axis: int, position: float) -> None:
    source.ImagePositionPatient[axis] = position


def turn(source, index: int) -> None:
    if index == 3:
        source.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def zoom(source, index: int) -> None:
    if index == 3:
        source.PixelSpacing = [0.75, 0.6]


# Slices lie at 30, 32.5, ... mm; slice i has the file name 7 * i % 31.
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda source, i: put(source, 2, 30 + 2.5 * (i + (i > 2))),
            r"14\.dcm and 21\.dcm lie 5 mm apart, other.* 2\.5 mm",
        ),
        (lambda source, i: put(source, 2, 30 + 2.5 * (i + (i > 4))), r"28\.dcm and 04\.dcm lie 5 mm apart"),
        (
            lambda source, i: put(source, 2, 30 + 2.5 * (i // 2)),
            r"3 of its 6 files lie where another .* (00\.dcm and 07|07\.dcm and 00)\.dcm",
        ),
        (lambda source, i: put(source, 2, 30), "5 of its 6 files lie where another"),
        (
            lambda source, i: put(source, 1, 5 + i),
            r"04\.dcm is shifted sideways by 5 mm against 00\.dcm.* 12\.5 mm away",
        ),
        (turn, r"00\.dcm has 6 x 7 .*orientation 1 0 0 0 1 0, 21\.dcm has .*orientation 0 1 0 0 0 -1"),
        (zoom, r"21\.dcm has 6 x 7 pixels of 0\.6 x 0\.75 mm"),
    ],
    ids=["gap", "gap at the end", "two a position", "one position", "tilt", "orientation", "pixels"],
)
def test_a_dicom_series_that_is_no_even_stack(tmp_path, change, words):
    dicom_series = pytest.importorskip("dicom_series", exc_type=ImportError)
    volume = np.zeros((6, 7, 6), np.int16)
    dicom_series.write_series(tmp_path / "scan", volume, dicom_series.AXIAL, change=change)
    for read in (read_grid, lambda folder: LoadCased(("image",))({"image": folder})):
        with pytest.raises(BadInput, match=words):
            read(str(tmp_path / "scan"))


def test_rounded_dicom_headers_are_an_even_stack(tmp_path):
    dicom_series = pytest.importorskip("dicom_series", exc_type=ImportError)

    def round_off(source, index):
        # 1.25 mm steps to the next 0.1 mm: 1.2 and 1.3 in turn; the rows' cosine has four digits.
        put(source, 2, [30, 31.2, 32.5, 33.8, 35][index])
        source.ImageOrientationPatient = [1, 0, 0, 0, 1, 0.0001 * index]

    dicom_series.write_series(tmp_path / "scan", np.zeros((5, 7, 6), np.int16), dicom_series.AXIAL, change=round_off)
    grid = read_grid(str(tmp_path / "scan"))
    assert grid.shape == (6, 7, 5)
    np.testing.assert_allclose(grid.affine[:3, 2], [0, 0, 1.25], atol=1e-6)
    loaded = LoadCased(("image",))({"image": str(tmp_path / "scan")})["image"]
    np.testing.assert_allclose(loaded.affine, grid.affine)


def test_one_dicom_slice_is_as_thick_as_it_says(tmp_path):
    dicom_series = pytest.importorskip("dicom_series", exc_type=ImportError)
    for name, thickness, spacing in (
        ("both", 2.5, 3),
        ("thickness", 2.5, None),
        ("spacing", None, 3),
        ("none", "", None),
    ):

        def change(source, index, thickness=thickness, spacing=spacing):
            source.SliceThickness, source.SpacingBetweenSlices = thickness, spacing

        dicom_series.write_series(tmp_path / name, np.ones((1, 7, 6), np.int16), dicom_series.SAGITTAL, change=change)
    for name, expected in (("both", 2.5), ("thickness", 2.5), ("spacing", 3)):
        for path in (tmp_path / name, tmp_path / name / "00.dcm"):
            grid = read_grid(str(path))
            assert grid.shape == (6, 7, 1)
            # The rows run to the back and the columns down: the normal is the patient's left-right axis.
            np.testing.assert_allclose(np.abs(grid.affine[:3, 2]), [expected, 0, 0], atol=1e-6)
            np.testing.assert_allclose(LoadCased(("image",))({"image": str(path)})["image"].affine, grid.affine)
    with pytest.raises(BadInput, match="one DICOM slice without a Slice Thickness"):
        read_grid(str(tmp_path / "none"))


def test_frames_of_one_dicom_file(tmp_path, monkeypatch):
    dicom_series = pytest.importorskip("dicom_series", exc_type=ImportError)

    def read(name: str, heights: list[float], spacing: tuple[float, float], lean: float = 0) -> list[float]:
        places = [(-10, 5 + lean * index, height) for index, height in enumerate(heights)]
        dicom_series.write_frames(tmp_path / name, np.zeros((4, 7, 6), np.int16), places, spacing)
        return read_grid(str(tmp_path / name)).affine[:3, :3].diagonal().tolist()

    down, rounded = [37.5, 35, 32.5, 30], [0, 1.02, 1.99, 3]
    assert read("down.dcm", down, (0.75, 0.5)) == [-0.5, -0.75, -2.5]
    assert read("cubes.dcm", [0, 1, 2, 3], (1, 1)) == [-1, -1, 1]
    # GDCM makes no even stack of these, takes 1 x 1 x 1 mm upwards, and is right by chance.
    assert read("rounded.dcm", rounded, (1, 1)) == [-1, -1, 1]
    for heights, spacing, lean in (
        ([0, 2.5, 7.5, 10], 0.5, 0),
        ([0, 2.5, 0, 2.5], 0.5, 0),
        (rounded, 0.5, 0),
        (rounded[::-1], 1, 0),
        (down, 0.5, 1),
    ):
        with pytest.raises(BadInput, match=r"bad\.dcm: its frames are no even stack"):
            read("bad.dcm", heights, (spacing, spacing), lean)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert read("down.dcm", down, (0.75, 0.5)) == [-0.5, -0.75, -2.5]
    with pytest.raises(BadInput, match="pip install pydicom"):
        read("cubes.dcm", [0, 1, 2, 3], (1, 1))
