"""What tests share: one thread (the number of threads is part of the result), and a tiny corpus of tones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sonosco_mlflow.data.manifest import Manifest
from toy import tone_corpus, tone_texts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tone_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twenty recordings."""
    return tone_corpus(tmp_path_factory.mktemp("tones"), tone_texts(20))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder of a run's checkpoints."""
    return tmp_path / "checkpoints"
