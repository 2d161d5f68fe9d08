"""The three data stages, and where they put what they make.

::

    data/corpus/      {train,dev,test}.jsonl and the audio          (stage corpus)
    data/manifests/   {train,dev,test}.jsonl, vocabulary.json       (stage manifests)
    data/features/    {train,dev,test}/shard-*.npy, statistics.json (stage features)

Each stage is a function of the recipe and of the folder of the stage before; DVC decides which must run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.config import Config, Features
from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.vocabulary import make_tokenizer

if TYPE_CHECKING:
    from sonosco_mlflow.data.processor import AudioDataProcessor

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class DataFolder:
    """Names the files below one ``data`` folder."""

    root: Path

    @property
    def corpus(self) -> Path:
        """Audio, and one list of utterances a split."""
        return self.root / "corpus"

    @property
    def manifests(self) -> Path:
        """Checked manifests and the vocabulary."""
        return self.root / "manifests"

    @property
    def features(self) -> Path:
        """One feature store a split, and the training split's statistics."""
        return self.root / "features"

    @property
    def vocabulary(self) -> Path:
        """The tokenizer's file."""
        return self.manifests / "vocabulary.json"

    @property
    def statistics(self) -> Path:
        """Mean and standard deviation of the training features."""
        return self.features / "statistics.json"

    def manifest(self, split: str) -> Path:
        """Return the manifest of a split."""
        return self.manifests / f"{split}.jsonl"

    def store(self, split: str) -> Path:
        """Return the feature store of a split."""
        return self.features / split


def make_corpus(config: Config, folder: DataFolder, progress: Progress = _silent) -> None:
    """Bring the recipe's corpus into ``folder.corpus``."""
    bring_corpus(
        config.data.corpus,
        folder.corpus,
        source=config.data.source,
        parts=config.data.parts or None,
        processes=config.data.processes,
        progress=lambda done, total: progress("corpus", done, total),
    )


def make_manifests(config: Config, folder: DataFolder) -> None:
    """Write the manifests of ``folder.corpus``, and the vocabulary of the training transcripts.

    Raises:
        UserError: a split is empty, or there are more characters than there may be word pieces.
    """
    folder.manifests.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        manifest = Manifest.read(folder.corpus / f"{split}.jsonl")
        if not len(manifest):
            raise UserError(f"{folder.corpus / split}.jsonl: the split has no utterances; all of {SPLITS} are needed")
        manifest.write(folder.manifest(split))
    train = Manifest.read(folder.manifest("train"))
    texts = (utterance.text for utterance in train)
    make_tokenizer(config.tokenizer.kind, config.tokenizer.size, texts).write(folder.vocabulary)


def make_features(config: Config, folder: DataFolder, progress: Progress = _silent) -> None:
    """Extract the features of every split, and the statistics of the training split."""
    # torch takes seconds to import, and the other stages need none of it.
    from sonosco_mlflow.data.executors import Cluster, Processes
    from sonosco_mlflow.data.extraction import extract_features
    from sonosco_mlflow.data.features import FeatureStatistics

    executor = Processes(config.data.processes) if config.data.cluster is None else Cluster(config.data.cluster)
    for split in SPLITS:
        store = extract_features(
            Manifest.read(folder.manifest(split)),
            make_processor(config.features),
            folder.store(split),
            dtype=config.features.dtype,
            executor=executor,
            # Not below `features`: DVC empties that before the stage.
            unfinished=folder.root / ".unfinished" / split,
            progress=lambda done, total, split=split: progress(f"features of {split}", done, total),  # type: ignore[misc]
        )
        if split == "train":
            FeatureStatistics.of(store).write(folder.statistics)


def make_processor(features: Features) -> "AudioDataProcessor":
    """Return the processor of a recipe."""
    from sonosco_mlflow.data.processor import AudioDataProcessor, KaldiFilterBankProcessor, MelCepstrumProcessor

    kinds = {"log_mel": AudioDataProcessor, "kaldi_fbank": KaldiFilterBankProcessor, "mfcc": MelCepstrumProcessor}
    settings = features.model_dump(exclude={"dtype", "kind", "n_mfcc"})
    if features.kind == "mfcc":
        settings["n_mfcc"] = features.n_mfcc
    return kinds[features.kind](**settings)
