"""The data stages, and where they put what they make.

::

    data/corpora/NAME/    {train,dev,test}.jsonl and the audio                  (stage corpus, of each corpus)
    data/manifests/NAME/  {train,dev,test}.jsonl, skipped.jsonl                 (stage manifests, of each corpus)
    data/features/NAME/   {train,dev,test}/shard-*.npy                          (stage features, of each corpus)
    data/dataset/         {train,dev,test}.jsonl, vocabulary.json, statistics.json  (stage dataset, of all together)

Each stage is a function of the recipe and of the folders of the stages before; DVC decides which must run.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.corpora.base import some
from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.corpora.unusable import were_set_aside
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.manifest_tools.findings import Finding
from sonosco_mlflow.data.manifest_tools.recordings import Expected
from sonosco_mlflow.data.manifest_tools.validation import findings_of
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.sections import Features
from sonosco_mlflow.vocabulary import make_tokenizer

if TYPE_CHECKING:
    from sonosco_mlflow.data.joining import JoinedFeatures
    from sonosco_mlflow.data.processor import AudioDataProcessor

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class DataFolder:
    """Names the files below one ``data`` folder."""

    root: Path

    def corpus(self, name: str) -> Path:
        """Return the folder of a corpus: audio, and one list of utterances a split."""
        return self.root / "corpora" / name

    def manifests(self, name: str) -> Path:
        """Return the folder with the manifests of a corpus."""
        return self.root / "manifests" / name

    def skipped(self, name: str) -> Path:
        """Return the list of what was wrong with the utterances of a corpus that were left out."""
        return self.manifests(name) / "skipped.jsonl"

    def features(self, name: str) -> Path:
        """Return the folder with a corpus's feature stores, one a split."""
        return self.root / "features" / name

    @property
    def dataset(self) -> Path:
        """All corpora as one, and what was learnt of their training split."""
        return self.root / "dataset"

    @property
    def vocabulary(self) -> Path:
        """The tokenizer's file."""
        return self.dataset / "vocabulary.json"

    @property
    def statistics(self) -> Path:
        """Mean and standard deviation of the training features."""
        return self.dataset / "statistics.json"

    def manifest(self, split: str) -> Path:
        """Return the manifest of a split."""
        return self.dataset / f"{split}.jsonl"

    @property
    def names(self) -> Path:
        """The list of the corpora that the dataset is made of."""
        return self.dataset / "corpora.json"

    def corpora(self) -> list[str]:
        """Read the names of the corpora that the dataset is made of.

        Raises:
            UserError: there is no dataset.
        """
        try:
            names: list[str] = json.loads(self.names.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.dataset}: no dataset here; `dvc repro dataset` makes it") from error
        return names

    def count_skipped(self) -> Counter[str]:
        """Return how many utterances of each split were left out of the dataset."""
        lines = (line for name in self.corpora() for line in self.skipped(name).read_text("utf-8").split("\n"))
        findings = [json.loads(line) for line in lines if line]
        # More than one check may find something in a row.
        rows = {(row["manifest"], row["line"]) for row in findings}
        return Counter(Path(manifest).name.partition(".")[0] for manifest, _ in rows)

    def store(self, split: str) -> "JoinedFeatures":
        """Open the features of a split.

        Raises:
            UserError: there are none.
        """
        # torch takes seconds to import, and the first stages need none of it.
        from sonosco_mlflow.data.features import FeatureStore
        from sonosco_mlflow.data.joining import JoinedFeatures, prefixes

        parts = prefixes(self.corpora())
        return JoinedFeatures({prefix: FeatureStore(self.features(name) / split) for name, prefix in parts.items()})


def make_corpus(config: Config, name: str, folder: DataFolder, progress: Progress = _silent) -> list[Finding]:
    """Bring a corpus of the recipe into its folder; name what is of no use there.

    Raises:
        UserError: its source is missing, wrong or incomplete; of several corpora, the message begins with its name.
    """
    corpus = config.data.corpora[name]
    try:
        bring_corpus(
            corpus.kind,
            folder.corpus(name),
            source=corpus.source,
            parts=corpus.parts or None,
            processes=config.data.processes,
            progress=partial(progress, f"corpus {name}"),
            hold_out=corpus.hold_out,
            set_unusable_aside=True,
        )
    except UserError as error:
        if len(config.data.corpora) == 1:
            raise
        raise UserError(f"corpus {name}: {error}") from error
    return were_set_aside(folder.corpus(name))


