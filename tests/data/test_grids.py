"""Where files say that their voxels are."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

import itk
import nibabel
import numpy as np
import pytest
from data_files import write

from common.data import check_cases
from common.data.grids import read_grid
from common.errors import BadInput
from common.transforms import LoadCased


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
        ({"xyzt_units": 3}, "lengths in micrometres, expected mm"),
        ({"xyzt_units": 1 + 8}, "lengths in metres, expected mm"),
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
