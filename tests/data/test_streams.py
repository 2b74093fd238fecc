from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.transforms import Compose, MapTransform, OneOf, RandGaussianNoised, RandSpatialCropd, SomeOf

from common.data import (
    EpochSampler,
    ProcessShare,
    SeededDataset,
    StreamLoader,
    collate_plain,
    loading_processes,
    make_loader,
)
from common.errors import BadInput


class Loadd(MapTransform):
    """Stands for loading: a deterministic step before the random ones."""

    def __call__(self, data):
        return {**data, "image": MetaTensor(torch.full((1, 8, 8), float(data["image"])))}


def dataset(size: int, cached: bool = True):
    transform = Compose([Loadd("image"), RandSpatialCropd("image", (4, 4)), RandGaussianNoised("image", 1.0, std=0.01)])
    cases = [{"image": index, "case": index} for index in range(size)]
    return CacheDataset(cases, transform, progress=False) if cached else Dataset(cases, transform)


def images(loader, stream: str | None = None) -> torch.Tensor:
    return torch.stack([(batch if stream is None else batch[stream])["image"] for batch in loader])


def streams(num_workers: int = 0, seed: int = 0, cached: bool = True) -> StreamLoader:
    return StreamLoader(
        {
            "labeled": make_loader(dataset(3, cached), 2, seed, num_workers),
            "unlabeled": make_loader(dataset(7, cached), 3, seed, num_workers, iterations=5),
            "none": None,
        },
        length=5,
    )


def epochs(loader: StreamLoader, count: int) -> list[list[torch.Tensor]]:
    return [[batch[name]["image"] for batch in loader for name in ("labeled", "unlabeled")] for _ in range(count)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(1, [[0, 1, 2]]), (2, [[0, 2], [1]]), (3, [[0], [1], [2]]), (4, [[0, 1, 2]] * 4)],
)
def test_each_case_is_validated_by_one_process_and_no_process_is_without(processes, expected, monkeypatch):
    """Four processes with three cases all do all three, so that each case counts as much as any other."""
    shares = []
    for rank in range(processes):
        monkeypatch.setattr("common.data.streams.process_share", lambda rank=rank: (rank, processes))
        share = ProcessShare(["a", "b", "c"])
        shares.append(list(share))
        assert len(share) == len(shares[-1])
    assert shares == expected


