"""The pictures that a run shows."""

import io

import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from torch import Tensor, nn

from sonosco_mlflow import evaluation
from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.evaluation import alignment_picture, compared_curves, learning_curves, mel_spectrogram
from sonosco_mlflow.models.base import Hypothesis
from sonosco_mlflow.models.ctc import CTCModel
from sonosco_mlflow.text import CharacterTokenizer
from sonosco_mlflow.word_pieces import WordPieceTokenizer


@pytest.fixture(autouse=True)
def no_pictures() -> None:
    """Here they are drawn."""


class Decodes(nn.Module):
    """A model that finds a text, with weights for each of its characters."""

    def __init__(self, tokens: list[int], alignment: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.hypothesis = Hypothesis(tokens, 0.0, alignment, 0.0)

    def decode(self, batch: Batch) -> list[Hypothesis]:
        return [self.hypothesis]


class DecodesFrames(Decodes, CTCModel):
    """One that says of each frame how likely each token is."""

    def log_probabilities(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def sample(text: str) -> Sample:
    features = torch.linspace(-1, 1, 50).reshape(10, 5)
    return Sample("a", text, features, torch.zeros(1, dtype=torch.int64))


def assert_drawn(picture: bytes, again: bytes) -> None:
    assert again == picture, "the same data gives the same bytes"
    pixels = image.imread(io.BytesIO(picture))
    assert pixels.shape[0] > 100
    assert pixels.std() > 0.01


CURVES = {"train_loss": ([1, 2], [2.0, 1.0]), "val_word_error_rate": ([2], [0.5]), "seconds": ([1], [9.0])}


def test_curves_are_drawn() -> None:
    assert_drawn(learning_curves(CURVES), learning_curves(CURVES))
    assert learning_curves(CURVES) != learning_curves({**CURVES, "train_loss": ([1, 2], [2.0, 1.5])})
    assert_drawn(learning_curves({}), learning_curves({}))
    assert_drawn(compared_curves(CURVES, {}), compared_curves(CURVES, {}))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_whatever_the_numbers_are_curves_are_drawn(value: float) -> None:
    curves = {
        "train_loss": ([1, 2], [2.0, value]),
        "val_loss": ([2], [value]),
        "val_word_error_rate": ([1, 2], [value, 3.0]),
    }
    assert_drawn(learning_curves(curves), learning_curves(curves))


def test_what_is_learnt_is_not_crushed_by_how_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(evaluation, "png", figures.append)
    learning_curves({"train_loss": ([1, 2], [30.0, 0.5]), "val_word_error_rate": ([1, 2], [20.0, 0.25])})
    learning_curves({"train_loss": ([1, 2], [2.0, 1.0]), "val_word_error_rate": ([1, 2], [0.2, 0.1])})
    (far, above), (near, below) = (figure.axes for figure in figures)
    assert (far.get_yscale(), near.get_yscale()) == ("log", "linear")
    assert above.get_ylim() == (0.0, 1.02)
    assert below.get_ylim() == (0.0, pytest.approx(0.21))


@pytest.mark.parametrize("text", ["plain", "$_{ AND $5", "\\frac{", "naïve 話", "", "two\nlines"])
def test_a_transcript_is_shown_as_it_is_written(text: str) -> None:
    assert_drawn(mel_spectrogram(sample(text)), mel_spectrogram(sample(text)))
    tokenizer = CharacterTokenizer.of([text or "x"])
    tokens = tokenizer.encode(text)
    steps = max(len(tokens), 1)
    for model in (
        Decodes(tokens, torch.rand(steps, 7)),
        DecodesFrames(tokens, torch.rand(9, tokenizer.vocabulary_size)),
    ):
        assert_drawn(*(alignment_picture(model, tokenizer, sample(text)) for _ in range(2)))


def test_a_piece_that_is_a_space_alone_is_drawn_too() -> None:
    tokenizer = WordPieceTokenizer(["▁", "A"], [-1.0, -1.0])
    tokens = tokenizer.encode("A A")
    for model in (
        Decodes(tokens, torch.rand(len(tokens), 7)),
        DecodesFrames(tokens, torch.rand(9, tokenizer.vocabulary_size)),
    ):
        assert_drawn(*(alignment_picture(model, tokenizer, sample("A A")) for _ in range(2)))


def test_as_many_frames_as_tokens_are_still_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(evaluation, "png", figures.append)
    tokenizer = CharacterTokenizer.of(["ABC"])
    # One step more than there are tokens: the end of sentence.
    weights = torch.rand(4, tokenizer.vocabulary_size)
    alignment_picture(Decodes(tokenizer.encode("ABC"), weights), tokenizer, sample("ABC"))  # type: ignore[arg-type]
    (shown,) = figures[0].axes[0].images
    assert shown.get_array().shape == weights.shape
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["A", "B", "C"]


def test_of_many_tokens_those_are_drawn_that_were_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(evaluation, "png", figures.append)
    tokenizer = CharacterTokenizer.of([chr(65 + letter) for letter in range(26)])
    posteriors = torch.zeros(9, tokenizer.vocabulary_size)
    (a,), (z,) = tokenizer.encode("A"), tokenizer.encode("Z")
    posteriors[:, a], posteriors[3, z] = 0.9, 0.02
    model = DecodesFrames([a], posteriors)
    alignment_picture(model, tokenizer, sample("A"))
    (shown,) = figures[0].axes[0].images
    assert shown.get_array().tolist() == posteriors.T[[0, a, z]].tolist()
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["BLANK", "A", "Z"]


def test_a_model_is_drawn_in_the_modes_that_it_has() -> None:
    model = Decodes([5], torch.rand(1, 7))
    model.train()
    model.frozen = nn.Dropout().eval()
    alignment_picture(model, CharacterTokenizer.of(["A"]), sample("A"))  # type: ignore[arg-type]
    assert (model.training, model.frozen.training) == (True, False)


def test_the_longest_of_compared_features_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(evaluation, "png", figures.append)
    evaluation.compared_features({name: torch.zeros(frames, 4) for name, frames in (("a", 7), ("b", 9), ("c", 5))}, "x")
    assert [axes.get_xlim() for axes in figures[0].axes] == [(-0.5, 8.5)] * 3