def make_manifests(config: Config, name: str, folder: DataFolder, progress: Progress = _silent) -> list[Finding]:
    """Write the manifests of a corpus without the rows that the recipe skips; name what is wrong there.

    Raises:
        UserError: the corpus has utterances of no use, and the recipe does not skip them.
    """
    paths = {split: folder.corpus(name) / f"{split}.jsonl" for split in SPLITS}
    unusable = were_set_aside(folder.corpus(name))
    _refuse_unless_skipped(config, unusable)
    found = unusable + _to_skip(config, list(paths.values()), partial(progress, f"recordings of {name}"))
    for split, path in paths.items():
        manifest, skipped = Manifest.read(path), {finding.line for finding in found if finding.manifest == str(path)}
        kept = (utterance for line, utterance in enumerate(manifest, start=1) if line not in skipped)
        Manifest(kept, manifest.root).write(folder.manifests(name) / f"{split}.jsonl")
    lines = "".join(f"{finding.to_json()}\n" for finding in found)
    folder.skipped(name).write_text(lines, encoding="utf-8")
    return found


def _refuse_unless_skipped(config: Config, unusable: list[Finding]) -> None:
    refused = [finding for finding in unusable if finding.check not in config.data.skip]
    if refused:
        needed = sorted({*config.data.skip, *(finding.check for finding in refused)})
        raise UserError(
            f"these utterances are of no use: {some([finding.found for finding in refused])}. Mend them and make the "
            f"corpus anew, or leave them out with data.skip: [{', '.join(needed)}]"
        )


def _to_skip(config: Config, paths: list[Path], progress: Callable[[int, int], None]) -> list[Finding]:
    checks = config.data.skip
    if not checks:
        return []
    # Some of it is seen without opening a recording.
    expected = None if set(checks) <= {"text", "short"} else Expected()
    findings = findings_of(paths, None, expected, config.data.processes, progress)
    return [finding for finding in findings if finding.check in checks]


def make_features(config: Config, name: str, folder: DataFolder, progress: Progress = _silent) -> None:
    """Extract the features of every split of a corpus."""
    from sonosco_mlflow.data.executors import Cluster, Processes
    from sonosco_mlflow.data.extraction import extract_features

    # Not below `features`: DVC empties that before the stage.
    work = folder.root / ".unfinished" / name
    executor = Processes(config.data.processes) if config.data.cluster is None else Cluster(config.data.cluster)
    for split in SPLITS:
        extract_features(
            Manifest.read(folder.manifests(name) / f"{split}.jsonl"),
            make_processor(config.features),
            folder.features(name) / split,
            dtype=config.features.dtype,
            executor=executor,
            unfinished=work / split,
            progress=partial(progress, f"features of {name}, {split}"),
        )
    with suppress(OSError):
        work.rmdir()
        # There may be another corpus's.
        work.parent.rmdir()


def make_dataset(config: Config, folder: DataFolder) -> None:
    """Put the corpora of the recipe together, with the vocabulary and the statistics of their training split.

    Raises:
        UserError: a split is empty, or there are more characters than there may be word pieces.
    """
    from sonosco_mlflow.data.features import FeatureStatistics
    from sonosco_mlflow.data.joining import joined_manifest, prefixes

    parts = prefixes(list(config.data.corpora))
    folder.dataset.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        paths = {name: folder.manifests(name) / f"{split}.jsonl" for name in parts}
        joined = joined_manifest({parts[name]: Manifest.read(path) for name, path in paths.items()}, folder.dataset)
        if not len(joined):
            where = " and ".join(map(str, paths.values()))
            raise UserError(f"{where}: the split has no utterances; all of {SPLITS} are needed")
        joined.write(folder.manifest(split))
    texts = (utterance.text for utterance in Manifest.read(folder.manifest("train")))
    make_tokenizer(config.tokenizer.kind, config.tokenizer.size, texts).write(folder.vocabulary)
    folder.names.write_text(json.dumps(list(parts)) + "\n", encoding="utf-8")
    FeatureStatistics.of(folder.store("train")).write(folder.statistics)


def make_processor(features: Features) -> "AudioDataProcessor":
    """Return the processor of a recipe."""
    from sonosco_mlflow.data.processor import AudioDataProcessor, KaldiFilterBankProcessor, MelCepstrumProcessor

    kinds = {"log_mel": AudioDataProcessor, "kaldi_fbank": KaldiFilterBankProcessor, "mfcc": MelCepstrumProcessor}
    settings = features.model_dump(exclude={"dtype", "kind", "n_mfcc"})
    if features.kind == "mfcc":
        settings["n_mfcc"] = features.n_mfcc
    return kinds[features.kind](**settings)
