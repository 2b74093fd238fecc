"""SIGKILL at any moment of any stage: the last good weights load, and the resumed run ends with the same ones."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, PLAN, ROOT, config, recipe_files, write_organ_teachers, write_partial_labels
from filelock import FileLock
from killed_runs import Ended, Trainings
from monai.bundle import ConfigParser

from common.handlers import weights_digest
from common.networks import SegmentationNetwork, save_weights

pytest.importorskip("resource", reason="processes fork and have limits on Unix alone")

RECIPES = sorted(path.stem for path in (ROOT / "bundles/student/configs/recipes").glob("*.json"))
SEED = 20
SHORT = {"train#trainer#max_epochs": 3, "iterations_per_epoch": 2, "val_interval": 2, "device": "cpu", "amp": False}
#: what a run needs besides, so that everything that is to be continued plays a part
SPECIAL: dict[str, dict[str, Any]] = {
    "teacher": {"select": "best"},
    "student": {"num_workers": 1},
    "dual_decoder": {"select": "best", "val_interval": 1},
    "mean_teacher": {"val_interval": 3},  # so that of the second epoch nothing is written before its checkpoint
    "ms_kd": {"patience": -1},  # so that the learning rate falls at every epoch
}
PARTIAL = ("ms_kd", "co_training", "dodnet")


class Runs:
    """All bundles and recipes, on tiny data, from random weights of the stages before."""

    def __init__(self, folder: Path, phantoms: Path) -> None:
        self.folder = folder
        self.trainings = Trainings(folder)
        self.whole: dict[str, tuple[Path, float]] = {}
        self.data = dict.fromkeys((*BUNDLES, *RECIPES), phantoms)
        partial = write_partial_labels(phantoms, folder / "partial")
        self.data.update(dict.fromkeys(PARTIAL, partial))
        self.plan = folder / "plan.json"
        self.plan.write_text(json.dumps(PLAN))
        torch.manual_seed(0)
        widths = [PLAN[key] for key in ("features", "kernel_sizes", "strides")]
        save_weights(SegmentationNetwork(3, 1, 3, *widths), folder / "before.pt")
        own = ConfigParser.load_config_file(config("student", "train.json"))
        settings = {key: own[key] for key in ("channels", "spacing", "intensity", "spatial_dims")}
        self.teachers = write_organ_teachers(
            folder / "teachers", own["labels"], patch_size=PLAN["patch_size"], **settings
        )

    def train(self, name: str, folder: Path, resume: bool = False, changed: Any = (), **special: Any) -> Ended:
        """Train a bundle or a recipe of the student in a folder."""
        bundle = name if name in BUNDLES else "student"
        files = [config(bundle, "train.json"), *(recipe_files(name) if name not in BUNDLES else []), str(self.plan)]
        settings = {**SHORT, **SPECIAL.get(name, {}), "dataset_dir": str(self.data[name]), **dict(changed)}
        settings |= {"output_dir": str(folder / "train"), "ckpt_dir": str(folder / "models"), "resume": resume}
        if bundle != "teacher":
            settings["student_path" if bundle == "dual_decoder" else "teacher_path"] = str(self.folder / "before.pt")
        if name in ("ms_kd", "co_training"):
            settings |= {"teacher_path": None, "teacher_paths": self.teachers}
        return self.trainings.run(files, settings, **{"draw": False, **special})

    def uninterrupted(self, name: str) -> tuple[Path, float]:
        """The folder of the run that nothing has stopped, and how many seconds it took."""
        if name not in self.whole:
            folder = self.begin(f"{name}_whole")
            ended = self.train(name, folder)
            assert ended.code == 0, ended.log[-3000:]
            self.whole[name] = folder, ended.seconds
        return self.whole[name]

    def begin(self, name: str, database: bool = True) -> Path:
        """A new folder with the weights of an earlier training in it, and an MLflow database, which takes a second."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "train").mkdir(parents=True)
        if database:
            shutil.copy(self.trainings.database, folder / "train")
        save_weights({"weight": torch.full((2,), 7.0)}, folder / "models" / "model.pt")
        return folder

    def check_what_is_left(self, name: str, folder: Path) -> None:
        """Whatever is called weights is whole, and the weights to use are the former ones or those of a whole run."""
        for path in folder.rglob("*.pt"):
            assert path.name in ("checkpoint.pt", "best.pt", "model.pt")
            torch.load(path, weights_only=True)
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        former = weights_digest(self.folder / "former.pt")
        whole = weights_digest(self.uninterrupted(name)[0] / "models" / "model.pt")
        assert weights_digest(folder / "models" / "model.pt") in (former, whole)

    def check_end(self, name: str, folder: Path) -> None:
        """The same weights, bit for bit, and the same curves as those of a run that nothing has stopped."""
        whole, _ = self.uninterrupted(name)
        paths = [place / "models" / "model.pt" for place in (whole, folder)]
        states = [torch.load(path, weights_only=True)["model"] for path in paths]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        checkpoints = [torch.load(place / "train" / "checkpoint.pt", weights_only=True) for place in (whole, folder)]
        assert _same(*checkpoints), "optimisers, schedules, averages"
        histories = [json.loads((place / "train" / "history.json").read_text()) for place in (whole, folder)]
        assert histories[0] == histories[1]
        assert (folder / "train" / "curves.png").is_file()
        records = [json.loads((place / "models" / "model.json").read_text()) for place in (whole, folder)]
        assert records[1]["weights"] == weights_digest(paths[0])
        assert records[0].get("entropy") == records[1].get("entropy"), "by which inference knows an uncertain case"
        record = json.loads((folder / "train" / "run.json").read_text())
        assert not [resumed for resumed in record["resumed"] if resumed["changed"]]
        left = [path for path in folder.rglob(".*.tmp") if ".pt." in path.name]
        assert left == [], "what a killed run was writing takes no room for good"

    def close(self) -> None:
        self.trainings.close()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@pytest.fixture(scope="module")
