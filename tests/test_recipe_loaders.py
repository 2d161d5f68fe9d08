"""What loaders a recipe makes: in which order its utterances come, and how they are normalised."""

from pathlib import Path

from project import make_after_corpus
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.decisive import decisive
from sonosco_mlflow.recipe import build_loaders
from toy import tone_corpus, tone_texts


def test_a_recipe_says_how_features_are_normalised(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    for split in ("train", "dev", "test"):
        tone_corpus(folder.corpus("default"), tone_texts(4)).write(folder.corpus("default") / f"{split}.jsonl")
    recipe = {"data": {"processes": 1}, "features": {"n_mels": 8}}
    make_after_corpus(Config.resolve(recipe, {}), folder)
    plain = build_loaders(Config.resolve(recipe, {}), folder)
    own = build_loaders(Config.resolve(recipe, {"data.normalisation": "utterance"}), folder)
    for loader in (own.train, own.validation, own.test):
        for position in range(4):
            assert abs(loader.dataset[position].features.mean(0)).max() < 1e-5
    assert abs(plain.test.dataset[0].features.mean(0)).max() > 1e-3
    assert own.test.digest != plain.test.digest


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


def test_a_curriculum_is_for_training_alone(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    for split in ("train", "dev", "test"):
        tone_corpus(folder.corpus("default"), tone_texts(12)).write(folder.corpus("default") / f"{split}.jsonl")
    recipe = {"data": {"frames_per_batch": 120, "processes": 1}, "features": {"n_mels": 8}}
    plain, config = Config.resolve(recipe, {}), Config.resolve(recipe, {"data.curriculum_epochs": "3"})
    make_after_corpus(config, folder)
    loaders, usual = build_loaders(config, folder), build_loaders(plain, folder)
    counts = [sum(len(batch) for batch in loaders.train.epoch(epoch)) for epoch in range(4)]
    assert counts == [6, 9, 11, 12]
    assert loaders.train.digest != usual.train.digest
    assert loaders.validation.digest == usual.validation.digest
    assert sum(len(batch) for batch in loaders.validation.epoch(0)) == 12
    assert loaders.test.digest == usual.test.digest
    # A run from before the key was there goes on.
    assert "data.curriculum_epochs" not in decisive(plain.model_dump(mode="json"), is_recipe=True)
    assert decisive(config.model_dump(mode="json"), is_recipe=True)["data.curriculum_epochs"] == 3
