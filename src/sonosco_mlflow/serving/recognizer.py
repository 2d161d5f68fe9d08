"""SpeechRecognizer: from a waveform to text, with all that this needs in one folder.

::

    objects.json        classes and parameters of processor, statistics, tokenizer and model
    model.safetensors   the model's parameters and buffers
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.features import FeatureStatistics
from sonosco_mlflow.data.loader import collate
from sonosco_mlflow.data.processor import AudioDataProcessor, read_audio
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.text import Tokenizer

OBJECTS = "objects.json"
_WEIGHTS = "model.safetensors"


@serializable
class SpeechRecognizer:
    """A trained model together with what turns audio into its input and its output into text.

    Args:
        model: decodes features.
        tokenizer: turns tokens into text.
        processor: turns waveforms into features.
        statistics: normalises features; None leaves them as they are.
    """

    def __init__(
        self,
        model: SpeechModel,
        tokenizer: Tokenizer,
        processor: AudioDataProcessor,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.statistics = statistics

    def transcribe(self, waveforms: Sequence[npt.NDArray[np.float32]]) -> list[str]:
        """Return the text of each waveform ``[samples]``, float in [-1, 1] at the processor's sample rate."""
        samples = [self._sample(torch.from_numpy(np.asarray(waveform, np.float32))) for waveform in waveforms]
        device = next(self.model.parameters()).device
        self.model.eval()
        with torch.inference_mode():
            hypotheses = self.model.decode(collate(samples).to(device))
        return [self.tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]

    def transcribe_file(self, path: Path) -> str:
        """Return the text of a sound file of any rate."""
        return self.transcribe([read_audio(path, self.processor.sample_rate).numpy()])[0]

    def predict(self, model_input: npt.NDArray[np.float32]) -> npt.NDArray[np.str_]:
        """Return the text of a waveform ``[samples]``, or of each row of ``[batch, samples]``, as an array."""
        return np.array(self.transcribe(list(np.atleast_2d(model_input))))

    def save(self, folder: Path) -> None:
        """Write the recognizer into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OBJECTS).write_bytes(self.description())
        _, tensors = split_tree(dict(self.model.state_dict()))
        (folder / _WEIGHTS).write_bytes(tensor_bytes(tensors))

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
        return recognizer

    def _sample(self, waveform: Tensor) -> Sample:
        features = self.processor.features(waveform)
        if self.statistics is not None:
            features = self.statistics.normalise(features)
        return Sample("", "", features, torch.zeros(0, dtype=torch.int64))