def test_no_case_twice_before_all_were_drawn_once():
    drawn = [index for index, _ in EpochSampler(5, 12)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert len(drawn) == len(EpochSampler(5, 12)) == 12
    assert drawn[:5] != drawn[5:10]
    with pytest.raises(BadInput, match="no cases"):
        EpochSampler(0, 3)


def test_processes_share_one_sequence(monkeypatch):
    whole = list(EpochSampler(7, 6))
    shares = []
    for rank in range(2):
        monkeypatch.setattr("common.data.streams.process_share", lambda rank=rank: (rank, 2))
        shares.append(list(EpochSampler(7, 3)))
    assert [index for pair in zip(*shares, strict=True) for index, _ in pair] == [index for index, _ in whole]
    assert len({seed for share in shares for _, seed in share}) == 6


@pytest.mark.parametrize("batch_size", [1, 2])
def test_processes_draw_together_what_one_draws_in_larger_batches(monkeypatch, batch_size):
    """Case by case and voxel by voxel, over more than one round of the cases."""

    def draw(rank: int, processes: int) -> list[torch.Tensor]:
        monkeypatch.setattr("common.data.streams.process_share", lambda: (rank, processes))
        loader = make_loader(dataset(7), batch_size * 2 // processes, seed=3)
        return [batch["cases"]["image"] for batch in StreamLoader({"cases": loader}, length=9)]

    alone, first, second = draw(0, 1), draw(0, 2), draw(1, 2)
    assert not same(first, second)
    assert same(alone, [torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(first, second, strict=True)])


def test_a_batch_is_of_plain_tensors():
    loader = make_loader(dataset(4), 2, iterations=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert batches[0]["image"].shape == (2, 1, 4, 4)
    assert type(batches[0]["image"]) is torch.Tensor
    assert batches[0]["case"].tolist() == batches[0]["image"].mean((1, 2, 3)).round().long().tolist()
    assert len(make_loader(dataset(5), 2)) == 3


def test_collate():
    items = [
        [
            {
                "image": MetaTensor(torch.ones(1, 2)),
                "volume": torch.tensor(1.0),
                "grade": 2,
                "path": "a",
                "annotated": [0],
            }
        ],
        [{"image": MetaTensor(torch.zeros(1, 2)), "volume": torch.tensor(2.0), "grade": 3, "path": "b"}],
    ]
    batch = collate_plain(items)
    assert set(batch) == {"image", "volume", "grade", "annotated"}
    assert batch["image"].tolist() == [[[1, 1]], [[0, 0]]]
    assert batch["volume"].tolist() == [1, 2]
    assert batch["grade"].tolist() == [2, 3]
    assert batch["annotated"] == [[0], None]
    assert "annotated" not in collate_plain(items[1])


def test_all_processes_know_whether_any_label_is_partial(monkeypatch):
    """Or one whose crops are all whole would take another way through a loss in which the processes meet."""
    cases = Dataset([{"image": torch.zeros(1, 2)}, {"image": torch.zeros(1, 2)}, {"image": torch.zeros(1, 2)}])
    cases.data[2]["annotated"] = [1]
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("common.data.streams.process_share", lambda rank=rank: (rank, 2))
        found += [batch["annotated"] for batch in make_loader(cases, 1, iterations=3)]
    assert sorted(found, key=str) == [[None]] * 4 + [[[1]]] * 2


@pytest.mark.parametrize("order", [1, -1])
def test_what_only_some_cases_have(order):
    """Whichever comes first: a number stays unknown for the others, as where a target lacks; names go."""
    cases = [
        {"image": torch.ones(1, 2), "patient": 7, "severity": torch.tensor(3.0), "grade": 2},
        {"image": torch.zeros(1, 2), "patient": "P8", "severity": torch.tensor(float("nan")), "slice": 4},
    ][::order]
    batch = collate_plain(cases)
    assert set(batch) == {"image", "severity", "grade", "slice"}
    for key, values in {"severity": [3, np.nan], "grade": [2, np.nan], "slice": [np.nan, 4]}.items():
        np.testing.assert_equal(batch[key].tolist(), values[::order])
    assert collate_plain([{**case, "patient": 7} for case in cases])["patient"].tolist() == [7, 7]
    cases[0]["thickness"] = torch.ones(1, 2)
    with pytest.raises(BadInput, match="only 1 of 2 cases of a batch have the map 'thickness'"):
        collate_plain(cases)


def test_an_epoch_is_one_pass_over_each_loader(monkeypatch):
    """Loading processes stop at the end of a pass; one of a single case would leave them idle after each batch."""
    passes = []
    drawing = EpochSampler.__iter__
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: passes.append(self.samples) or drawing(self))
    loader = StreamLoader({"cases": make_loader(dataset(1), 2, seed=3)}, length=4)
    assert [len(list(loader)) for _ in range(2)] == [4, 4]
    assert passes == [8, 8]


def test_all_random_transforms_of_an_item_are_seeded():
    """Inside of others, too, and those that choose among some."""
    noises = [RandGaussianNoised("image", 0.5, std=std) for std in (0.1, 1.0, 10.0)]
    nested = Compose([Loadd("image"), OneOf([Compose([noises[0]]), noises[1]]), SomeOf([noises[2]], num_transforms=1)])
    for transform in (nested, noises[1]):
        cases = [{"image": torch.zeros(1, 4, 4)}] if transform is noises[1] else [{"image": 0}]
        seeded = SeededDataset(Dataset(cases, transform))
        drawn = [[seeded[0, seed]["image"].as_tensor() for seed in range(8)] for _ in range(2)]
        assert same(*drawn)
        assert len({tuple(image.flatten().tolist()) for image in drawn[0]}) > 3


@pytest.mark.parametrize(
    ("cores", "processes", "shared", "daemon", "expected"),
    [
        (3, 1, 2**33, False, 0),
        (4, 1, 2**33, False, 1),
        (4, 2, 2**33, False, 0),
        (12, 1, 2**33, False, 3),
        (64, 1, 2**33, False, 4),
        (64, 8, 2**33, False, 2),
        (64, 1, 2**30, False, 0),
        (64, 1, 2**33, True, 0),
    ],
)
def test_loading_processes_by_rule(monkeypatch, tmp_path, cores, processes, shared, daemon, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("common.data.streams._QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=shared))
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: None)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["fork", "spawn"])
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(daemon=daemon))
    assert loading_processes("auto") == expected
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert loading_processes("auto") == expected
    (tmp_path / "cpu.max").write_text("850000 100000\n")  # eight cores and a half
    assert loading_processes("auto") == min(expected, {1: 2, 2: 1, 8: 0}[processes])
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: "spawn")
    assert loading_processes("auto") == 0
    assert loading_processes(3) == 3


