"""Three trainings of the student in MONAI Label's environment: with unlabelled images, with them again, without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

APP = Path(__file__).resolve().parents[2] / "monailabel_app"
sys.path.insert(0, str(APP))

from main import FewLabelsApp  # noqa: E402

from common.networks import read_weights, state_digest  # noqa: E402

studies, conf = Path(sys.argv[1]), json.loads(sys.argv[2])
digests = []
for run in ("with", "again", "without"):
    app = FewLabelsApp(str(APP), str(studies), conf)
    if run == "without":
        for name in app.datastore().get_unlabeled_images():
            Path(app.datastore().get_image_uri(name)).rename(studies.parent / f"{name}.nii.gz")
        app.datastore().refresh()
    app.train({"model": "student", "max_epochs": 1, "val_split": 0.0, "device": "cpu", "multi_gpu": False})
    digests.append(state_digest(read_weights(Path(conf["bundles"]) / "student" / "models" / "model.pt")))
print(json.dumps(digests))
