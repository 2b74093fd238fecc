"""Where MLflow writes: the address of the store, its SQLite file, and that nobody else hears of it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from ..errors import BadInput
from ..files import temporary_name

__all__ = ["SQLITE", "failing_plainly", "open_store", "store_address", "without_password"]

SQLITE = "sqlite:///"


def store_address(tracking_uri: str | None, database: Path) -> str:
    """The store to write to: the environment's ``MLFLOW_TRACKING_URI``, the one asked for, else an SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri or f"{SQLITE}{database.resolve()}"


def without_password(uri: str) -> str:
    """The address without the user and the password that may stand in it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


@contextlib.contextmanager
def failing_plainly(uri: str) -> Iterator[None]:
    """Within it, a failure of MLflow's says which store can't be written rather than how, and no password.

    Raises:
        BadInput: MLflow, the database or the disk failed.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        place = without_password(uri)
        reason = str(error).replace(uri, place).strip().splitlines()[0][:200]
        raise BadInput(
            f"{place.removeprefix(SQLITE)}: MLflow can't record the run there ({reason}). Free some space, or choose "
            "another output_dir or tracking_uri."
        ) from error


def open_store(uri: str) -> None:
    """Make the store's SQLite file if that is what it is, quietly, and keep MLflow from reporting its use.

    To be called before a client of the store is made.

    Raises:
        MlflowException, OSError: the file can't be made.
    """
    _report_nothing()
    _quiet_migrations(uri)
    _make_database(uri)


def _quiet_migrations(uri: str) -> None:
    # MLflow reports every migration of a new SQLite file in some thirty log lines, which bury the training's own.
    if uri.startswith("sqlite:"):
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _make_database(uri: str) -> None:
    """Make the SQLite file of a new store, whole or not at all: one that a killed process has half made can't be used.

    MLflow makes it in hundreds of steps that take seconds.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{temporary}")._tracking_client.store.engine.dispose()
        try:
            os.link(temporary, path)  # which, unlike a new name, leaves alone what another process has made meanwhile
        except FileExistsError:
            return
        except OSError:  # a file system without links
            os.replace(temporary, path)
    finally:
        for made in path.parent.glob(f"{temporary.name}*"):  # with SQLite's journal
            made.unlink(missing_ok=True)


def _report_nothing() -> None:
    """Keep MLflow from reporting to its makers how it is used, unless the user has decided about it."""
    if "MLFLOW_DISABLE_TELEMETRY" in os.environ:
        return
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with contextlib.suppress(ImportError):  # releases before 3.2 report nothing
        from mlflow.telemetry import set_telemetry_client

        set_telemetry_client()  # MONAI imports MLflow, which makes a client, before we are asked
