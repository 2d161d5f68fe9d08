"""What tests share: one thread (the number of threads is part of the result), and a tiny corpus of tones."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch

from sonosco_mlflow import evaluation
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.tracking.store import connect
from toy import tone_corpus, tone_texts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures take longer than its training does here; what they look like is asked of them alone."""
    monkeypatch.setattr(evaluation, "png", lambda figure: b"\x89PNG")


@pytest.fixture(scope="session")
def tone_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twenty recordings."""
    return tone_corpus(tmp_path_factory.mktemp("tones"), tone_texts(20))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an MLflow store without runs, to be copied: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(None)
        connect(folder)
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def tracking_database(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the store that tests of one process share."""
    database = tmp_path_factory.mktemp("shared") / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    return f"sqlite:///{database}"


@pytest.fixture
def tracking_store(tracking_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow store that is in use."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_database)
    mlflow.set_tracking_uri(None)
    return tracking_database


@pytest.fixture(scope="module")
def module_store(tracking_database: str) -> Iterator[str]:
    """The same store, for fixtures that live as long as a module does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking_database)
        mlflow.set_tracking_uri(None)
        yield tracking_database


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder of a run's checkpoints."""
    return tmp_path / "checkpoints"
