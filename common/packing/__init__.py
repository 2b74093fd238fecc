"""Sharing: a trained bundle packed into one archive, and an archive checked before it is used."""

from __future__ import annotations

from .archive import CHECKSUMS, Limits
from .pack import pack_bundle
from .verify import verify_archive

__all__ = ["CHECKSUMS", "Limits", "pack_bundle", "verify_archive"]
