"""Where the data of a run comes from: the manifests' digests, and DVC's where DVC versions it, else its own."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.features import files_digest
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.tracking.data_lock import lock_text, stage_outputs
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.tags import DATA_DIGEST
from sonosco_mlflow.vocabulary import read_tokenizer


@dataclass(frozen=True)
class DataLineage:
    """The identity of a run's data.

    Attributes:
        manifests: sha256 of each split's manifest.
        vocabulary: sha256 of the tokenizer's vocabulary, or None.
        outputs: DVC's digest of each data output, by path; empty where DVC does not version the data.
        counts: utterances, hours and speakers of each split, and how many were skipped if any were.
        contents: where DVC does not version the data, sha256 of what each split's features are read from.
        sources: each split's manifest, or the folder that its recordings' paths start from.
        lock: text of the ``dvc.lock`` by which DVC brings the data again, or None.
    """

    manifests: dict[str, str]
    vocabulary: str | None
    outputs: dict[str, str]
    counts: dict[str, dict[str, float]]
    contents: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)
    lock: str | None = None

    @classmethod
    def of_folder(cls, folder: DataFolder, *, recordings: bool = False) -> Self:
        """Describe the data that the DVC stages made.

        Args:
            folder: where it lies.
            recordings: whether training reads the recordings beside the features; DVC versions them all the same.
        """
        manifests = {split: Manifest.read(folder.manifest(split)) for split in SPLITS}
        outputs, skipped = stage_outputs(folder), folder.count_skipped()
        contents = {} if outputs else {split: folder.store(split).digest for split in SPLITS}
        if recordings and not outputs:
            train = manifests["train"]
            contents["train recordings"] = files_digest(train.audio_path(utterance) for utterance in train)
        return cls(
            manifests={split: manifest.digest for split, manifest in manifests.items()},
            vocabulary=read_tokenizer(folder.vocabulary).digest,
            outputs=outputs,
            counts={split: _counts(manifest, skipped[split]) for split, manifest in manifests.items()},
            contents=contents,
            sources={split: folder.manifest(split) for split in SPLITS},
            lock=lock_text(folder),
        )

    @classmethod
    def of_loaders(
        cls,
        train: AudioDataLoader | None,
        validation: AudioDataLoader | None,
        test: AudioDataLoader | None,
    ) -> Self:
        """Describe the data of loaders, of which DVC knows nothing."""
        loaders = {"train": train, "dev": validation, "test": test}
        datasets = {split: loader.dataset for split, loader in loaders.items() if loader is not None}
        manifests = {split: dataset.manifest for split, dataset in datasets.items()}
        tokenizers = [dataset.tokenizer for dataset in datasets.values()]
        return cls(
            manifests={split: manifest.digest for split, manifest in manifests.items()},
            vocabulary=tokenizers[0].digest if tokenizers else None,
            outputs={},
            counts={split: _counts(manifest) for split, manifest in manifests.items()},
            contents={split: dataset.content_digest for split, dataset in datasets.items()},
            sources={split: manifest.root for split, manifest in manifests.items()},
        )

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what :meth:`to_json` returned."""
        content = json.loads(text)
        return cls(
            content["manifests"], content["vocabulary"], content["dvc"], content["counts"], content.get("contents", {})
        )

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all digests together."""
        parts = [self.manifests, self.vocabulary, self.outputs, *([self.contents] if self.contents else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tags(self) -> dict[str, str]:
        """Return the digests as tags of a run; DVC's are ``dvc.data/manifests`` and so on."""
        return {DATA_DIGEST: self.digest, **{f"dvc.{path}": digest for path, digest in self.outputs.items()}}

    def log(self, run: TrackedRun, folder: str = "") -> None:
        """Log the lineage as artifacts of ``run`` in ``folder`` (empty, or ending in a slash), and as its inputs."""
        run.log_text(self.to_json(), f"{folder}data/lineage.json")
        if self.lock is not None:
            run.log_text(self.lock, f"{folder}data/dvc.lock")
        for split, path in self.sources.items():
            run.log_dataset(split, self.manifests[split], path, context=split)

    def to_json(self) -> str:
        """Return the lineage as JSON."""
        content = {
            "manifests": self.manifests,
            "vocabulary": self.vocabulary,
            "dvc": self.outputs,
            "counts": self.counts,
            "contents": self.contents,
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def to_markdown(self) -> str:
        """Return the counts of each split as a Markdown table."""
        names = ["utterances", "hours", "speakers"]
        if any("skipped" in count for count in self.counts.values()):
            names.append("skipped")
        rows = [["split", *names], ["---"] * (1 + len(names))]
        for split, count in self.counts.items():
            rows.append([split, *(f"{count.get(name, 0):.{2 if name == 'hours' else 0}f}" for name in names)])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _counts(manifest: Manifest, skipped: int = 0) -> dict[str, float]:
    return {
        "utterances": len(manifest),
        "hours": round(manifest.hours, 4),
        "speakers": len(manifest.speakers),
        **({"skipped": skipped} if skipped else {}),
    }
