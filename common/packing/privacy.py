"""What must not leave the house with a bundle: data, names of patients, and where things lie on this machine.

Only what can be told from the text itself is found: a patient's name in a sentence is not. Names of cases and patients
are known when a datalist says them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.datalist import SECTIONS, case_name
from .configs import strings

__all__ = ["find_leaks", "identifiers"]

_FOLDERS = (
    "home|Users|root|mnt|media|data|datasets?|work|workspace|projects?|scratch|tmp|var|private|opt|srv|nfs|net|gpfs|"
    "lustre|cluster|export|storage|Volumes|Network"
)
# Where users' files lie on Unix, a drive or a share of Windows, and addresses of files, databases and servers.
_PATHS = (
    re.compile(rf"(?<![\w.:/@~}}>)\]-])/(?:{_FOLDERS})/[\w.-]+"),
    re.compile(r"(?<![\w.:/])~/\w[\w.-]*"),
    re.compile(r"(?<!\w)[A-Za-z]:[\\/]{1,2}[A-Za-z0-9_]\w+"),
    re.compile(r"(?<![\w\\])\\\\[A-Za-z0-9][\w.-]*\\[\w$]+"),
    re.compile(r"\b(?:file|sqlite|postgresql|mysql|mssql|s3|gs|ssh|ftp|databricks):/{2,4}[\w.-]+"),
    re.compile(r"\bhttps?://(?:localhost|\d{1,3}(?:\.\d{1,3}){3}|[\w.-]+:\d+)[\w./:-]*"),
)
_WHOLE_PATH = re.compile(r"/[\w.-]+(?:/[\w. -]+)+/?")
_PATH_IN_EXPRESSION = re.compile(r"(?<!\+)(?<!\+ )(['\"])(/\w[^'\"]*)\1")
_IMAGE = re.compile(r"[\w.-]+\.(?:nii|nii\.gz|nrrd|nhdr|mha|mhd|dcm|npy|npz|h5)$", re.IGNORECASE)
_PATIENT = re.compile(r"\b(?:patient|subject|sub|pat|case)[-_ ]?\d{2,}\w*", re.IGNORECASE)
_INSTANCE = re.compile(r"\b[12]\.\d+(?:\.\d+){5,}\b")
_STANDARD = "1.2.840.10008."  # DICOM's own identifiers, which name nobody
_PATIENT_KEYS = {
    *("patient", "patients", "patientid", "patientname", "patientbirthdate", "birthdate", "dateofbirth", "mrn"),
    *("accessionnumber", "studydate", "studyid", "studyinstanceuid", "seriesinstanceuid", "sopinstanceuid"),
}
_SHORTEST_NAME = 4


def identifiers(datalist: Mapping[str, Any]) -> set[str]:
    """Names of a datalist's cases and patients that are long enough to be recognised and hold a digit."""
    names = set()
    for section in SECTIONS:
        for entry in datalist.get(section, ()):
            names.add(case_name(entry))
            if entry.get("patient") is not None:
                names.add(str(entry["patient"]))
    return {name for name in names if len(name) >= _SHORTEST_NAME and re.search(r"\d", name)}


def find_leaks(name: str, content: str, names: Collection[str] = (), folders: Collection[Path] = ()) -> list[str]:
    """What a text should not say, one message a place: file, line or key, what was found, what to do.

    Args:
        name: the file's name; of ``.json`` the values are looked at, of others the lines. Programs (``.py``) are
            searched for paths and DICOM identifiers alone: their examples may be called like somebody's cases.
        content: the text.
        names: identifiers of cases and patients that must not occur.
        folders: folders of this machine that must not occur.
    """
    code, is_json = name.endswith(".py"), name.endswith(".json")
    any_name = "|".join(re.escape(text) for text in sorted(names))
    known = re.compile(rf"(?<![A-Za-z0-9])(?:{any_name})(?![A-Za-z0-9])" if names and not code else r"(?!)")
    local = [re.compile(rf"(?<![\w.]){re.escape(str(folder))}(?!\w)") for folder in folders if len(folder.parts) > 1]
    leaks: list[str] = []
    if is_json:
        value = json.loads(content)
        leaks += [f"{name}, {key}: {fault}" for key, fault in _structure_faults(value)]
        places = [(f"{name}, {key}", text) for key, text in strings(value)]
    elif any(pattern.search(content) for pattern in (known, *local, *_PATHS, _INSTANCE, _PATIENT)):
        places = [(f"{name}, line {number}", line) for number, line in enumerate(content.splitlines(), 1)]
    else:
        places = []
    for place, text in places:
        if found := known.search(f"{place}: {text}"):
            leaks.append(f"{place}: found {found[0]!r}, the name of a case or patient of the datalist. Remove it.")
        else:
            leaks += [f"{place}: {fault}" for fault in _text_faults(text, local, is_json, code)]
    return leaks


def _structure_faults(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            place = f"{key}#{name}" if key else str(name)
            if re.sub(r"[^a-z]", "", str(name).lower()) in _PATIENT_KEYS and item not in (None, "", [], {}):
                yield place, f"found {str(item)[:40]!r}, which says something of a patient. Remove the key."
            elif name in SECTIONS and isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
                yield place, f"found a list of {len(item)} cases, which is training data. Remove the key."
            else:
                yield from _structure_faults(item, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _structure_faults(item, f"{key}#{index}")


def _text_faults(text: str, local: Collection[re.Pattern[str]], value: bool, code: bool) -> Iterator[str]:
    found = next((match[0] for pattern in (*local, *_PATHS) if (match := pattern.search(text))), None)
    if value and not found:
        inside = _PATH_IN_EXPRESSION.search(text) if text.startswith("$") else _WHOLE_PATH.fullmatch(text)
        found = inside and inside[0]
    if found:
        yield (
            f"found {found!r}, a place that only this machine or network knows. Remove it, or make it relative to "
            "@bundle_root."
        )
        return
    for match in _INSTANCE.finditer(text):
        if not match[0].startswith(_STANDARD):
            yield f"found {match[0]!r}, which looks like the identifier of a DICOM study or image. Remove it."
            return
    if code:
        return
    if match := (_IMAGE.search(text) if value and not text.startswith("$") else None):
        yield f"found {match[0]!r}, the name of an image file. Remove it."
    elif match := _PATIENT.search(text):
        yield f"found {match[0]!r}, which looks like the name of a patient or case. Remove it."