def test_the_rule_settles_nothing_for_the_process():
    before = multiprocessing.get_start_method(allow_none=True)
    loading_processes("auto")
    assert multiprocessing.get_start_method(allow_none=True) == before


@pytest.mark.parametrize("wrong", [-1, "two", 1.5, True, None])
def test_impossible_numbers_of_loading_processes(wrong):
    with pytest.raises(BadInput, match=r"`num_workers` is .*expected 'auto', or a number"):
        loading_processes(wrong)


def test_every_stream_cycles_on_its_own():
    loader = streams()
    assert len(loader) == 5
    batches = list(loader)
    assert len(batches) == 5
    assert all(set(batch) == {"labeled", "unlabeled"} for batch in batches)
    # Two batches of two see the three labelled cases; the third batch begins another round, in another order.
    drawn = torch.cat([batch["labeled"]["case"] for batch in batches]).tolist()
    assert sorted(drawn[:3]) == sorted(drawn[4:7]) == [0, 1, 2]
    assert not torch.equal(batches[0]["labeled"]["image"], batches[2]["labeled"]["image"])


def test_epochs_differ_and_seeds_differ_and_both_repeat():
    first = epochs(streams(), 2)
    assert not same(first[0], first[1])
    assert same(first[0], epochs(streams(), 1)[0])
    assert not same(first[0], epochs(streams(seed=1), 1)[0])


def test_streams_of_equal_cases_draw_differently():
    loader = StreamLoader({name: make_loader(dataset(6), 2, seed=3) for name in ("one", "two")}, length=3)
    batches = list(loader)
    assert any(not torch.equal(batch["one"]["image"], batch["two"]["image"]) for batch in batches)


def test_a_resumed_run_sees_the_same_batches():
    uninterrupted = epochs(streams(), 3)
    resumed = streams()
    resumed.set_epoch(2)
    assert same(uninterrupted[2], epochs(resumed, 1)[0])
    # So it is when the run before broke off within an epoch.
    broken = streams()
    next(iter(broken))
    broken.set_epoch(1)
    assert same(uninterrupted[1], epochs(broken, 1)[0])


@pytest.mark.parametrize("cached", [True, False])
def test_workers_change_nothing(cached):
    alone = epochs(streams(0, cached=cached), 2)
    together = streams(2, cached=cached)
    assert all(same(one, other) for one, other in zip(alone, epochs(together, 2), strict=True))
    together.set_epoch(0)
    assert same(alone[0], epochs(together, 1)[0])


def test_neither_generator_of_the_process_is_touched():
    torch.manual_seed(0)
    np.random.seed(0)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    epochs(streams(), 1)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_with_an_engine_that_resumes():
    def run(epoch: int, until: int) -> dict[int, list[float]]:
        loader, seen = streams(), {}
        engine = Engine(lambda engine, batch: seen.setdefault(engine.state.epoch, []).append(batch["labeled"]["image"]))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: loader.set_epoch(engine.state.epoch))
        if epoch:
            engine.load_state_dict({"epoch": epoch, "epoch_length": 5, "max_epochs": until})
        engine.run(loader, max_epochs=until, epoch_length=None if epoch else 5)
        return seen

    whole, resumed = run(0, 3), run(2, 3)
    assert {epoch: len(batches) for epoch, batches in whole.items()} == {1: 5, 2: 5, 3: 5}
    assert list(resumed) == [3]
    assert same(whole[3], resumed[3])
    assert not same(whole[2], whole[3])


def test_arguments_that_make_no_sense():
    loader = make_loader(dataset(2), 1)
    with pytest.raises(BadInput, match="every one of a is null"):
        StreamLoader({"a": None}, 3)
    with pytest.raises(BadInput, match="iterations_per_epoch"):
        StreamLoader({"a": loader}, 0)
    with pytest.raises(BadInput, match="`batch_size` is 0"):
        make_loader(dataset(2), 0)
    with pytest.raises(BadInput, match="yields no batches"):
        StreamLoader({"a": torch.utils.data.DataLoader([])}, 3)
