"""The models of finished runs as versions of one registered model, the best of which has the alias ``best``.

>>> mlflow.pyfunc.load_model("models:/speech-default@best")       # doctest: +SKIP
"""

import math

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from sonosco_mlflow.console import say
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import find_run, is_away
from sonosco_mlflow.tracking.tags import MODEL_VERSION, REPRODUCES, WEIGHTS_DIGEST
from sonosco_mlflow.training.validation import Validation

BEST = "best"
# Of a version: what it is ranked by, and the data that this was measured on.
_SCORE = "sonosco.validation."
_DATA = "sonosco.validation_digest"
_RANKING = ("word_error_rate", "loss")


def register_model(run: TrackedRun, model_id: str, name: str, validation: Validation, data_digest: str) -> None:
    """Make a model a version of the registered model ``name``, and give the alias ``best`` to the best version.

    That is the one with the lowest word error rate in validation, or, without one, the lowest loss, among those that
    were measured on the same data. The version and the run name each other. A run that makes another again adds
    nothing; one that was killed at its end and comes by here again adds nothing twice.

    Args:
        run: the run that trained it.
        model_id: the logged model.
        name: of the registered model; made if need be.
        validation: what it is worth.
        data_digest: of the validation's manifest.
    """
    try:
        _register(run, model_id, name, validation, data_digest)
    except MlflowException as error:
        if is_away(error):
            raise
        # Not everyone may write to a registry, and no number of the run depends on it.
        say(f"the model of run {run.id} is not registered as {name}: {error}")


def _register(run: TrackedRun, model_id: str, name: str, validation: Validation, data_digest: str) -> None:
    client = mlflow.MlflowClient()
    tags = find_run(run.id).data.tags
    ranked = next((f"val_{key}" for key in _RANKING if f"val_{key}" in validation.metrics), None)
    if REPRODUCES in tags or ranked is None:
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    source = f"models:/{model_id}"
    versions = _versions(client, name)
    version = next((known for known in versions if (known.run_id, known.source) == (run.id, source)), None)
    if version is None:
        its_tags = {_SCORE + ranked: repr(validation.metrics[ranked]), _DATA: data_digest}
        if WEIGHTS_DIGEST in tags:
            its_tags[WEIGHTS_DIGEST] = tags[WEIGHTS_DIGEST]
        version = client.create_model_version(name, source, run.id, its_tags, model_id=model_id)
        versions.append(version)
    run.set_tags({MODEL_VERSION: f"{name}/{version.version}"})
    comparable = [known for known in versions if known.tags.get(_DATA) == data_digest and _SCORE + ranked in known.tags]
    best = min(comparable, key=lambda known: (_rank(known.tags[_SCORE + ranked]), int(known.version)))
    client.set_registered_model_alias(name, BEST, str(best.version))


def _rank(score: str) -> float:
    value = float(score)
    return math.inf if math.isnan(value) else value


def _versions(client: mlflow.MlflowClient, name: str) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found
