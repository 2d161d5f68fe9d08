"""A made-up language whose letters are sounds: small, quick to learn, the same everywhere."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.models import build_model
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.text import CharacterTokenizer

N_MELS = 80
WORDS = ["ABBA", "BED", "CAGE", "DEAF", "EGG", "FADED", "GAFFE"]


@pytest.fixture
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer.of([*WORDS, " "])


@pytest.fixture
def samples(tokenizer: CharacterTokenizer) -> list[Sample]:
    """Eight utterances of 2 to 4 words; each letter is a fixed pattern of 8 to 12 frames, plus noise."""
    stream = np.random.default_rng(1)
    patterns = stream.standard_normal((tokenizer.vocabulary_size, N_MELS))
    samples = []
    for number in range(8):
        text = " ".join(stream.choice(WORDS, stream.integers(2, 5)))
        tokens = tokenizer.encode(text)
        clean = np.concatenate([np.tile(patterns[token], (stream.integers(8, 13), 1)) for token in tokens])
        features = torch.tensor(clean + 0.3 * stream.standard_normal(clean.shape), dtype=torch.float32)
        samples.append(Sample(str(number), text, features, torch.tensor(tokens)))
    return samples


@pytest.fixture
def batch(samples: list[Sample]) -> Batch:
    """The eight utterances, of unequal lengths."""
    return collate(samples)


@pytest.fixture
def build(tokenizer: CharacterTokenizer) -> Callable[..., SpeechModel]:
    """Return a function that builds a small model: ``build("las", input_feeding=True)``."""

    def build_small(name: str, preset: str = "small", **settings: object) -> SpeechModel:
        torch.manual_seed(0)
        return build_model(name, preset, N_MELS, tokenizer.vocabulary_size, settings)

    return build_small


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One thread and deterministic algorithms, as in a training run; put back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
