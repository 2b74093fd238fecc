"""Studies: several trainings and their evaluations, described in one JSON file, run in order and set side by side.

A study's file lists runs. Each trains one of the bundles through ``python -m monai.bundle run``, as a user would, and
evaluates it on the datalist's validation section. What is done is not done again unless its description, or the run it
starts from, has changed, and a run that fails does not end the others: so a study can be stopped, corrected and
continued. See ``studies/`` for examples::

    {
        "title": "Hippocampus, 4 labelled volumes",
        "plan": {"datalist": "datalist_4.json", "width": 16, "max_width": 128},
        "set": {"iterations_per_epoch": 50, "val_interval": 1000},
        "runs": {
            "teacher": {"bundle": "teacher", "datalist": "datalist_4.json", "epochs": 6, "title": "4 labels"},
            "student": {"bundle": "student", "datalist": "datalist_4.json", "epochs": 6, "teacher": "teacher"}
        }
    }
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from tqdm import tqdm

from .errors import BadInput
from .files import write_atomically
from .planning import make_plan, parse_memory
from .provenance import file_digest, git_state
from .tables import machine, markdown

__all__ = ["Run", "Study", "add_arguments", "bundle_command", "config_digest", "main", "read_seeds"]

ROOT = Path(__file__).resolve().parents[1]
_PARENTS = {"teacher": "teacher_path", "student": "student_path"}
_RUNNING: set[subprocess.Popen] = set()  # what would otherwise live on when this process is told to end


@dataclass(frozen=True)
class Run:
    """One training with its evaluation.

    Args:
        name: key in the study's file.
        bundle: ``teacher``, ``student`` or ``dual_decoder``.
        datalist: file name in the data folder.
        epochs: epochs to train; 0 trains nothing and evaluates the parent's weights.
        title: name in the tables.
        overlays: config files laid over the bundle's ``train.json``, relative to its ``configs``.
        set: overrides of this run.
        teacher, student: the run that the weights come from.
        teachers: the runs of several teachers, by what each one knows: ``{"liver": "run"}``.
    """

    name: str
    bundle: str
    datalist: str = "datalist.json"
    epochs: int = 0
    title: str = ""
    overlays: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    student: str | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)

    @property
    def parents(self) -> list[str]:
        """The runs that must be done before."""
        return [name for name in (self.teacher, self.student, *self.teachers.values()) if name is not None]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def bundle_command(files: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """``python -m monai.bundle run`` with config files, later ones over earlier ones, and overrides."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(list(files))]
    for key, value in settings.items():
        command += [f"--{key}", _value(value)]
    return command


