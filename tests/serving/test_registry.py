"""Models of finished runs are versions of one registered model, and its best version has an alias."""

from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from sonosco_mlflow.serving.registry import BEST, register_model
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.training.validation import Validation


@pytest.fixture
def client(tracking_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient()


def add(
    client: mlflow.MlflowClient, name: str, rate: float, *, data: str = "d1", metric: str = "val_word_error_rate"
) -> tuple[TrackedRun, str]:
    """Register the model of a new run; return the run and the id of its model."""
    with TrackedRun.open("Default", "train") as run:
        run.set_tags({"sonosco.weights_digest": "w" * 64})
        model = client.create_logged_model(run.experiment_id, "model", run.id)
        client.finalize_logged_model(model.model_id, "READY")
        register_model(run, model.model_id, name, Validation({metric: rate}, [], [], []), data)
    return run, model.model_id


def best(client: mlflow.MlflowClient, name: str) -> str:
    return str(client.get_model_version_by_alias(name, BEST).version)


def test_best_moves_to_the_lowest_error_rate(client: mlflow.MlflowClient) -> None:
    moves = []
    for rate in (0.5, 0.6, 0.4, 0.4, float("nan")):
        add(client, "moving", rate)
        moves.append(best(client, "moving"))
    # Of equals the earlier stays.
    assert moves == ["1", "1", "3", "3", "3"]


def test_only_what_was_measured_on_the_same_data_by_the_same_metric_is_compared(client: mlflow.MlflowClient) -> None:
    add(client, "other data", 0.1)
    add(client, "other data", 0.3, data="d2")
    assert best(client, "other data") == "2"
    add(client, "other data", 0.01, data="d2", metric="val_loss")
    assert best(client, "other data") == "3"
    add(client, "other data", 0.2, data="d2")
    assert best(client, "other data") == "4"


def test_the_version_and_the_run_name_each_other(client: mlflow.MlflowClient) -> None:
    run, model_id = add(client, "linked", 0.5)
    version = client.get_model_version("linked", "1")
    assert (version.run_id, version.source) == (run.id, f"models:/{model_id}")
    assert version.tags["sonosco.weights_digest"] == "w" * 64
    assert client.get_run(run.id).data.tags["sonosco.model_version"] == "linked/1"


def test_an_end_that_is_repeated_adds_nothing_and_neither_does_a_reproduction(client: mlflow.MlflowClient) -> None:
    run, model_id = add(client, "repeated", 0.5)
    validation = Validation({"val_word_error_rate": 0.5}, [], [], [])
    register_model(run, model_id, "repeated", validation, "d1")
    run.set_tags({"sonosco.reproduces": "another"})
    register_model(run, "m-another", "repeated", validation, "d1")
    assert len(client.search_model_versions("name = 'repeated'")) == 1


def test_what_was_not_validated_is_not_ranked(client: mlflow.MlflowClient) -> None:
    add(client, "unmeasured", 0.5, metric="val_other")
    assert not client.search_registered_models("name = 'unmeasured'")


def test_a_registry_that_refuses_fails_no_run(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("not for you", PERMISSION_DENIED)

    monkeypatch.setattr(mlflow.MlflowClient, "create_registered_model", refuse)
    run, _ = add(client, "refused", 0.5)
    assert client.get_run(run.id).info.status == "FINISHED"
    assert f"the model of run {run.id} is not registered as refused: not for you" in capsys.readouterr().err
