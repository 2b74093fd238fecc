"""Damaged and hostile files, made from good ones with fixed seeds, each handed to what reads it.

``python tests/fuzz/mutants.py FOLDER`` writes the files below ``FOLDER`` and a line of JSON each to
``FOLDER/outcomes.jsonl``: ``{"kind", "file", "change", "outcome", "message"}``, where the outcome is ``right``,
``refused`` (a :class:`BadInput` that names the file) or ``wrong``. It limits its own memory, since some of the files
claim terabytes, and ends with every thread's traceback when one of them takes too long.
"""

from __future__ import annotations

import faulthandler
import gzip
import hashlib
import io
import json
import logging
import math
import os
import pickle
import random
import resource
import signal
import stat
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser

from common.data.checks import check_cases, check_labels
from common.data.datalist import SECTIONS, load_section, read_datalist
from common.data.grids import read_grid
from common.data.inputs import find_cases
from common.engines.origin import start_from
from common.engines.prediction import predict
from common.errors import BadInput
from common.networks import SegmentationNetwork, read_weights, save_weights, state_digest
from common.packing import CHECKSUMS, pack_bundle, verify_archive
from common.packing.archive import archive_bytes, checksum_list
from common.transforms import LoadCased

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2_000_000_000  # bytes more than the libraries take
SECONDS = 20  # of computing, for one file
HANG = 300  # seconds by the clock, for a file that computes nothing either, on a busy machine
COUNTS = {"nifti": 200, "datalist": 100, "checkpoint": 80, "archive": 120}
LABELS = {"0": "background", "1": "organ"}
NETWORK = {"features": [2, 2], "kernel_sizes": [3, 3], "strides": [1, 2]}
SHAPE = (8, 7, 6)


def flip_bits(content: bytes, random_state: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """Change up to 20 bits between two places."""
    changed = bytearray(content)
    for _ in range(random_state.choice((1, 1, 2, 5, 20))):
        changed[random_state.randrange(first, last or len(changed))] ^= 1 << random_state.randrange(8)
    return bytes(changed)


def cut(content: bytes, random_state: random.Random) -> bytes:
    """Leave the beginning."""
    return content[: random_state.randrange(len(content))]


# --- NIfTI

HEADER = nibabel.Nifti1Header.template_dtype
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-30, 1e-6, 0.3, 40.0, 1e6, 1e30, -1e38)
WHOLE = (-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 99, 1024, 32767)
TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 255, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 9999)


def _volume(random_state: random.Random) -> bytes:
    shape = random_state.choice((SHAPE, (*SHAPE, 1), (*SHAPE, 2), SHAPE[:2], (8, 7, 1)))
    values = np.random.default_rng(0).integers(-1000, 1000, shape)
    affine = np.diag([1.0, -1.5, 2.0, 1.0])
    return nibabel.Nifti1Image(values.astype(random_state.choice((np.int16, np.float32))), affine).to_bytes()


def _set_field(content: bytes, random_state: random.Random, name: str) -> bytes:
    kind, offset = HEADER.fields[name][:2]
    kind, shape = kind.subdtype or (kind, ())
    index = random_state.randrange(math.prod(shape))
    if kind.kind == "f":
        value = np.array(random_state.choice(SPECIAL), kind).tobytes()
    elif kind.kind in "iu":
        choices = TYPES if name == "datatype" else WHOLE
        value = np.array(random_state.choice(choices)).astype(kind).tobytes()
    else:
        value = random_state.randbytes(kind.itemsize)
    place = offset + index * kind.itemsize
    return content[:place] + value + content[place + kind.itemsize :]


def _fields(content: bytes, random_state: random.Random) -> bytes:
    for _ in range(random_state.choice((1, 1, 2, 4))):
        content = _set_field(content, random_state, random_state.choice(HEADER.names))
    return content


def _with(content: bytes, **values: Any) -> bytes:
    header = np.frombuffer(content[: HEADER.itemsize], HEADER).copy()
    for name, value in values.items():
        header[name][0] = value
    return header.tobytes() + content[HEADER.itemsize :]


def _dims(content: bytes, random_state: random.Random) -> bytes:
    rank = random_state.randrange(-1, 9)
    return _with(content, dim=[rank, *random_state.choices((0, 1, 2, 6, 7, 8, 60, -8), k=7)])