def runs(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("crash"), phantoms)
    save_weights({"weight": torch.full((2,), 7.0)}, runs.folder / "former.pt")
    yield runs
    runs.close()


@pytest.mark.parametrize("name", [*BUNDLES, *RECIPES])
def test_killed_at_random_and_resumed(name: str, runs: Runs) -> None:
    """Twice each, at moments drawn evenly from the time that the whole run takes, before its first step too."""
    generator = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    _, seconds = runs.uninterrupted(name)
    share, draw = generator.uniform(0.1, 0.95), name in BUNDLES
    # Of the bundles themselves the database is made within that time, too.
    while not runs.train(name, folder := runs.begin(name, not draw), draw=draw, after=share * seconds).killed:
        share *= 0.7  # this one was faster than the whole one
    runs.check_what_is_left(name, folder)
    # With loading processes it is the training alone that is killed, as by a system that runs out of memory.
    again = generator.uniform(0.2, 0.95) * seconds
    runs.train(name, folder, resume=True, draw=draw, after=again, alone=name == "student")
    runs.check_what_is_left(name, folder)
    ended = runs.train(name, folder, resume=True, draw=draw)
    assert ended.code == 0, ended.log[-3000:]
    runs.check_end(name, folder)


MOMENTS = [
    ("teacher", ("checkpoint.pt", "half", 1)),
    ("student", ("checkpoint.pt", "half", 2)),
    ("ase_net", ("checkpoint.pt", "half", 3)),
    ("dual_decoder", ("checkpoint.pt", "before", 2)),
    ("ms_kd", ("checkpoint.pt", "after", 2)),
    ("dual_decoder", ("best.pt", "half", 1)),
    ("teacher", ("best.pt", "after", 1)),
    ("aggregating_decoupling", ("checkpoint.pt", "after", 3)),
    ("teacher", ("history.json", "half", 2)),
    ("teacher", ("model.pt", "half", 1)),
    ("student", ("model.pt", "after", 1)),
    ("dual_decoder", ("model.json", "half", 1)),
    ("teacher", ("run.json", "half", 1)),
]


@pytest.mark.parametrize(("name", "moment"), MOMENTS, ids=str)
def test_killed_while_a_file_is_written(name: str, moment: tuple[str, str, int], runs: Runs) -> None:
    folder = runs.begin(f"{name}_{'_'.join(map(str, moment))}")
    ended = runs.train(name, folder, at=moment)
    assert ended.killed, ended.log[-3000:]
    runs.check_what_is_left(name, folder)
    ended = runs.train(name, folder, resume=True)
    assert ended.code == 0, ended.log[-3000:]
    runs.check_end(name, folder)


@pytest.mark.parametrize("statement", [1, 40, 200])
def test_killed_while_the_database_is_made(statement: int, runs: Runs) -> None:
    folder = runs.begin("database", database=False)
    ended = runs.train("teacher", folder, statement=statement)
    assert ended.killed, ended.log[-3000:]
    runs.check_what_is_left("teacher", folder)
    ended = runs.train("teacher", folder, resume=True)
    assert ended.code == 0, ended.log[-3000:]
    runs.check_end("teacher", folder)


@pytest.mark.parametrize(("epoch", "words"), [(2, "checkpoint.pt: can't be written"), (3, "MLflow can't record")])
def test_a_disk_that_fills_up(epoch: int, words: str, runs: Runs) -> None:
    """What was good stays so, the message says what to do, and with room again the run goes on."""
    folder = runs.begin(f"full_{epoch}")
    ended = runs.train("mean_teacher", folder, full=100_000, full_from=epoch)
    assert ended.code == 1
    *_, message = ended.log.split("\nerror: ")
    assert words in message
    assert "Free some space" in message
    runs.check_what_is_left("mean_teacher", folder)
    saved = torch.load(folder / "train" / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] >= epoch - 1
    ended = runs.train("mean_teacher", folder, resume=True)
    assert ended.code == 0, ended.log[-3000:]
    runs.check_end("mean_teacher", folder)


@pytest.mark.parametrize("occupied", ["train", "models"])
def test_two_trainings_in_one_folder(occupied: str, runs: Runs) -> None:
    folder = runs.begin(f"occupied_{occupied}")
    (folder / occupied).mkdir(exist_ok=True)
    with FileLock(folder / occupied / ".in_use.lock"):
        ended = runs.train("teacher", folder, patience=0)
    assert ended.code == 1
    assert "another training or evaluation is writing there" in ended.log
    assert not (folder / "train" / "checkpoint.pt").exists()
    runs.check_what_is_left("teacher", folder)


@pytest.mark.parametrize(
    ("name", "workers"), [("teacher", 2), ("student", 0), ("student", 1), ("student", 2), ("dual_decoder", 1)]
)
def test_the_same_run_twice(name: str, workers: int, runs: Runs) -> None:
    """With one loading process, with two and without any: the weights are the same, bit for bit."""
    folder = runs.begin(f"{name}_{workers}_workers")
    ended = runs.train(name, folder, changed={"num_workers": workers})
    assert ended.code == 0, ended.log[-3000:]
    runs.check_end(name, folder)
