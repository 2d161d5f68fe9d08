"""In which order a recipe's utterances come."""

from pathlib import Path

from project import make_after_corpus
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.recipe import build_loaders
from toy import tone_corpus, tone_texts


def test_sorta_grad_is_for_the_first_epoch_of_training_alone(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    for split in ("train", "dev", "test"):
        tone_corpus(folder.corpus("default"), tone_texts(12)).write(folder.corpus("default") / f"{split}.jsonl")
    recipe = {"data": {"frames_per_batch": 120, "processes": 1}, "features": {"n_mels": 8}}
    config = Config.resolve(recipe, {"data.sorta_grad": "true"})
    make_after_corpus(config, folder)
    sorted_, plain = build_loaders(config, folder), build_loaders(Config.resolve(recipe, {}), folder)
    longest = [int(batch.feature_lengths.max()) for batch in sorted_.train.epoch(0)]
    assert len(set(longest)) > 2
    assert longest == sorted(longest) != [int(batch.feature_lengths.max()) for batch in plain.train.epoch(0)]
    assert sorted_.train.digest != plain.train.digest
    assert sorted_.validation.digest == plain.validation.digest
    assert sorted_.test.digest == plain.test.digest