class Study:
    """A study on one data folder.

    Args:
        description: the content of the study's file. ``set`` overrides every run's config, ``evaluate`` that of the
            evaluations alone.
        data: folder with the datalists.
        output: where everything goes; ``<run>/seed<k>`` a run.
        seeds: each run is repeated with each of them.
        device: for all runs; None leaves it to the bundles.

    Raises:
        BadInput: a run with unknown keys, an unknown parent or bundle.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        data: Path,
        output: Path,
        seeds: Sequence[int] = (0,),
        device: str | None = None,
    ) -> None:
        self.description = description
        self.data = data
        self.output = output
        self.seeds = list(seeds)
        self.device = device
        self.runs: dict[str, Run] = {}
        for name, content in description["runs"].items():
            try:
                run = Run(name=name, **{**content, "overlays": tuple(content.get("overlays", ()))})
            except TypeError as error:
                raise BadInput(f"study, run {name!r}: {error}.") from error
            for parent in run.parents:
                if parent not in self.runs:
                    raise BadInput(f"study, run {name!r}: its parent {parent!r} must be a run listed before it.")
            if not (ROOT / "bundles" / run.bundle / "configs" / "train.json").is_file():
                raise BadInput(f"study, run {name!r}: there is no bundle {run.bundle!r}.")
            if run.epochs == 0 and not (run.student or run.teacher):
                raise BadInput(
                    f"study, run {name!r}: it has 0 epochs, and no teacher or student whose weights it could evaluate. "
                    "Give it `epochs`."
                )
            self.runs[name] = run
        for gap in description.get("gaps", ()):
            if sorted(gap) != ["all", "few", "method"] or not set(gap.values()) <= set(self.runs):
                raise BadInput(f"study, gaps: found {gap}; expected the runs 'few', 'method' and 'all' of the study.")

    def folder(self, run: Run, seed: int) -> Path:
        """Where a run's files go."""
        return self.output / run.name / f"seed{seed}"

    def model(self, name: str, seed: int) -> Path:
        """The weights that a run deploys: its own, or its parent's where it trains nothing."""
        run = self.runs[name]
        parent = run.student or run.teacher
        if run.epochs == 0 and parent is not None:
            return self.model(parent, seed)
        return self.folder(run, seed) / "models" / "model.pt"

    def write_plan(self) -> list[str]:
        """Plan for the data when the study names a datalist for it, and lay its ``set`` over the plan.

        Returns:
            The overlays that every run gets.
        """
        wanted = self.description.get("plan")
        if wanted is None:
            return []
        path = self.output / "plan.json"
        # Not in the plan itself, which is packed with the weights: the path is nobody else's business.
        made_for = self.output / "plan_made_for.json"
        asked = {**wanted, "data": str(self.data)}
        if "datalist" in wanted:
            asked["digest"] = file_digest(self.data / wanted["datalist"])[:16]
        before = json.loads(made_for.read_text()) if path.exists() and made_for.exists() else {}
        # A plan of before there was a digest is kept.
        if before != {key: value for key, value in asked.items() if key != "digest" or key in before}:
            options = {key: value for key, value in wanted.items() if key not in ("datalist", "set")}
            if "memory" in options:
                options["memory"] = parse_memory(options["memory"])
            plan = make_plan(self.data / wanted["datalist"], **options) if "datalist" in wanted else {}
            made_for.unlink(missing_ok=True)
            write_atomically(path, json.dumps({**plan, **wanted.get("set", {})}, indent=2))
            write_atomically(made_for, json.dumps(asked))
        return [str(path)]

    def commands(self, run: Run, seed: int) -> list[list[str]]:
        """The command lines of a run: training, then evaluation."""
        folder = self.folder(run, seed)
        configs = ROOT / "bundles" / run.bundle / "configs"
        overlays = [*self.write_plan(), *(str((configs / name).resolve()) for name in run.overlays)]
        own = {"dataset_dir": str(self.data), "datalist": str(self.data / run.datalist), "seed": seed}
        if self.device is not None:
            own["device"] = self.device
        settings = {**self.description.get("set", {}), **run.set, **own}
        for parent, key in _PARENTS.items():
            if getattr(run, parent) is not None:
                settings[key] = str(self.model(getattr(run, parent), seed))
        if run.teachers:
            settings["teacher_paths"] = {name: str(self.model(of, seed)) for name, of in run.teachers.items()}
        trained = folder / "models"
        commands = []
        if run.epochs > 0:
            settings["train#trainer#max_epochs"] = run.epochs
            files = [str(configs / "train.json"), *overlays]
            commands.append(
                bundle_command(files, {**settings, "output_dir": str(folder / "train"), "ckpt_dir": str(trained)})
            )
        else:
            trained = self.model(run.name, seed).parent
        files = [str(configs / "train.json"), str(configs / "evaluate.json"), *overlays]
        settings.update(self.description.get("evaluate", {}))
        test = {**settings, "output_dir": str(folder / "test"), "ckpt_dir": str(trained)}
        commands.append(bundle_command(files, test))
        return commands

    def execute(self, run: Run, seed: int, cores: Sequence[int] | None = None) -> None:
        """Train and evaluate, unless that was done. A training that was interrupted goes on from its checkpoint.

        Args:
            run: which.
            seed: of the run.
            cores: the processor cores that it may use, numbers as the operating system has them; None for all.

        Raises:
            BadInput: a command failed; its output is in ``log.txt`` of the run's folder.
        """
        folder = self.folder(run, seed)
        commands = self.commands(run, seed)
        identity = self._identity(run, seed, commands)
        if self.record(run, seed).get("identity") == identity:
            return
        configs = config_digest(ROOT / "bundles" / run.bundle / "configs")  # before they may change
        for parent in run.parents:
            if not self.record(self.runs[parent], seed):
                raise BadInput(
                    f"run {run.name}, seed {seed}: not begun, since {parent}, which it starts from, is not done."
                )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").unlink(missing_ok=True)  # should this fail, old figures must not stand for it
        earlier = self._begun_before(folder, identity) if run.epochs > 0 else None
        begun = {"identity": identity, "started": time.time(), "seconds": earlier or 0.0}
        write_atomically(folder / "begun.json", json.dumps(begun))
        if earlier is not None:
            commands[0] += ["--resume", "true"]
        seconds = []
        with open(folder / "log.txt", "w" if earlier is None else "a") as log:
            for command in commands:
                log.write(shlex.join(command) + "\n")
                log.flush()
                start = time.perf_counter()
                failed = _call(command, log, cores)
                seconds.append(time.perf_counter() - start)
                if failed:
                    tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
                    raise BadInput(f"run {run.name}, seed {seed} failed; see {folder / 'log.txt'}: " + " | ".join(tail))
        summary = json.loads((folder / "test" / "summary.json").read_text())
        content = {
            "identity": identity,
            "commit": _commit(),
            "configs": configs,
            "machine": machine(),
            "train_seconds": sum(seconds[:-1], earlier or 0.0),
            "test_seconds": seconds[-1],
        }
        write_atomically(folder / "record.json", json.dumps({**content, "summary": summary}, indent=2))

    @staticmethod
    def _begun_before(folder: Path, identity: str) -> float | None:
        """Seconds that a run's training took until its checkpoint; None where there is none of this description."""
        checkpoint, path = folder / "train" / "checkpoint.pt", folder / "begun.json"
        try:
            begun = json.loads(path.read_text())
            written = checkpoint.stat().st_mtime
            if begun["identity"] != identity:
                return None
            started, seconds = float(begun["started"]), float(begun["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # the last three: not what was written here
            return None
        if written >= started:
            return seconds + written - started
        # Of a training that was resumed and interrupted before it wrote another one; or else of a former description.
        return seconds or None

    def _identity(self, run: Run, seed: int, commands: Sequence[Sequence[str]]) -> str:
        """Fingerprint of a run's options, overlays and datalist: with another one it must be run again.

        The code, the bundles' own configs and the images are not in it, so that a study can be continued after a
        correction elsewhere, nor are the device and remarks in overlays. What a run was made with is in its record.
        """

        def anywhere(text: str) -> str:  # results stay true when their folder moves
            for place in (self.output, self.data, ROOT):
                text = text.replace(str(place), "")
            return text

        options = [_without(command[1:], "--device") for command in commands]
        digest = hashlib.sha256(anywhere(json.dumps(options)).encode())
        files: list[str | Path] = [self.data / run.datalist, *self.write_plan()]
        files += [ROOT / "bundles" / run.bundle / "configs" / name for name in run.overlays]
        for path in map(Path, files):
            digest.update(anywhere(json.dumps(_decided(path)) if path.is_file() else "").encode())
        for parent in run.parents:
            digest.update(str(self.record(self.runs[parent], seed).get("identity")).encode())
        return digest.hexdigest()

    def outdated(self, run: Run, seed: int) -> bool:
        """Whether a run was done as its description no longer says, so that it would be run again."""
        done = self.record(run, seed).get("identity")
        return done is not None and done != self._identity(run, seed, self.commands(run, seed))

    def record(self, run: Run, seed: int) -> dict[str, Any]:
        """What is known of a run with one seed; empty while it is not done."""
        path = self.folder(run, seed) / "record.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def run_all(self, only: Sequence[str] | None = None, jobs: int = 1) -> list[str]:
        """Execute every run, or those named in ``only``, with every seed; returns what failed.

        Args:
            only: names of runs.
            jobs: how many at a time, each on its own share of the cores; a run waits for those it starts from.

        Raises:
            BadInput: if ``jobs`` is not at least 1.
        """
        if jobs < 1:
            raise BadInput(f"--jobs {jobs}: expected a number of runs at a time, at least 1.")
        failures: list[str] = []
        self.write_plan()  # once, before several runs at a time ask for it
        waiting = [(run, seed) for seed in self.seeds for run in self.runs.values() if only is None or run.name in only]
        shares = _shares(jobs)
        running: dict[Future, tuple[Run, int, float, list[int] | None]] = {}
        title = self.description.get("title", "study")
        with (
            ThreadPoolExecutor(jobs) as pool,
            _ended_with_us(),
            tqdm(total=len(waiting), desc=title, unit="run", disable=None) as bar,
        ):
            while waiting or running:
                unfinished = {(run.name, seed) for run, seed in waiting}
                unfinished |= {(run.name, seed) for run, seed, *_ in running.values()}
                ready = [
                    (run, seed) for run, seed in waiting if not unfinished & {(name, seed) for name in run.parents}
                ]
                for run, seed in ready[: len(shares)]:
                    waiting.remove((run, seed))
                    share = shares.pop()
                    running[pool.submit(self.execute, run, seed, share)] = run, seed, time.perf_counter(), share
                bar.set_postfix_str("; ".join(f"{run.name}, seed {seed}" for run, seed, *_ in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, seed, start, share = running.pop(future)
                    shares.append(share)
                    bar.update()
                    try:
                        future.result()
                        tqdm.write(f"{run.name}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
                    except Exception as error:  # whatever it is, the other runs are worth having
                        known = isinstance(error, (BadInput, OSError))
                        failure = str(error) if known else f"run {run.name}, seed {seed}: {error!r}"
                        failures.append(failure)
                        tqdm.write(f"error: {failure}", file=sys.stderr)
                        if not known:
                            tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr)
        return failures

    def records_by_seed(self, run: Run) -> dict[int, dict[str, Any]]:
        """What is known of a run, for each seed that is done."""
        found = {seed: self.record(run, seed) for seed in self.seeds}
        return {seed: record for seed, record in found.items() if record}

    def records(self, run: Run) -> list[dict[str, Any]]:
        """What is known of a run, a dict a seed that is done."""
        return list(self.records_by_seed(run).values())


def config_digest(folder: Path) -> str:
    """Fingerprint of what a bundle's ``train.json`` and ``evaluate.json`` decide; comments at their top are left out.

    Args:
        folder: the bundle's ``configs``.
    """
    decided = [_decided(folder / name) for name in ("train.json", "evaluate.json")]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:16]


def _decided(path: Path) -> dict[str, Any]:
    """The content of a JSON file but remarks at its top."""
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}


def _without(command: Sequence[str], option: str) -> list[str]:
    """A command line without one of its options."""
    if option not in command:
        return list(command)
    place = command.index(option)
    return [*command[:place], *command[place + 2 :]]


def _commit() -> str | None:
    """The checkout's commit, with ``+`` behind it where files differ from it; None outside of a repository."""
    git = git_state(ROOT)
    return git and git[0] + "+" * git[1]


def _shares(jobs: int) -> list[list[int] | None]:
    """The cores of each of ``jobs`` runs side by side; None where there is nothing to divide."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = len(available) // jobs
    if jobs == 1 or count == 0:
        return [None] * jobs
    return [available[job * count : (job + 1) * count] for job in range(jobs)]


def _call(command: Sequence[str], log: IO[str], cores: Sequence[int] | None) -> int:
    """Run a command with its output in ``log``; returns its exit code.

    Processes that share cores wait for each other's threads at every operation, so each is kept to its own.
    """
    environment = dict(os.environ)
    if cores is not None:
        environment["OMP_NUM_THREADS"] = str(len(cores))
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    _RUNNING.add(process)
    try:
        if cores is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, cores)
        return process.wait()
    finally:
        _RUNNING.discard(process)


@contextlib.contextmanager
def _ended_with_us() -> Iterator[None]:
    """Within it, trainings end when this process is told to: left alone, they would hold their folders for hours.

    Each goes on from its last checkpoint when the study is run again.
    """

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    mine = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, stop) if mine else None
    try:
        yield
    except BaseException:
        for process in list(_RUNNING):
            process.terminate()
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, earlier)


def read_study(path: Path) -> dict[str, Any]:
    """The content of a study's file.

    Raises:
        BadInput: it is missing, not JSON, or has no runs.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"study {path}: can't be read ({error}).") from error
    if not isinstance(content, dict) or not content.get("runs"):
        raise BadInput(f"study {path}: it lists no `runs`.")
    return content


def read_seeds(text: str) -> list[int]:
    """The numbers of ``--seeds``, each once.

    Raises:
        BadInput: they are no whole numbers with commas between them.
    """
    try:
        return list(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError as error:
        raise BadInput(f"--seeds {text!r}: expected whole numbers, such as 0,1,2.") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common study``."""
    parser.add_argument("study", type=Path, help="a file such as studies/hippocampus.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the datalists")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--seeds", default="0", help="comma-separated, for instance 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--device", help="for instance cpu or cuda:0; by default a GPU when there is one")
    parser.add_argument("--only", help="comma-separated names of runs; by default all")


def main(options: argparse.Namespace) -> int:
    """Run a study, write ``results.md`` and print it."""
    description = read_study(options.study)
    if not options.data.is_dir():
        raise BadInput(f"--data {options.data}: no such folder; it must hold the datalists that the study names.")
    seeds = read_seeds(options.seeds)
    study = Study(description, options.data.resolve(), options.output.resolve(), seeds, options.device)
    only = options.only.split(",") if options.only else None
    unknown = set(only or ()) - set(study.runs)
    if unknown:
        raise BadInput(f"--only: the study has no run {', '.join(sorted(unknown))}; it has {', '.join(study.runs)}.")
    failures = study.run_all(only, options.jobs)
    text = markdown(study)
    write_atomically(study.output / "results.md", text + "\n")
    print(text)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0
