"""Archives of bundles: the same files give the same bytes, and nothing is unpacked before it is looked at."""

from __future__ import annotations

import hashlib
import io
import stat
import unicodedata
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CHECKSUMS", "Limits", "archive_bytes", "checksum_list", "entry_faults", "size_faults"]

CHECKSUMS = "checksums.sha256"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_REGULAR_FILE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
# What a few bytes unpack to may be many times as much without harm.
_RATIO_FROM = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to.

    Args:
        size: bytes of all files together.
        ratio: of a file's size to what it takes in the archive; that of text is some ten, of weights about one.
        files: number of files.
    """

    size: float = 4e9
    ratio: float = 100.0
    files: int = 10_000


def checksum_list(files: Mapping[str, bytes]) -> bytes:
    """The SHA-256 of every file, as ``sha256sum --check`` reads it."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def archive_bytes(top: str, files: Mapping[str, bytes]) -> memoryview:
    """A zip file with ``files`` in the folder ``top``.

    Sorted, with one time and one mode for all, and not compressed: weights hardly shrink, and what deflation makes
    differs from one version of zlib to the next.

    Args:
        top: the one folder at the top.
        files: content by path below ``top``.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{top}/{name}", _EPOCH)
            entry.external_attr, entry.create_system = _REGULAR_FILE, _UNIX
            archive.writestr(entry, files[name])
    return buffer.getbuffer()


def _name_fault(name: str) -> str | None:
    parts = name.removesuffix("/").split("/")
    if not name.isprintable():
        return "has characters in its name that can't be shown"
    if "\\" in name:
        return "has a backslash in its name, which separates folders on Windows"
    if ":" in name:
        return "has a colon in its name, as drives have on Windows"
    if name.startswith("/"):
        return "is an absolute path"
    if ".." in parts:
        return "leads out of the folder that it is unpacked into (..)"
    if "" in parts or "." in parts:
        return "is not a plain path"
    return None


def entry_faults(archive: zipfile.ZipFile, limits: Limits) -> list[tuple[str, str]]:
    """What forbids to unpack an archive, as (path, fault), from its directory alone.

    Paths that leave the target, links and devices, files that are encrypted or oddly compressed, one name twice (also
    when only case or Unicode form differ, which is one file on Windows and macOS), a file where another path has a
    folder, and more than ``limits``.
    """
    faults: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    folders: set[str] = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        fault = _name_fault(name)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind == stat.S_IFLNK:
            fault = fault or "is a link"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = fault or "is neither a file nor a folder"
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fault = fault or "is compressed in a way that few programs know"
        if entry.flag_bits & 0x1:
            fault = fault or "is encrypted"
        key = unicodedata.normalize("NFC", name.removesuffix("/")).casefold()
        if key in seen:
            same = "is there twice" if seen[key] == name else f"is one file with {seen[key]} on Windows and macOS"
            fault = fault or same
        seen[key] = name
        if name.endswith("/"):
            fault = fault or ("is a folder that holds data" if entry.file_size else None)
            folders.add(key)
        parts = key.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if fault:
            faults.append((name, fault))
    files = {key for key, name in seen.items() if not name.endswith("/")}
    faults += [(seen[key], "is both a file and a folder") for key in sorted(files & folders)]
    return faults + size_faults(archive, limits)


def size_faults(archive: zipfile.ZipFile, limits: Limits) -> list[tuple[str, str]]:
    """Where an archive is larger than ``limits`` once unpacked, as (path, fault), by what its directory declares."""
    entries = archive.infolist()
    faults = []
    if len(entries) > limits.files:
        faults.append(("", f"has {len(entries)} files, more than {limits.files}"))
    total = sum(entry.file_size for entry in entries)
    if total > limits.size:
        faults.append(("", f"unpacks to {total / 1e9:.2f} GB, more than {limits.size / 1e9:g} GB"))
    for entry in entries:
        ratio = entry.file_size / max(entry.compress_size, 1)
        if entry.file_size > _RATIO_FROM and ratio > limits.ratio:
            faults.append((entry.filename, f"unpacks to {ratio:.0f} times its size, more than {limits.ratio:g} times"))
    return faults
