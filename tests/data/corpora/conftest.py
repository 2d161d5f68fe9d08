from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer

from sonosco_mlflow.data.corpora import download


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A web server with nothing yet, while downloads go to ``tmp_path/cache`` and wait for nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    with FileServer().running() as running:
        yield running
