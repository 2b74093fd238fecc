"""What must not leave the house with a bundle: data, names of patients, and where things lie on this machine.

Only what can be told from the text itself is found: a patient's name in a sentence is not. Names of cases and patients
are known when a datalist says them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.datalist import SECTIONS, case_name, with_names
from ..errors import BadInput

__all__ = ["Names", "find_leaks", "identifiers", "plain_words", "texts_of"]

_FOLDERS = (
    "home|Users|root|mnt|media|data|datasets?|work|workspace|projects?|scratch|tmp|var|private|opt|srv|nfs|net|gpfs|"
    "lustre|cluster|export|storage|Volumes|Network"
)
# A drive or a share of Windows, a user's folder, and addresses of files, databases and servers.
_ADDRESSES = (
    re.compile(r"(?<![\w.:/])~/\w[\w.-]*"),
    re.compile(r"(?<!\w)[A-Za-z]:[\\/]{1,2}[A-Za-z0-9_]\w+"),
    re.compile(r"(?<![\w\\])\\\\[A-Za-z0-9][\w.-]*\\[\w$]+"),
    re.compile(r"\b(?:file|sqlite|postgresql|mysql|mssql|s3|gs|ssh|ftp|databricks):/{2,4}[\w.-]+"),
    re.compile(r"\bhttps?://(?:localhost|\d{1,3}(?:\.\d{1,3}){3}|[\w.-]+:\d+)[\w./:-]*"),
)
# In programs, whose slashes mean more than paths: where users' files lie on Unix.
_USUAL_PATH = re.compile(rf"(?<![\w.:/@~}}>)\]-])/(?:{_FOLDERS})/[\w.-]+")
# In what people write and set: any path from the root, any share, and servers that only a house's own network has.
_ANY_PATH = (
    re.compile(r"(?<![\w./@~}>)\]*-])/\w[\w.+-]*(?:/[\w.+-]+)+"),
    re.compile(r"(?<![\w./:])//\w[\w.-]*/[\w$.-]+"),
    re.compile(r"(?<!\w)[A-Za-z]:\\{1,2}\w[\w.-]*"),
    re.compile(
        r"\b[a-z][a-z+]*://(?:[^\s/@]*@)?"
        r"(?:[\w-]+(?![\w.-])|(?:[\w-]+\.)*(?:(?:local|lan|intern|internal|intranet|corp)(?![\w-])|(?:home|localdomain)(?![\w-]|\.\w)))"
        r"[\w./:-]*",
        re.IGNORECASE,
    ),
)
_PATH_IN_EXPRESSION = re.compile(r"(?<!\+)(?<!\+ )(['\"])(/\w[^'\"]*)\1")
_IMAGE_ENDINGS = "nii(?:\\.gz)?|nrrd|nhdr|mha|mhd|dcm|npy|npz|h5"
# Not what comes after a placeholder: <case>_seg.nii.gz and *_seg.nii.gz name no file.
_IMAGE = re.compile(rf"(?<!\w)(?<![>}}*][-.])(?!(?<=[>}}*])_)\w[\w.-]*\.(?:{_IMAGE_ENDINGS})(?![^\W_])", re.IGNORECASE)
_MARK = r"(?:number|nummer|no|nr|id)s?(?![^\W\d_])\.?"
_GAP = r"[-\s_:#=*`]{0,4}"
# "patients: 40" counts them, "patients no. 40" does not.
_PATIENT = re.compile(
    rf"(?<![^\W_])(?:"
    rf"(?:patient(?:en|in)?|subject|participant|proband|accession|pat\.?|sub|mrn){_GAP}(?:{_MARK}{_GAP})?\d"
    rf"|(?:patient|subject|participant|proband|case)s?{_GAP}(?:{_MARK}|#){_GAP}\d"
    rf"|case{_GAP}\d{{2}}|id{_GAP}(?:{_MARK}{_GAP})?\d{{5}})\w*",
    re.IGNORECASE,
)
_INSTANCE = re.compile(r"\b[12]\.\d+(?:\.\d+){5,}\b")
_STANDARD = "1.2.840.10008."  # DICOM's own identifiers, which name nobody
_PATIENT_KEYS = {
    *("patient", "patients", "patientid", "patientname", "patientbirthdate", "birthdate", "dateofbirth", "mrn"),
    *("accessionnumber", "studydate", "studyid", "studyinstanceuid", "seriesinstanceuid", "sopinstanceuid"),
}
_WORD = re.compile(r"[^\W_]+")
_SPELLING = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae"})
# Where a number, or a letter, that alone would say nothing is somebody's.
_PHRASE = re.compile(
    r"(?<![^\W_])(?:patient|subject|participant|proband|case|sub|pat)s?(?:[ _-](?:no|nr|id|number)\.?)?[ _#:-]{0,2}"
    r"([^\W_]+)"
)
_SEGMENT = re.compile(
    rf"(?:(?<=[^\W\d]/)|(?<=[^\W\d]\\))(\d+)(?![^\W_]|\.\d)|(?<![\w./\\])(\d+)[/\\](?=[^\W\d])"
    rf"|(?<![^\W_])(\d+)\.(?:{_IMAGE_ENDINGS})\b"
)
_SHORTEST_NUMBER = 4


def identifiers(datalist: Mapping[str, Any]) -> set[str]:
    """Names of a datalist's cases and patients, and of the folders that tell cases apart whose files are alike."""
    names = set()
    for section in SECTIONS:
        entries = datalist.get(section, ())
        for entry in entries:
            names.add(case_name(entry))
            if entry.get("patient") is not None:
                names.add(str(entry["patient"]))
        with suppress(BadInput):  # one file twice, which has no folders of its own
            for entry, named in zip(entries, with_names(entries), strict=True):
                name, in_results = case_name(entry), case_name(named)
                if in_results != name:
                    names |= {in_results, in_results.removesuffix(f"_{name}")}
    return {name for name in names if _words(name)}


