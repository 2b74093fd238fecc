from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from common.data.phantom import LABELED_DOMAIN, SHIFTED_DOMAIN, Domain, make_phantom
from common.errors import BadInput

SHAPE = (32, 32, 32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.0)])
def test_shell_is_closed_and_thickness_lies_on_the_wall(seed: int, spacing: tuple[float, ...]) -> None:
    case = make_phantom((40, 40, 24), spacing, seed=seed)
    lumen, wall = case.label == 1, case.label == 2
    assert lumen.any()
    assert not (ndimage.binary_dilation(lumen) & (case.label == 0)).any()
    filled = ndimage.binary_fill_holes(wall)
    assert filled[lumen].all()
    np.testing.assert_array_equal(case.thickness > 0, wall)
    assert case.thickness[wall].min() >= 0.7 - 1e-5
    assert case.thickness[wall].max() <= 4.0 + 1e-5


def test_bullae_do_not_overlap() -> None:
    for seed in range(4):
        case = make_phantom((48, 48, 48), seed=seed)
        bodies, count = ndimage.label(case.label > 0, structure=np.ones((3, 3, 3)))
        assert count == len(case.bullae)
        for body in range(1, count + 1):
            assert ndimage.label((case.label == 1) & (bodies == body))[1] == 1


def test_volume_and_intensities_agree_with_the_label() -> None:
    case = make_phantom(SHAPE, seed=1, domain=Domain(noise=0.0, blur=0.0))
    assert case.volume * 1000 == pytest.approx((case.label > 0).sum(), rel=0.05)
    deep = ndimage.binary_erosion(case.label == 1, iterations=2)
    np.testing.assert_array_equal(case.image[deep], -990)
    assert case.image[case.label == 2].mean() > -500
    assert np.median(case.image[case.label == 0]) == pytest.approx(-850, abs=40)


def test_domain_shift_changes_the_image_and_not_the_truth() -> None:
    quiet, shifted = (make_phantom(SHAPE, seed=5, domain=domain) for domain in (LABELED_DOMAIN, SHIFTED_DOMAIN))
    lumen = ndimage.binary_erosion(quiet.label == 1, iterations=2)
    assert lumen.any()
    # -990 HU: contrast to the lung x 0.9, then the offset.
    assert shifted.image[lumen].mean() == pytest.approx(-850 - 140 * 0.9 - 25, abs=25)
    assert shifted.image[lumen].std() > 1.3 * quiet.image[lumen].std()


@pytest.mark.parametrize(("shape", "spacing"), [((6, 6, 6), (1, 1, 1)), ((32, 32), (1, 1)), ((32, 32, 32), (1, 1, 0))])
def test_impossible_volumes_are_refused(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="shape"):
        make_phantom(shape, spacing)
