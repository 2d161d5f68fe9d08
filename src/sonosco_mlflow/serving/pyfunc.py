"""The recognizer as an MLflow model: from code and safetensors, without a pickle.

MLflow runs this file when it loads the model::

    model = mlflow.pyfunc.load_model("models:/...")
    model.predict(waveforms)         # [batch, samples] float32 at the model's sample rate
"""

from pathlib import Path

import mlflow
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from sonosco_mlflow.serving.recognizer import SpeechRecognizer


class RecognizerModel(PythonModel):
    """Transcribes waveforms with the recognizer among the model's artifacts."""

    # MLflow would take annotations of ``predict`` for a schema, and asks for them even where a signature stands.
    _skip_type_hint_validation = True

    def load_context(self, context: PythonModelContext) -> None:
        """Load the recognizer."""
        self.recognizer = SpeechRecognizer.load(Path(context.artifacts["recognizer"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return what :meth:`SpeechRecognizer.predict` does."""
        return self.recognizer.predict(model_input)


mlflow.models.set_model(RecognizerModel())
