"""AudioDataset: the utterances of a manifest as normalised features and token ids.

Features come from a :class:`~sonosco_mlflow.data.features.FeatureStore` where there is one, else straight from the
audio; both ways give the same numbers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from sonosco_mlflow.data.augment import Augmentation, WaveformAugmentation
from sonosco_mlflow.data.features import FeatureStatistics, StoredFeatures, files_digest
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor, read_audio, resampled_length
from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import qualified_name
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.text import Tokenizer
from sonosco_mlflow.word_pieces import WordPieceTokenizer


@dataclass(frozen=True)
class Sample:
    """One utterance: features ``[frames, n_mels]`` float32, tokens ``[length]`` int64, and its reference text."""

    id: str
    text: str
    features: Tensor
    tokens: Tensor


class AudioDataset:
    """Utterances of a manifest, ready for a model.

    Args:
        manifest: the utterances, in its order.
        processor: turns audio into features.
        tokenizer: turns text into tokens.
        store: features extracted beforehand; None computes them from the audio each time.
        statistics: mean and standard deviation to normalise by (of the training split); None leaves features as they
            are.
        augmentation: applied by :meth:`sample`, never by indexing.
        waveform_augmentations: applied by :meth:`sample` to the recordings, in their order; then features are computed
            from these instead of read from ``store``.
        word_sampling: probability with which :meth:`sample` spells a word by any of its likeliest segmentations.
        seed: key of the augmentation and of the spelling.

    Raises:
        UserError: ``store`` lacks an utterance of the manifest, or the tokenizer has one spelling of a word only.
    """

    def __init__(
        self,
        manifest: Manifest,
        processor: AudioDataProcessor,
        tokenizer: Tokenizer,
        *,
        store: StoredFeatures | None = None,
        statistics: FeatureStatistics | None = None,
        augmentation: Augmentation | None = None,
        waveform_augmentations: Sequence[WaveformAugmentation] = (),
        word_sampling: float = 0.0,
        seed: int = 0,
    ) -> None:
        if word_sampling and not isinstance(tokenizer, WordPieceTokenizer):
            raise UserError(
                f"word_sampling is {word_sampling}, but a {type(tokenizer).__name__} spells a word in one way; set 0"
            )
        self.manifest = manifest
        self.processor = processor
        self.tokenizer = tokenizer
        self.store = store
        self.statistics = statistics
        self.augmentation = augmentation
        self.waveform_augmentations = tuple(waveform_augmentations)
        self.word_sampling = word_sampling
        self.seed = seed
        # Of all recordings, where one of them may be read.
        self._samples = [] if store is not None and not waveform_augmentations else self._samples_of_audio()
        self.frames = self._frames()
        self._frames_in: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.manifest)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that its samples depend on, save the audio itself."""
        parts = [
            self.manifest.digest,
            self.tokenizer.digest,
            _description(self.processor),
            _description(self.statistics),
            _description(self.augmentation),
            self.seed,
        ]
        # What came later stands here only where it is used: a run from before has the digest of then.
        if self.waveform_augmentations:
            parts.append({"waveforms": [_description(augmentation) for augmentation in self.waveform_augmentations]})
        if self.word_sampling:
            parts.append({"word_sampling": self.word_sampling})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """Hexadecimal sha256 of what its features are read from: the store, or else the recordings."""
        if self.store is not None and not self.waveform_augmentations:
            return self.store.digest
        return files_digest(self.manifest.audio_path(utterance) for utterance in self.manifest)

    def frames_in(self, epoch: int) -> list[int]:
        """Return the number of frames of each utterance as ``epoch`` sees it, in manifest order; no audio is read."""
        if not self.waveform_augmentations:
            return self.frames
        if self._frames_in[0] != epoch:
            samples = (self._samples_in(position, epoch) for position in range(len(self)))
            self._frames_in = (epoch, list(map(self.processor.frames, samples)))
        return self._frames_in[1]

    def __getitem__(self, position: int) -> Sample:
        """Return the utterance at ``position`` without augmentation."""
        utterance = self.manifest[position]
        if self.store is not None:
            features = torch.from_numpy(self.store.read(utterance.id).astype(np.float32))
        else:
            features = self.processor(self.manifest.audio_path(utterance))
        return self._sample(utterance, features)

    def _sample(self, utterance: Utterance, features: Tensor) -> Sample:
        if self.statistics is not None:
            features = self.statistics.normalise(features)
        tokens = torch.tensor(self.tokenizer.encode(utterance.text), dtype=torch.int64)
        return Sample(utterance.id, utterance.text, features, tokens)

    def sample(self, position: int, epoch: int) -> Sample:
        """Return the utterance at ``position`` as ``epoch`` sees it: augmented by (seed, epoch, utterance id)."""
        sample = self._of_waveform(position, epoch) if self.waveform_augmentations else self[position]
        if self.augmentation is not None:
            stream = random_stream(self.seed, "augment", epoch, sample.id)
            sample = replace(sample, features=self.augmentation(sample.features, stream))
        if self.word_sampling:
            assert isinstance(self.tokenizer, WordPieceTokenizer)
            stream = random_stream(self.seed, "word pieces", epoch, sample.id)
            pieces = self.tokenizer.sampled(sample.text, self.word_sampling, stream)
            sample = replace(sample, tokens=torch.tensor(pieces, dtype=torch.int64))
        return sample

    def _frames(self) -> list[int]:
        if self.store is None:
            return list(map(self.processor.frames, self._samples))
        missing = [utterance.id for utterance in self.manifest if utterance.id not in self.store]
        if missing:
            raise UserError(
                f"{self.store.place}: {len(missing)} utterances of the manifest have no features, "
                f"the first is '{missing[0]}'; bring them up to date with `dvc repro dataset`"
            )
        return [self.store.frames(utterance.id) for utterance in self.manifest]

    def without_augmentation(self) -> "AudioDataset":
        """Return a dataset of the same utterances, as they are."""
        return AudioDataset(
            self.manifest, self.processor, self.tokenizer, store=self.store, statistics=self.statistics, seed=self.seed
        )

    def waveform(self, position: int, epoch: int) -> Tensor:
        """Return the recording ``[samples]`` at ``position`` as ``epoch`` hears it."""
        waveform = read_audio(self.manifest.audio_path(self.manifest[position]), self.processor.sample_rate)
        for augment, stream in self._changes(position, epoch):
            waveform = augment(waveform, stream)
        return waveform

    def _of_waveform(self, position: int, epoch: int) -> Sample:
        utterance = self.manifest[position]
        try:
            return self._sample(utterance, self.processor.features(self.waveform(position, epoch)))
        except UserError as error:
            raise UserError(
                f"{self.manifest.audio_path(utterance)}: {error}, as epoch {epoch} plays it; leave it out, or change "
                "augment.speeds"
            ) from error

    def _samples_in(self, position: int, epoch: int) -> int:
        samples = self._samples[position]
        for augment, stream in self._changes(position, epoch):
            samples = augment.samples(samples, stream)
        return samples

    def _changes(self, position: int, epoch: int) -> Iterator[tuple[WaveformAugmentation, np.random.Generator]]:
        utterance = self.manifest[position]
        for number, augment in enumerate(self.waveform_augmentations):
            yield augment, random_stream(self.seed, f"waveform {number}", epoch, utterance.id)

    def _samples_of_audio(self) -> list[int]:
        """Return how many samples each recording has at the processor's rate, by its header alone."""
        return [self._samples_of(self.manifest.audio_path(utterance)) for utterance in self.manifest]

    def _samples_of(self, path: Path) -> int:
        try:
            header = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path}: cannot be read as audio ({error})") from error
        return resampled_length(header.frames, header.samplerate, self.processor.sample_rate)


def _description(part: object) -> object:
    try:
        return Serializer().describe(part)
    except UserError:
        # What depends on more than its parameters has a digest; else its name is all that is known.
        return [qualified_name(type(part)), part.digest] if hasattr(part, "digest") else qualified_name(type(part))
