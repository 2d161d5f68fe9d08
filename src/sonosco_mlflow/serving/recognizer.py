"""SpeechRecognizer: from a waveform to text, with all that this needs in one folder.

::

    objects.json                 classes and parameters of processor, statistics, tokenizer, model and search
    model.safetensors            the model's parameters and buffers
    language_model.safetensors   the n-grams, where the search uses some
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.features import FeatureStatistics
from sonosco_mlflow.data.loader import collate
from sonosco_mlflow.data.processor import AudioDataProcessor, read_audio
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.base import Hypothesis, SpeechModel
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.text import Tokenizer

OBJECTS = "objects.json"
_WEIGHTS = "model.safetensors"
_LANGUAGE_MODEL = "language_model.safetensors"


@serializable
class SpeechRecognizer:
    """A trained model together with what turns audio into its input and its output into text.

    Args:
        model: decodes features.
        tokenizer: turns tokens into text.
        processor: turns waveforms into features.
        statistics: normalises features; None leaves them as they are.
        search: how the model's hypotheses are searched for.
    """

    def __init__(
        self,
        model: SpeechModel,
        tokenizer: Tokenizer,
        processor: AudioDataProcessor,
        statistics: FeatureStatistics | None = None,
        search: Search = GREEDY,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.statistics = statistics
        self.search = search

    def transcribe(self, waveforms: Sequence[npt.NDArray[np.float32]]) -> list[str]:
        """Return the text of each waveform ``[samples]``, float in [-1, 1] at the processor's sample rate."""
        return [self.tokenizer.decode(hypotheses[0].tokens) for hypotheses in self.hypotheses(waveforms)]

    def hypotheses(self, waveforms: Sequence[npt.NDArray[np.float32]]) -> list[list[Hypothesis]]:
        """Return up to ``search.n_best`` hypotheses of each waveform, best first."""
        if not waveforms:
            return []
        samples = [self._sample(torch.from_numpy(np.asarray(waveform, np.float32))) for waveform in waveforms]
        device = next(self.model.parameters()).device
        self.model.eval()
        with torch.inference_mode():
            return self.model.search(collate(samples).to(device), self.search)

    def transcribe_file(self, path: Path) -> str:
        """Return the text of a sound file of any rate; errors are those of :meth:`file_hypotheses`."""
        return self.file_hypotheses(path)[0][1]

    def file_hypotheses(self, path: Path) -> list[tuple[float, str]]:
        """Return total and text of each hypothesis of a sound file of any rate, best first.

        Raises:
            UserError: it is no sound, or is shorter than a frame; the message names it.
        """
        waveform = read_audio(path, self.processor.sample_rate).numpy()
        if self.processor.frames(len(waveform)) < 1:
            raise UserError(f"{path}: its {len(waveform)} samples are shorter than one analysis window")
        (found,) = self.hypotheses([waveform])
        return [(hypothesis.total, self.tokenizer.decode(hypothesis.tokens)) for hypothesis in found]

    def predict(self, model_input: npt.NDArray[np.float32]) -> npt.NDArray[np.str_]:
        """Return the text of a waveform ``[samples]``, or of each row of ``[batch, samples]``, as an array."""
        return np.array(self.transcribe(list(np.atleast_2d(model_input))), dtype=np.str_)

    def save(self, folder: Path) -> None:
        """Write the recognizer into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OBJECTS).write_bytes(self.description())
        _write_state(self.model, folder / _WEIGHTS)
        if self.search.language_model is not None:
            _write_state(self.search.language_model, folder / _LANGUAGE_MODEL)

    def description(self) -> bytes:
        """Return all but the weights, as :meth:`save` writes it.

        Raises:
            UserError: a part of it does not say how it was made; the message names it.
        """
        return json_bytes(Serializer().describe(self))

    @classmethod
    def load(cls, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Self:
        """Read what :meth:`save` wrote; ``weights`` are other parameters and buffers of the model."""
        recognizer = Deserializer().build(json.loads((folder / OBJECTS).read_bytes()))
        assert isinstance(recognizer, cls)
        if weights is None:
            weights = safetensors.torch.load((folder / _WEIGHTS).read_bytes())
        recognizer.model.load_state_dict(weights)
        if recognizer.search.language_model is not None:
            tensors = safetensors.torch.load((folder / _LANGUAGE_MODEL).read_bytes())
            recognizer.search.language_model.load_state_dict(tensors)
        return recognizer

    def _sample(self, waveform: Tensor) -> Sample:
        features = self.processor.features(waveform)
        if self.statistics is not None:
            features = self.statistics.normalise(features)
        return Sample("", "", features, torch.zeros(0, dtype=torch.int64))


def _write_state(module: nn.Module, path: Path) -> None:
    _, tensors = split_tree(dict(module.state_dict()))
    path.write_bytes(tensor_bytes(tensors))
