"""Datalists, phantoms, thickness from masks, and reproducible streams of batches."""

from __future__ import annotations

from .caching import CachedDataset
from .checks import check_cases, check_labels, check_output
from .datalist import SECTIONS, case_keys, case_name, load_section, read_datalist
from .inputs import find_cases
from .partial import organ_cases, unknown_as_background
from .phantom_set import generate_phantoms
from .streams import (
    EpochSampler,
    ProcessShare,
    SeededDataset,
    StreamLoader,
    collate_plain,
    loading_processes,
    make_loader,
    whole_cases,
)
from .thickness import wall_thickness

__all__ = [
    "SECTIONS",
    "CachedDataset",
    "EpochSampler",
    "ProcessShare",
    "SeededDataset",
    "StreamLoader",
    "case_keys",
    "case_name",
    "check_cases",
    "check_labels",
    "check_output",
    "collate_plain",
    "find_cases",
    "generate_phantoms",
    "load_section",
    "loading_processes",
    "make_loader",
    "organ_cases",
    "read_datalist",
    "unknown_as_background",
    "wall_thickness",
    "whole_cases",
]
