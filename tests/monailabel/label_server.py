"""A MONAI Label server of its own environment on a free loopback port, and a client that speaks to it."""

from __future__ import annotations

import contextlib
import email
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-label"
APP = ROOT / "monailabel_app"
STAGES = ("teacher", "student", "dual_decoder")

AWKWARD = "Fall 3.5 Ünal"  # spaces, a dot and a letter that is not ASCII
UNFAMILIAR = "noise"
CORRUPT = "corrupt"
QUICK = {"max_epochs": 1, "val_split": 0.0, "device": "cpu", "multi_gpu": False}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Volumes:
    """Images by name, labels of some of them, and the plan that fits them."""

    images: dict[str, Path]
    labels: dict[str, Path]
    plan: Path

    @property
    def label_names(self) -> list[str]:
        names = {"1": "lumen", "2": "wall"} | json.loads(self.plan.read_text()).get("labels", {})
        return [names["1"], names["2"]]

    def studies(self, folder: Path) -> Path:
        """A folder of copies of the images."""
        folder.mkdir()
        for name, path in self.images.items():
            shutil.copy(path, folder / f"{name}.nii.gz")
        return folder


class Server:
    """A context manager: the server runs inside it, and nothing of it is left after.

    Args:
        app: folder of the app.
        studies: folder of the images.
        folder: for the log.
        conf: of the app.
        scoring: whether MONAI Label scores by itself.
    """

    def __init__(
        self, app: Path, studies: Path, folder: Path, conf: Mapping[str, Any] | None = None, scoring: bool = False
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server_{self.port}.log"
        self.command = [str(ENVIRONMENT / "bin/python"), "-m", "monailabel.main", "start_server"]
        self.command += ["--app", str(app), "--studies", str(studies), "--host", "127.0.0.1", "--port", str(self.port)]
        for key, value in (conf or {}).items():
            self.command += ["--conf", key, str(value)]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MONAI_LABEL_SESSIONS": "false",
            "MONAI_LABEL_AUTO_UPDATE_SCORING": str(scoring).lower(),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.folder = folder

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            # A session of its own, so that its trainings end with it.
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.address}/info/", timeout=60).ok:
                    return
            time.sleep(0.2)
        raise AssertionError("the server does not answer: " + self.log.read_text()[-4000:])

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def kill(self) -> None:
        """End the server and what it started, without giving them time."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def is_gone(self) -> bool:
        """Whether neither the server nor anything that it started runs."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return requests.request(method, self.address + path, timeout=300, **kwargs)

    def ask(self, method: str, path: str, **kwargs: Any) -> Any:
        """The answer to a request, which must succeed."""
        response = self.request(method, path, **kwargs)
        assert response.ok, f"{response.status_code} {response.text}\n{self.log.read_text()[-4000:]}"
        return response.json()

    def info(self) -> dict[str, Any]:
        return self.ask("GET", "/info/")

    def _options(self, kind: str, name: str) -> dict[str, Any]:
        """What 3D Slicer sends with a request: all that the server offers to change, of several values the first."""
        offered = self.info()[kind].get(name, {}).get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in offered.items()}

    def infer(self, model: str, image: str, **params: Any) -> requests.Response:
        form = {"params": json.dumps({**self._options("models", model), "device": "cpu", **params})}
        return self.request("POST", f"/infer/{model}", params={"image": image}, data=form)

    def predict(self, model: str, image: str, target: Path, **params: Any) -> dict[str, Any]:
        """The numbers of a prediction; its label is written to ``target``."""
        response = self.infer(model, image, **params)
        assert response.ok, f"{response.status_code} {response.text}\n{self.log.read_text()[-4000:]}"
        header = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(header + response.content).get_payload()
        found = {part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True) for part in parts}
        target.write_bytes(found["image"])
        return json.loads(found["params"])

    def put_label(self, image: str, path: Path, tag: str = "final", segments: Sequence[str] = ()) -> requests.Response:
        """Submit a label; ``segments`` are the names that 3D Slicer sends along, in the order of their ids."""
        named = [{"name": name, "idx": index} for index, name in enumerate(segments, start=1)]
        with path.open("rb") as file:
            return self.request(
                "PUT",
                "/datastore/label",
                params={"image": image, "tag": tag},
                data={"params": json.dumps({"label_info": named})},
                files={"label": (path.name, file)},
            )

    def start_training(self, model: str, **params: Any) -> requests.Response:
        return self.request("POST", f"/train/{model}", json={**self._options("trainers", model), **QUICK, **params})

    def train(self, model: str, **params: Any) -> dict[str, Any]:
        """Train to the end; returns MONAI Label's account of it."""
        response = self.start_training(model, **params)
        assert response.ok, response.text
        return self.wait("train")

    def wait(self, kind: str = "train", seconds: float = 200) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            task = self.ask("GET", f"/{kind}/")
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(0.2)
        raise AssertionError(f"{kind} takes more than {seconds} s: {self.log.read_text()[-4000:]}")

    def wait_for(self, text: str, seconds: float = 200) -> None:
        """Wait until the server or a training of it has logged ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def score(self) -> dict[str, dict[str, Any]]:
        """Score all images without a label; returns what is known of each image."""
        self.ask("POST", "/scoring/uncertainty", json={"device": "cpu"})
        task = self.wait("scoring")
        assert task["status"] == "DONE", task
        objects = self.ask("GET", "/datastore/", params={"output": "all"})["objects"]
        return {name: item["image"]["info"].get("uncertainty", {}) for name, item in objects.items()}
