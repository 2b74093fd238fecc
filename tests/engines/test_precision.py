from __future__ import annotations

import pytest
import torch

from common.engines import precision
from common.errors import BadInput


@pytest.fixture
def hardware(monkeypatch):
    """Says which devices multiply bf16."""

    def pretend(cpu: bool = False, gpu: bool = False) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: gpu)

    return pretend


@pytest.mark.parametrize(
    ("amp", "device", "cpu", "gpu", "expected"),
    [
        (False, "cpu", True, True, None),
        (False, "cuda", True, True, None),
        ("auto", "cpu", False, True, None),
        ("auto", "cpu", True, False, torch.bfloat16),
        ("auto", "cuda:0", False, True, torch.bfloat16),
        ("auto", "cuda:1", True, False, torch.float16),
        (True, "cpu", False, False, torch.bfloat16),
        (True, "cuda", False, False, torch.float16),
        ("bf16", "cpu", False, False, torch.bfloat16),
        ("bf16", "cuda", False, False, torch.bfloat16),
        ("fp16", "cuda", True, True, torch.float16),
        ("true", "cpu", False, False, torch.bfloat16),
        ("False", "cuda", True, True, None),
    ],
)
def test_number_format(hardware, amp, device, cpu, gpu, expected):
    hardware(cpu, gpu)
    assert precision(amp, device) is expected
    assert precision(amp, torch.device(device)) is expected


def test_a_cpu_whose_abilities_are_unknown_stays_with_full_precision(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert precision("auto", "cpu") is None


def test_what_can_not_be():
    with pytest.raises(BadInput, match="amp: 'fp16' needs a GPU"):
        precision("fp16", "cpu")
    for wrong in ("fp8", "mixed", None, 2):
        with pytest.raises(BadInput, match="expected true, false, 'auto', 'bf16' or 'fp16'"):
            precision(wrong, "cpu")
