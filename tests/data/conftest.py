import pytest

from sonosco_mlflow.data import extraction
from toy import PROCESSOR


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of about 100 frames, so that the tones need several."""
    monkeypatch.setattr(extraction, "SHARD_BYTES", 100 * PROCESSOR.n_mels * 4)