def _folded(text: str) -> str:
    """Without capitals, accents and the two spellings of umlauts."""
    text = unicodedata.normalize("NFC", text).casefold().translate(_SPELLING)
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(_folded(text)))


class Names:
    """Names of cases and patients, found in texts as whole words.

    Capitals, accents and what stands between a name's words (``_``, ``-``, a space, a comma) make no difference, and
    the parts of a name of two words may be turned round. A number of less than four digits and a single letter are
    found where something says whose they are (``patient 7``, ``case_07``), a number also as a part of a path.

    Args:
        names: as :func:`identifiers` gives them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._short: dict[str, str] = {}
        self._by_word: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for name in sorted(set(names)):
            words = _words(name)
            if len(words) == 1 and len(words[0]) < (_SHORTEST_NUMBER if words[0].isdigit() else 2):
                self._short[words[0].lstrip("0") or "0"] = name
                continue
            for order in {words, words[::-1]} if len(words) == 2 else {words}:
                self._by_word.setdefault(order[0], []).append((order, name))

    def __bool__(self) -> bool:
        return bool(self._short or self._by_word)

    def find(self, text: str) -> set[str]:
        """The names that occur in a text."""
        folded = _folded(text)
        words = _WORD.findall(folded)
        found = {
            name
            for place, word in enumerate(words)
            for order, name in self._by_word.get(word, ())
            if tuple(words[place : place + len(order)]) == order
        }
        if self._short:
            said = [match[1] for match in _PHRASE.finditer(folded)]
            said += [next(filter(None, match.groups())) for match in _SEGMENT.finditer(folded)]
            found |= {self._short[word.lstrip("0") or "0"] for word in said if (word.lstrip("0") or "0") in self._short}
        return found


@lru_cache(maxsize=2)
def _names(names: frozenset[str]) -> Names:
    return Names(names)


def plain_words(names: Collection[str], texts: Iterable[str]) -> set[str]:
    """The names that are words of texts which name nobody, such as a case called like a class; none with a digit."""
    looked_for = Names(name for name in names if not re.search(r"\d", name))
    return {name for text in texts for name in looked_for.find(text)}


def texts_of(name: str, content: str) -> set[str]:
    """The parts of a file that :func:`find_leaks` looks at one by one: a JSON file's keys and strings, or lines."""
    if name.endswith(".json"):
        return {text for _, text in _keys_and_strings(json.loads(content))}
    return {line.strip() for line in content.splitlines()}


def find_leaks(
    name: str,
    content: str,
    names: Collection[str] = (),
    folders: Collection[Path] = (),
    public: Collection[str] = frozenset(),
) -> list[str]:
    """What a text should not say, one message a place: file, line or key, what was found, what to do.

    Args:
        name: the file's name; of ``.json`` the keys and values are looked at, of others the lines. Programs (``.py``)
            are searched for paths and DICOM identifiers alone: their examples may be called like somebody's cases.
        content: the text.
        names: identifiers of cases and patients that must not occur.
        folders: folders of this machine that must not occur.
        public: parts, see :func:`texts_of`, that are the same whoever packs; names are not looked for in them.
    """
    code, is_json = name.endswith(".py"), name.endswith(".json")
    known = _names(frozenset() if code else frozenset(names))
    local = [re.compile(rf"(?<![\w.]){re.escape(str(folder))}(?!\w)") for folder in folders if len(folder.parts) > 1]
    leaks: list[str] = []
    if is_json:
        value = json.loads(content)
        leaks += [f"{name}, {key}: {fault}" for key, fault in _structure_faults(value)]
        places = [(f"{name}, {key}", text) for key, text in _keys_and_strings(value)]
    elif code and not any(pattern.search(content) for pattern in (*local, *_ADDRESSES, _USUAL_PATH, _INSTANCE)):
        places = []
    else:
        places = [(f"{name}, line {number}", line) for number, line in enumerate(content.splitlines(), 1)]
    for place, text in places:
        found = known.find(text) if known and text.strip() not in public else ()
        if found:
            leaks.append(f"{place}: found {min(found)!r}, the name of a case or patient of the datalist. Remove it.")
        else:
            leaks += [f"{place}: {fault}" for fault in _text_faults(text, local, is_json, code)]
    return leaks


def _keys_and_strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            place = f"{key}#{name}" if key else str(name)
            yield place, str(name)
            yield from _keys_and_strings(item, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _keys_and_strings(item, f"{key}#{index}")
    elif isinstance(value, str):
        yield key, value


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
    if code:
        paths: tuple[re.Pattern[str], ...] = (_USUAL_PATH,)
    elif value and text.startswith("$"):  # an expression, in which a path may go on from another
        paths = (_USUAL_PATH, _PATH_IN_EXPRESSION)
    else:
        paths = _ANY_PATH
    found = next((match[0] for pattern in (*local, *_ADDRESSES, *paths) if (match := pattern.search(text))), None)
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
    if match := _IMAGE.search(text):
        yield f"found {match[0]!r}, the name of an image file. Remove it, or write <case> for the name."
    elif match := _PATIENT.search(text):
        yield f"found {match[0]!r}, which looks like the name of a patient or case. Remove it."