def _huge(content: bytes, random_state: random.Random) -> bytes:
    rank = random_state.choice((3, 4))
    return _with(content, dim=[rank, *random_state.choices((20_000, 32_767), k=rank), *[1] * (7 - rank)])


def _affine(content: bytes, random_state: random.Random) -> bytes:
    rows = {f"srow_{axis}": [random_state.choice((*SPECIAL, 1.0, 2.0)) for _ in range(4)] for axis in "xyz"}
    return _with(content, sform_code=1, **rows)


def _spacing(content: bytes, random_state: random.Random) -> bytes:
    sides = [random_state.choice((1e-6, 0.01, 0.3, 3.0, 20.0, 1e3, 1e6, 1e20)) for _ in range(3)]
    rows = {f"srow_{axis}": np.eye(4)[index] * sides[index] for index, axis in enumerate("xyz")}
    return _with(content, sform_code=1, **rows)


VOLUMES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_fields, _fields, _fields, _dims, _huge, _affine, _spacing, cut, cut, flip_bits),
    lambda content, random_state: flip_bits(content, random_state, last=HEADER.itemsize),
    lambda content, random_state: content + random_state.randbytes(100),
    lambda content, random_state: random_state.choice((b"", b"no image", bytes(352), content[:348], content[:352])),
)


