"""Plans: from what a data set shows to the settings that all bundles take."""

from .doubts import doubts
from .findings import Findings, find
from .plan import make_plan
from .topology import (
    Topology,
    estimate_feature_maps,
    parse_memory,
    plan_features,
    plan_patch,
    plan_spacing,
    plan_topology,
)

__all__ = [
    "Findings",
    "Topology",
    "doubts",
    "estimate_feature_maps",
    "find",
    "make_plan",
    "parse_memory",
    "plan_features",
    "plan_patch",
    "plan_spacing",
    "plan_topology",
]
