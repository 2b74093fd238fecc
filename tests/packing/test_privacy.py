"""What is taken for a leak, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.packing.privacy import Names, find_leaks, identifiers, plain_words, texts_of

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
    "k2093_left is thin",
    "scans of mueller_hans",
    "of Hans Müller",
    "of Müller, Hans",
    "of patient 7",
    "of case 007",
    "of case no. 7",
    "images/007.nii.gz was left out",
    "scans/7/ct was left out",
    "see /data1/hospital/ct",
    "see /fastscratch/mueller/ct",
    "server:/raid/users/x",
    "(/u/mueller/data)",
    "/workspace2/a/b",
    "weights at //server/share/x",
    r"in D:\x",
    "http://pacs.hospital.local/studies",
    "https://me@pacs.lan:80",
    "https://gitlab.intern.clinic.org/x",
    "http://tracking/runs",
    "https://clinic.home",
    "MRN: 123456 and another were left out",
    "**MRN:** 123456",
    "MRN=123456",
    "Patient no. 4711",
    "patient no.: 4711",
    "patient #4711",
    "patients no. 4711 and 4712",
    "patient IDs 4711 and 4712",
    "PatientID 12345",
    "PatientID12345",
    "Patient-ID: 12345",
    "Patient: 4711",
    "Patienten-Nr. 4711",
    "Pat. 4711",
    "Pat.-Nr. 4711",
    "Pat.-Nr.: 4711",
    "subject number 12",
    "subject id: 12",
    "accession number 98765",
    "Accession: 98765",
    "case no. 3",
    "case #3",
    "ID 00123456",
    "ID: 00123456",
    "ID-Nr. 00123456",
    "scan_mueller.nii.gz was left out",
    "without **scan_mueller.nii** and others",
    "without _mueller.nii.gz_.",
    "without <b>mueller.nrrd</b>",
    "like `sub/mueller.mha`, as it was",
    "-mueller.mhd",
    "Hans Meier.dcm.",
    "images/IM0001.DCM, and more",
    "$'scan_mueller.nii.gz'",
]
FINE = [
    "bundles/data/x.json and docs/data.md",
    "run `python -m monai.bundle run --config_file BUNDLE/configs/inference.json`",
    "https://docs.monai.io/en/stable/data/home.html",
    "1.2.840.10008.5.1.4.1.1.66.4 is a DICOM standard's class",
    "Nature Methods 18, 203-211, 2021",
    "mm/s, 3 x 3 and/or 1:2",
    "K20931 is another",
    "7 cases, 3.7 mm, 1/7, weeks 007 and 7 of 2021",
    "hans and mueller",
    "train/validate/test, <folder>/a/b, *.nii/b/c, BUNDLE/docs/a",
    "https://home.example.org/local/a, https://example.org/a//b/c",
    "https://example.org/releases/7.1/x",
    "// a comment, a / b / c",
    "version 1.2.3",
    "`<case>_seg.nii.gz`, `{case}_0000.nii.gz`, <case>-2.nii, *_seg.nrrd, *.mha, a .nii.gz file, (.dcm)",
    "h5py.File, nii.gz, IDs 1 to 5, id 1234, PMID: 12345678, idle 12345",
    "patients: 40; 40 subjects, 12 patients. 3 scans of each patient. 2 raters",
    "sub-millimetre, patient-wise, no. 7, number 3, pattern 1",
]


def leaks(name: str, text: str) -> list[str]:
    return find_leaks(name, text, {"K2093", "Hans Mueller", "7"}, [Path("/checkout/of/mine")])


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
        "training": [{"image": "images/bulla7.nii.gz", "patient": "K2093"}, {"image": "a/007.nii.gz", "patient": 7}],
        "unlabeled": [
            {"image": ["c_0000.nii.gz", "c_0001.nii.gz"], "patient": 12345},
            {"image": "liver.nii.gz", "patient": "Hans Mueller"},
        ],
    }
    assert identifiers(content) == {"bulla7", "K2093", "007", "7", "c", "12345", "liver", "Hans Mueller"}


def test_folders_that_tell_cases_apart_are_identifiers() -> None:
    entries = [{"image": f"scans/{patient}/ct/image.nii.gz"} for patient in ("mueller", "meier")]
    named = {"image", "mueller", "meier", "mueller_image", "meier_image"}
    assert identifiers({"training": entries}) == named
    assert identifiers({"training": entries[:1]}) == {"image"}
    assert identifiers({"training": [{"image": "a/x.nii"}, {"image": "./a/x.nii"}]}) == {"x"}


def test_names_are_words() -> None:
    names = Names(["p01", "Anna-Lena", "Li", "X", "00042", "Ærø", "7"])
    assert names.find("P01") == names.find("ct_p01_left") == {"p01"}
    assert names.find("anna_lena's and Lena Anna's") == {"Anna-Lena"}
    assert names.find("Aeroe") == {"Ærø"}
    assert names.find("00042") == {"00042"}
    assert names.find("Li, patient X; patients 7") == {"Li", "X", "7"}
    assert not names.find("p011, xp01, p1, anna, anna_b_lena, list, X, 42, 7 mm, at 7/8, scan 7")
    assert not Names([])


def test_plain_words() -> None:
    names = {"lung", "left_atrium", "case_7", "Hans", "v2"}
    assert plain_words(names, ["The Lung's left atrium", "of case 7, v2"]) == {"lung", "left_atrium"}


def test_what_is_the_same_whoever_packs_is_not_searched_for_names() -> None:
    card = "made by nnU-Net v2\nof v2\n"
    assert [leak[:23] for leak in find_leaks("docs/a.md", card, {"v2"}, public={"made by nnU-Net v2"})] == [
        "docs/a.md, line 2: foun"
    ]
    config = json.dumps({"a": "v2", "b": "v2", "v2": 1})
    assert not find_leaks("a.json", config, {"v2"}, public=texts_of("a.json", config))
    assert len(find_leaks("a.json", config, {"v2"})) == 3
    assert find_leaks("a.json", json.dumps({"a": "/home/doe/x"}), public={"/home/doe/x"})
