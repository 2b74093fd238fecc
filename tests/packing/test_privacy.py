"""What is taken for a leak, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.packing.privacy import find_leaks, identifiers

LEAKS = [
    "see /home/doe/results",
    "from /mnt/nas01/ct",
    "in ~/results",
    "D:\\scans\\ct",
    "C:/Users/doe",
    "sqlite:////x/mlruns.db",
    "file:///x/scans",
    "http://10.0.0.7/runs",
    "https://tracking.hospital.org:5000",
    "patient 0815 was left out",
    "sub-07",
    "1.3.6.1.4.1.14519.5.2.1",
    "as in /checkout/of/mine/data",
    "K2093 is thin",
]
FINE = [
    "bundles/data/x.json and docs/data.md",
    "run `python -m monai.bundle run --config_file BUNDLE/configs/inference.json`",
    "https://docs.monai.io/en/stable/data/home.html",
    "1.2.840.10008.5.1.4.1.1.66.4 is a DICOM standard's class",
    "Nature Methods 18, 203-211, 2021",
    "mm/s, 3 x 3 and/or 1:2",
    "K20931 is another",
    "version 1.2.3",
]


def leaks(name: str, text: str) -> list[str]:
    return find_leaks(name, text, {"K2093"}, [Path("/checkout/of/mine")])


@pytest.mark.parametrize("text", LEAKS)
def test_leaks_are_named_with_their_place(text: str) -> None:
    assert [leak.split(":")[0] for leak in leaks("docs/README.md", f"fine\n{text}\nfine\n")] == [
        "docs/README.md, line 2"
    ]
    found = leaks("configs/a.json", json.dumps({"a": [{"b": text}]}))
    assert [leak.split(":")[0] for leak in found] == ["configs/a.json, a#0#b"]


@pytest.mark.parametrize("text", FINE)
def test_what_is_no_leak(text: str) -> None:
    assert not leaks("docs/README.md", text)
    assert not leaks("configs/a.json", json.dumps({"a": [{"b": text}]}))


def test_json_knows_keys_and_whole_paths() -> None:
    assert not leaks("a.json", json.dumps({"ckpt": "$@ckpt_dir + '/model.pt'", "patient": None, "training": []}))
    assert leaks("a.json", json.dumps({"where": "/groups/ct"}))
    assert leaks("a.json", json.dumps({"Patient ID": 3}))
    assert leaks("a.json", json.dumps({"model": {"K2093": 1, "a": "K2093"}}))


def test_programs_are_searched_for_places() -> None:
    assert leaks("a.py", "PATH = '/home/doe/scans'")
    assert not leaks("a.py", '"""Such as K2093 or ``sub-07_ses-2``."""\nx = f"sqlite:///{path}"')


def test_identifiers_of_a_datalist() -> None:
    content = {
        "training": [{"image": "images/bulla7.nii.gz", "patient": "K2093"}, {"image": "scans/a1.nii.gz"}],
        "unlabeled": [{"image": ["c_0000.nii.gz", "c_0001.nii.gz"], "patient": 12345}, {"image": "liver.nii.gz"}],
    }
    assert identifiers(content) == {"bulla7", "K2093", "c_0000", "12345"}