def volumes(folder: Path, random_state: random.Random) -> Iterator[tuple[Path, str]]:
    """Plain and compressed NIfTI files."""
    folder.mkdir()
    for index in range(COUNTS["nifti"]):
        change = VOLUMES[index // 2 % len(VOLUMES)]
        content, compressed = _volume(random_state), bool(index % 2)
        name = change.__name__
        if not compressed:
            content = change(content, random_state)
        elif random_state.random() < 0.4:  # the file, where it was the content
            whole = gzip.compress(content, mtime=0)
            content = cut(whole, random_state) if change is cut else flip_bits(whole, random_state)
            name = "gzip, damaged"
        else:
            content = gzip.compress(change(content, random_state), mtime=0)
            if random_state.random() < 0.1:
                content = random_state.choice((gzip.decompress(content), gzip.compress(content), content + b"more"))
        path = folder / f"mutant_{index:03d}.nii{'.gz' * compressed}"
        path.write_bytes(content)
        yield path, name


def look_at_volume(path: Path) -> str:
    """Read one; what comes back must be whole."""
    grid = read_grid(path)
    image = LoadCased(("image",))({"image": str(path)})["image"]
    assert tuple(image.shape[1:]) == grid.shape, (tuple(image.shape), grid.shape)
    assert image.shape[0] == grid.channels
    assert bool(torch.isfinite(image).all())
    assert np.isfinite(grid.affine).all()
    assert image.numel() < 1e7
    return "right"


def predict_volumes(folder: Path, output: Path) -> Iterator[tuple[Path, str, str]]:
    """Predict all of them in one run, as a user does with a folder: file, outcome, message."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / "teacher" / "configs" / "inference.json"))
    parser.update({**NETWORK, "labels": LABELS, "patch_size": [8, 8, 8], "input": str(folder), "device": "cpu"})
    parser.update({"output_dir": str(output), "amp": False})
    output.mkdir()
    cases = parser.get_parsed_content("dataset#data")
    said = ""
    try:
        predict(parser.get_parsed_content("evaluator"), cases)
    except BadInput as error:
        said = str(error)
    lines = said.splitlines()
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        message = next((line.strip() for line in lines if f"{path.name}" in line), "")
        written = output / f"{name}_seg.nii.gz"
        if message:
            yield path, "wrong" if written.exists() else "refused", message
            continue
        source, found = nibabel.load(path), nibabel.load(written)
        fine = found.shape == source.shape[:3] and np.allclose(found.affine, source.affine, rtol=1e-4, atol=1e-4)
        fine = fine and set(np.unique(found.dataobj)) <= {0, 1}
        yield path, "right" if fine else "wrong", "" if fine else f"{found.shape} {source.shape}: {found.affine}"


# --- datalists

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, "", "\0", "\ud800", "~no-such-user/x.nii", "/etc/passwd", "/dev/zero", "a" * 5000),
    *([], {}, [[]], [None], [1, "a"], {"a": {}}, [{"image": "a"}], "image.nii.gz", ["image.nii.gz"], float("nan")),
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _datalist(random_state: random.Random) -> dict[str, Any]:
    content: dict[str, Any] = {"labels": dict(LABELS), "numTraining": 2}
    for name in SECTIONS:
        image, label = f"../{name}.nii.gz", "../label.nii.gz"
        entry = {"image": image, "label": label, "patient": f"p {name}", "annotated": [0, 1], "score": 3}
        content[name] = [entry, {"image": [f"../{name}_b.nii.gz"], "label": label}]
    for _ in range(random_state.choice((0, 1, 1, 2, 3))):
        place, key = random_state.choice(list(_places(content)))
        if random_state.random() < 0.3:
            place.pop(key)
        else:
            place[key] = random_state.choice(VALUES)
    return content


def datalists(folder: Path, random_state: random.Random) -> Iterator[tuple[Path, str]]:
    """JSON files beside an image and its label."""
    folder.mkdir()
    values = np.zeros(SHAPE, np.uint8)
    for name in (*SECTIONS, *(f"{section}_b" for section in SECTIONS), "label"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder.parent / f"{name}.nii.gz")
    odd = (
        *(b"", b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"null", b'"training"', b"\xef\xbb\xbf{}", b"{}"),
        *(b'{"training": [' + b"9" * 5000 + b"]}", b'{"training": {"image": 1}}', b'{"training": [], "training": 1}'),
        *(b"\xff\xfe{", '{"training": ["ä"]}'.encode("latin-1"), '{"training": []}'.encode("utf-16"), bytes(1000)),
    )
    for index in range(COUNTS["datalist"]):
        content = json.dumps(_datalist(random_state)).encode()
        change = ("structure", "structure", "structure", "bits", "cut")[index % 5]
        if index < len(odd):
            content, change = odd[index], "odd"
        elif change == "bits":
            content = flip_bits(content, random_state)
        elif change == "cut":
            content = cut(content, random_state)
        path = folder / f"mutant_{index:03d}.json"
        path.write_bytes(content)
        yield path, change


def look_at_datalist(path: Path) -> str:
    """Read every section as a training does, and the cases to predict."""
    content = read_datalist(path)
    targets = [{"name": "score", "kind": "mean"}]
    sections = {name: load_section(content, name, required=False, optional=["score"]) for name in SECTIONS}
    check_labels(content, LABELS)
    check_cases(sections["training"], LABELS, 1, targets, [8, 8, 8], sections["validation"])
    for entries in sections.values():
        assert all(os.path.exists(item) for entry in entries for item in np.atleast_1d(entry["image"]))
    find_cases(path)
    return "right"


# --- weights


class Touch:
    """Unpickling this leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return SegmentationNetwork(3, 1, 2, NETWORK["features"], NETWORK["kernel_sizes"], NETWORK["strides"])


def _saved(content: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _strange_states(state: dict[str, torch.Tensor], mark: Path) -> Iterator[Any]:
    name = next(iter(state))
    for value in (
        *(torch.zeros(1).expand(10_000, 100_000, 100), torch.zeros(1).expand(state[name].shape)),
        *(state[name].to_sparse(), state[name].to(torch.complex64), state[name].half(), state[name] * math.nan),
        *(state[name].to("meta"), state[name][:1], torch.zeros(0), torch.tensor(1.0)),
        *(torch.quantize_per_tensor(state[name].float(), 0.1, 0, torch.qint8), Touch(mark), 3, "a", None),
    ):
        yield {"model": {**state, name: value}}
    yield from (Touch(mark), [], {}, 3, "a", None, {"model": None}, {"model": {}}, {1: state[name]}, state)
    yield {"model": {**state, 1: state[name]}}
    yield {"model": {**state, "": state[name]}}
    yield {"model": dict.fromkeys(list(state)[:-1], state[name])}


def checkpoints(folder: Path, random_state: random.Random) -> Iterator[tuple[Path, str]]:
    """Weights files, with a record beside some."""
    folder.mkdir()
    state, mark = _network().state_dict(), folder.parent / "ran"
    strange = list(_strange_states(state, mark))
    whole = {legacy: _saved({"model": state}, legacy) for legacy in (False, True)}
    records = ("[" * 100_000, "[]", "9" * 5000, "config", {"config": []}, {"config": {"network_def": 3, "targets": 3}})
    records = (*records, {"config": {"labels": 3, "targets": [3], "spacing": {}, "network_def": {"_target_": 1}}})
    for index in range(COUNTS["checkpoint"]):
        path = folder / f"mutant_{index:03d}.pt"
        if index < len(strange):
            content, change = _saved(strange[index]), "strange"
        elif index < len(strange) + len(records):
            content, change = whole[False], "record"
            record = records[index - len(strange)]
            record = {"weights": state_digest(state), **record} if isinstance(record, dict) else record
            path.with_suffix(".json").write_text(record if isinstance(record, str) else json.dumps(record))
        elif index % 8 == 0:
            command = pickle.dumps(Touch(mark), protocol=index % 5)
            content, change = command + whole[True] if index % 16 else command, "pickle"
        else:
            content = whole[index % 3 == 0]
            if index % 4 == 0:
                content, change = cut(content, random_state), "cut"
            else:
                last = 1200 if random_state.random() < 0.7 else None
                content, change = flip_bits(content, random_state, last=last), "bits"
        path.write_bytes(content)
        yield path, change


def look_at_checkpoint(path: Path) -> str:
    """Start a network from it: all of it fits and is finite, or nothing has changed."""
    network, before = _network(1), state_digest(_network(1).state_dict())
    try:
        state = read_weights(path)
        start_from(network, path, "teacher weights")
    except BadInput:
        assert state_digest(network.state_dict()) == before
        raise
    now = network.state_dict()
    assert all(torch.equal(now[name], value.to(now[name].dtype)) for name, value in state.items())
    assert all(bool(torch.isfinite(value).all()) for value in now.values())
    return "right"


# --- archives


def _contents(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def _with_entry(
    content: bytes, name: str, mode: int = stat.S_IFREG, data: bytes = b"x", method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        entry.compress_type = method
        archive.writestr(entry, data)
    return buffer.getvalue()


def _hostile(content: bytes, top: str, files: dict[str, bytes], mark: Path) -> Iterator[bytes]:
    outside = "../../../../../../../../../.." + str(mark)
    for name in (
        *(f"{top}/../../ran", f"{top}/{outside}", f"{top}/..", f"{top}\\..\\..\\ran", f"{top}/a\0b", f"{top}/\u202e"),
        *(str(mark), "..", "C:/ran", "//a/b", "\ud7ff/a", "", ".", "/", f"{top}/{'a' * 300}", f"{top}/{'a/' * 500}b"),
        *(f"{top}/LICENSE", f"{top}/LICENSE/", f"{top}/LICENSE/a", f"{top}/configs", f"{top}/configs/\u212a.json"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _with_entry(content, name)
    for target in (str(mark), "../../..", "/etc/passwd"):
        yield _with_entry(content, f"{top}/docs/link", stat.S_IFLNK | 0o777, target.encode())
    yield _with_entry(_with_entry(content, f"{top}/a", stat.S_IFLNK | 0o777, str(mark.parent).encode()), f"{top}/a/ran")
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        yield _with_entry(content, f"{top}/docs/device", kind | 0o644)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield _with_entry(content, f"{top}/docs/bomb.md", data=bytes(20_000_000), method=method)
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name, text in (
        ("configs/inference.json", json.dumps({"run": [f"${code}"]})),
        ("configs/train.json", json.dumps({"run": {"_target_": "pathlib.Path.touch", "self": str(mark)}})),
        ("configs/more.json", "[" * 100_000),
        ("configs/more.json", '{"a": ' + "9" * 5000 + "}"),
        ("configs/more.json", json.dumps({"a": "$" + "(" * 5000 + ")" * 5000})),
        ("configs/more.json", json.dumps({"a": "$" + "-" * 50_000 + "1"})),
        ("configs/more.json", json.dumps({"a": {"_target_": "\ud800.b"}})),
        ("configs/more.json", json.dumps({"a": "$@b.\ud800"})),
        ("configs/metadata.json", "{}"),
        ("configs/metadata.json", '{"schema": ' + "[" * 900 + "]" * 900 + "}"),
        ("configs/metadata.json", json.dumps({"schema": "file:///etc/passwd", "$ref": "file:///etc/passwd"})),
        ("configs/logging.conf", f"[handlers]\nkeys=a\n[handler_a]\nclass=StreamHandler\nargs=({code},)\n"),
        ("models/model.json", "[]"),
        ("models/model.json", "[" * 100_000),
        ("models/model.pt", ""),
        ("scripts/common/__init__.py", code),
        (CHECKSUMS, "a\n" * 100_000),
    ):
        changed = {**files, name: text.encode()}
        if name != CHECKSUMS:
            changed[CHECKSUMS] = checksum_list({name: data for name, data in changed.items() if name != CHECKSUMS})
        yield bytes(archive_bytes(top, changed))


def archives(folder: Path, random_state: random.Random) -> Iterator[tuple[Path, str]]:
    """Packed bundles."""
    folder.mkdir()
    plan, weights, good = folder.parent / "plan.json", folder.parent / "good.pt", folder.parent / "good.zip"
    plan.write_text(json.dumps({**NETWORK, "labels": LABELS, "patch_size": [8, 8, 8]}))
    save_weights(_network(), weights)
    pack_bundle("teacher", good, plan, weights, version="1.0.0")
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    hostile = list(_hostile(content, "teacher", files, folder.parent / "ran"))
    directory = struct.unpack("<I", content[-6:-2])[0]
    for index in range(COUNTS["archive"]):
        if index < len(hostile):
            changed, change = hostile[index], "hostile"
        elif index % 4 == 0:
            changed, change = cut(content, random_state), "cut"
        else:
            first = (0, directory, len(content) - 22)[index % 3]
            changed, change = flip_bits(content, random_state, first), "bits"
        path = folder / f"mutant_{index:03d}.zip"
        path.write_bytes(changed)
        yield path, change


def look_at_archive(path: Path) -> str:
    """Verify it: what is fine holds just what was packed."""
    report = verify_archive(path)
    if report.fine:
        good = _contents(path.parents[1].joinpath("good.zip").read_bytes())
        assert _contents(path.read_bytes()) == good
        return "right"
    for part in report.problems:
        assert all(part), part
    raise BadInput(f"{report.file}: {report.problems[0]}")


KINDS: dict[str, tuple[Callable[[Path, random.Random], Iterator[tuple[Path, str]]], Callable[[Path], str]]] = {
    "nifti": (volumes, look_at_volume),
    "datalist": (datalists, look_at_datalist),
    "checkpoint": (checkpoints, look_at_checkpoint),
    "archive": (archives, look_at_archive),
}


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class TooLong(BaseException):
    """No error that a reader could take for one of its own, as it would a ``TimeoutError``."""


def _too_long(*_: Any) -> None:
    raise TooLong(f"{SECONDS} s and more")


def main(folder: Path, kinds: list[str]) -> None:
    """Make all files, look at each, and write what came of it."""
    faulthandler.enable()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _too_long)
    made = {
        kind: list(KINDS[kind][0](folder / kind, random.Random(index)))
        for index, kind in enumerate(KINDS)
        if kind in kinds
    }
    _limit_memory()
    with open(folder / "outcomes.jsonl", "w", encoding="utf-8") as report:

        def note(kind: str, path: Path, change: str, outcome: str, message: str) -> None:
            line = {"kind": kind, "file": path.name, "change": change, "outcome": outcome, "message": message}
            report.write(json.dumps(line) + "\n")
            report.flush()

        for kind, mutants in made.items():
            for path, change in mutants:
                faulthandler.dump_traceback_later(HANG, exit=True)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                message = ""
                try:
                    outcome = KINDS[kind][1](path)
                except BadInput as error:
                    message = str(error)
                    # A fault of an image that a datalist names is said of that image.
                    images = (*SECTIONS, "/dev/zero", "/etc/passwd") if kind == "datalist" else ()
                    named = any(name in message for name in (path.name, *images))
                    outcome = "refused" if named else "wrong"
                except BaseException as error:
                    outcome, message = "wrong", f"{type(error).__name__}: {error}"[:1000]
                signal.setitimer(signal.ITIMER_PROF, 0)
                note(kind, path, change, outcome, message)
            if kind == "nifti":
                faulthandler.dump_traceback_later(HANG, exit=True)
                for path, outcome, message in predict_volumes(folder / kind, folder / "predicted"):
                    note("prediction", path, "", outcome, message)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(KINDS))
