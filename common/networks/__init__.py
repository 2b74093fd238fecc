"""Networks: nnU-Net's U-Net, the dual decoder above it, and the weights that pass between them."""

from __future__ import annotations

from .attention import AnatomyCrossAttention, soft_edges, to_grid
from .dual_decoder import DualDecoderNetwork, RegressionDecoder, RegressionNetwork
from .reductions import likeliest_class, reduce_to_case
from .unet import Decoder, Encoder, SegmentationNetwork
from .weights import check_finite, hand_over, load_frozen, read_record, read_weights, save_weights, state_digest

__all__ = [
    "AnatomyCrossAttention",
    "Decoder",
    "DualDecoderNetwork",
    "Encoder",
    "RegressionDecoder",
    "RegressionNetwork",
    "SegmentationNetwork",
    "check_finite",
    "hand_over",
    "likeliest_class",
    "load_frozen",
    "read_record",
    "read_weights",
    "reduce_to_case",
    "save_weights",
    "soft_edges",
    "state_digest",
    "to_grid",
]
