from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor


@pytest.fixture
def case():
    """A volume whose image tells each voxel's label and thickness, so that what moved together can be seen."""
    label = torch.zeros(1, 20, 18, 16, dtype=torch.uint8)
    label[:, 4:16, 4:14, 4:12] = 1
    label[:, 7:13, 7:11, 6:10] = 2
    return {
        "image": MetaTensor(label.float() * 2),
        "label": MetaTensor(label),
        "thickness": MetaTensor(torch.where(label == 2, 3.0, -1.0)),
        "volume": torch.tensor(5.0),
        "path": "a file",
    }
