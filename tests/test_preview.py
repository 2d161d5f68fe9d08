"""What the augmentation's preview writes."""

from pathlib import Path

import pytest
import soundfile

from project import make_after_corpus
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.preview import preview_augmentation
from toy import tone_corpus, tone_texts

RECIPE = {"features": {"n_mels": 8}, "data": {"processes": 1}, "augment": {"speeds": [0.5], "gain": [20.0, 20.0]}}


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path / "data")
    for split in ("train", "dev", "test"):
        tone_corpus(folder.corpus("default"), tone_texts(5)).write(folder.corpus("default") / f"{split}.jsonl")
    config = Config.resolve(RECIPE, {})
    make_after_corpus(config, folder)
    return folder


def test_each_epoch_is_a_sound_and_all_are_in_one_picture(folder: DataFolder, tmp_path: Path) -> None:
    written = preview_augmentation(Config.resolve(RECIPE, {}), folder, tmp_path / "seen", count=2, epochs=2)
    names = ["tone-000", "tone-001"]
    assert [path.name for path in written] == [
        f"{name}{suffix}" for name in names for suffix in (".wav", "-epoch-0.wav", "-epoch-1.wav", ".png")
    ]
    plain, first, _, picture = written[:4]
    original = soundfile.read(folder.corpus("default") / "tone-000.wav", dtype="int16")[0]
    assert (soundfile.read(plain, dtype="int16")[0] == original).all()
    slow = soundfile.read(first)[0]
    assert len(slow) == 2 * len(original)
    assert abs(slow).max() == pytest.approx(1.0, abs=1e-3), "what is beyond full scale is cut off in the copy"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_utterances_may_be_named(folder: DataFolder, tmp_path: Path) -> None:
    config = Config.resolve(RECIPE, {})
    (plain, *_) = preview_augmentation(config, folder, tmp_path, count=1, epochs=1, ids=["tone-003"])
    assert plain.name == "tone-003.wav"
    with pytest.raises(UserError, match=r"train\.jsonl: no utterance 'tone-033'; did you mean"):
        preview_augmentation(config, folder, tmp_path, count=1, epochs=1, ids=["tone-033"])
