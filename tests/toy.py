"""A tiny spoken language for tests: each letter is a tone, and a model that learns it in seconds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from sonosco_mlflow.data.augment import SpecAugment
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import CharacterTokenizer

SAMPLE_RATE = 16000
LETTER_SAMPLES = 1600
ALPHABET = ["A", "B", "C", "D", "E"]
TOKENIZER = CharacterTokenizer(ALPHABET)
PROCESSOR = AudioDataProcessor(n_mels=8)


def tones(text: str) -> np.ndarray:
    """0.1 s a letter, each letter at a pitch of its own, a little noise that depends on the text alone."""
    time = np.arange(LETTER_SAMPLES) / SAMPLE_RATE
    parts = [0.5 * np.sin(2 * np.pi * (300 + 500 * ALPHABET.index(letter)) * time) for letter in text]
    noise = np.random.default_rng(list(text.encode())).uniform(-0.01, 0.01, len(text) * LETTER_SAMPLES)
    return np.concatenate(parts) + noise


def tone_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to 6 letters in which no letter follows itself."""
    stream = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        letters = [int(stream.integers(len(ALPHABET)))]
        while len(letters) < stream.integers(2, 7):
            letters.append((letters[-1] + int(stream.integers(1, len(ALPHABET)))) % len(ALPHABET))
        texts.append("".join(ALPHABET[letter] for letter in letters))
    return texts


def tone_corpus(folder: Path, texts: Sequence[str]) -> Manifest:
    """Write the recordings of ``texts`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for number, text in enumerate(texts):
        waveform = tones(text)
        path = folder / f"tone-{number:03d}.wav"
        soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
        utterances.append(Utterance(path.stem, path.name, len(waveform) / SAMPLE_RATE, text, "tone"))
    return Manifest(utterances, folder)


def change_a_sample(path: Path) -> None:
    """Change one sample of a recording, and nothing of its header."""
    audio, rate = soundfile.read(path, dtype="int16")
    audio[1000] += 200
    soundfile.write(path, audio, rate, subtype="PCM_16")


def tone_loader(
    manifest: Manifest, frames_per_batch: int = 120, seed: int | None = 0, workers: int = 0
) -> AudioDataLoader:
    """A loader with SpecAugment where there is a seed (training), without where there is none (evaluation)."""
    augmentation = None if seed is None else SpecAugment(1, 5, 0.3, 1, 2)
    dataset = AudioDataset(manifest, PROCESSOR, TOKENIZER, augmentation=augmentation, seed=seed or 0)
    return AudioDataLoader(dataset, frames_per_batch=frames_per_batch, seed=seed, workers=workers)


def batch_digest(batch: Batch) -> str:
    """Hexadecimal sha256 of all that a batch holds."""
    content = hashlib.sha256(repr((batch.ids, batch.texts)).encode())
    for tensor in (batch.features, batch.feature_lengths, batch.tokens, batch.token_lengths):
        content.update(repr((tensor.dtype, tensor.shape)).encode() + tensor.numpy().tobytes())
    return content.hexdigest()


@dataclass(frozen=True)
class Spoken:
    tokens: list[int]


@dataclass(frozen=True)
class ToyOutput:
    loss: Tensor
    logits: Tensor
    lengths: Tensor


@serializable
class ToyModel(nn.Module):
    """Classifies frames; has what makes a resume hard: dropout, and batch norm's running averages."""

    def __init__(self, n_mels: int = 8, hidden: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.soft_window = False
        self.inner = nn.Linear(n_mels, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, TOKENIZER.vocabulary_size)

    def forward(self, batch: Batch) -> ToyOutput:
        hidden = torch.relu(self.norm(self.inner(batch.features).transpose(1, 2))).transpose(1, 2)
        logits = self.outer(self.dropout(hidden))
        losses = []
        for row, frames, tokens, length in zip(
            logits, batch.feature_lengths, batch.tokens, batch.token_lengths, strict=True
        ):
            spoken = tokens[torch.arange(int(frames)) * int(length) // int(frames)]
            losses.append(nn.functional.cross_entropy(row[: int(frames)], spoken))
        return ToyOutput(torch.stack(losses).mean(), logits, batch.feature_lengths)

    def decode(self, batch: Batch) -> list[Spoken]:
        return [Spoken(tokens) for tokens in self.teacher_forced(self(batch))]

    def teacher_forced(self, output: ToyOutput) -> list[list[int]]:
        rows = []
        for row, frames in zip(output.logits.argmax(-1), output.lengths, strict=True):
            merged = torch.unique_consecutive(row[: int(frames)]).tolist()
            rows.append([token for token in merged if token >= 5])
        return rows
