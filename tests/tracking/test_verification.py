"""A run is read again, and whatever is not as it was recorded is named."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from experiments import go_on, new_project, run_experiment, toy_trainer, vanish
from sonosco_mlflow import overview
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.tracking import origin
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import models_of
from sonosco_mlflow.tracking.tags import (
    CANARY,
    CHECKPOINT,
    CODE_DIGEST,
    COMMIT,
    DIRTY,
    IMPORTED_DIGEST,
    LEDGER_DIGEST,
    WEIGHTS_DIGEST,
)
from sonosco_mlflow.tracking.verification import Verification, verify_run
from sonosco_mlflow.training.callbacks import Callback
from sonosco_mlflow.training.trainer import ModelTrainer

pytestmark = pytest.mark.usefixtures("tracking_store")
LAST = "checkpoints/step-00000012"


class OwnFiles(Callback, is_part_of_trainer=False):
    """What a user logs without a word to us: a metric, an artifact that each process replaces, and a model."""

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        mlflow.log_text(f"at {trainer.progress.step}", "own/note.txt")

    def on_step_end(self, trainer: ModelTrainer) -> None:
        mlflow.log_metric("own", trainer.progress.step, step=trainer.progress.step)

    def on_train_end(self, trainer: ModelTrainer) -> None:
        model = mlflow.initialize_logged_model(name="own")
        mlflow.MlflowClient().log_model_artifact(model.model_id, __file__)


@pytest.fixture(scope="module")
def run_id(tmp_path_factory: pytest.TempPathFactory, tone_manifest: Manifest, tracking_database: str) -> str:
    """A finished run that was interrupted once; its tests leave it as they found it."""
    project = tmp_path_factory.mktemp("kept")
    new_project(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking_database)
        mlflow.set_tracking_uri(None)
        run_id = run_experiment(own_trainer(tone_manifest, stop_at=5), project).run.id
        assert LEDGER_DIGEST in mlflow.get_run(run_id).data.tags
        go_on(run_id, own_trainer(tone_manifest), project)
    return run_id


def own_trainer(manifest: Manifest, stop_at: int | None = None) -> ModelTrainer:
    trainer = toy_trainer(manifest, stop_at=stop_at)
    trainer.attach(OwnFiles())
    return trainer


def root(run_id: str) -> Path:
    return Path(mlflow.get_run(run_id).info.artifact_uri)


@contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    yield
    path.write_bytes(before)


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


def named(run_id: str) -> list[str]:
    return [finding.name for finding in verify_run(run_id).findings]


def test_a_run_that_was_left_alone_is_as_recorded(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_run(run_id)
    assert found.findings == ()
    assert found.has_ledger
    assert found.checkpoints == len(list(root(run_id).glob("checkpoints/*/manifest.json")))
    # The files on the disk, those of the models among them, save the ledger.
    files = [path for path in root(run_id).rglob("*") if path.is_file()]
    models = models_of(run_id)
    own = [path for model in models for path in Path(model.artifact_location).rglob("*") if path.is_file()]
    assert len(own) >= len(models) > 1
    assert found.files == len(files) - 1 + len(own)
    history = mlflow.MlflowClient().get_metric_history
    metrics = [
        name for name in mlflow.get_run(run_id).data.metrics if not name.startswith(("system/", "resume.", "own"))
    ]
    assert found.rows == sum(len(history(run_id, name)) for name in metrics) > 30
    overview.show_verification(found)
    assert capsys.readouterr().out.endswith("all is as recorded\n")


@pytest.mark.parametrize(
    "name",
    [
        *(f"{LAST}/model.safetensors", f"{LAST}/optimizer.safetensors", f"{LAST}/state.json", "journal.jsonl"),
        *("evaluation/learning_curves.png", "own/note.txt", "segments/2/segment.json", "code/command.json"),
    ],
)
def test_a_flipped_bit_and_a_lost_file_are_named(run_id: str, name: str) -> None:
    path = root(run_id) / name
    with replaced(path, flipped(path)):
        (finding, *_) = [finding for finding in verify_run(run_id).findings if finding.name == name]
        assert finding.what.startswith(("altered: sha256", "runs:/", str(path)))
    with replaced(path, None):
        assert f"{name}: missing" in [f"{finding.name}: {finding.what}" for finding in verify_run(run_id).findings]
    assert named(run_id) == []


def test_a_model_is_read_as_well(run_id: str) -> None:
    (model,) = [model for model in models_of(run_id) if "sonosco.checkpoint" not in model.tags]
    path = Path(model.artifact_location) / Path(__file__).name
    with replaced(path, b"other"):
        assert named(run_id) == [f"models:/{model.model_id}/{Path(__file__).name}"]


def test_what_was_added_is_told(run_id: str) -> None:
    path = root(run_id) / "surplus.txt"
    path.write_text("x")
    found = verify_run(run_id)
    path.unlink()
    assert [finding.name for finding in found.findings] == ["surplus.txt"]
    assert "added after the run had ended" in found.findings[0].what


def test_an_altered_code_snapshot_is_seen_in_the_tags_too(run_id: str) -> None:
    path, other = root(run_id) / "segments/2/code/snapshot.zip", b"PK\x05\x06" + bytes(18)
    with replaced(path, other):
        assert named(run_id) == ["segments/2/code/snapshot.zip", CODE_DIGEST, IMPORTED_DIGEST]


def test_an_altered_ledger_is_told(run_id: str) -> None:
    path = root(run_id) / "ledger.json"
    with replaced(path, flipped(path)):
        assert named(run_id) == ["ledger.json"]


@pytest.mark.parametrize(
    ("tag", "other"),
    [
        *((tag, "0" * 64) for tag in (WEIGHTS_DIGEST, IMPORTED_DIGEST, CANARY, COMMIT)),
        *((CHECKPOINT, "checkpoints/step-00000099"), (DIRTY, "false")),
    ],
)
def test_a_tag_that_says_something_else_is_told(run_id: str, tag: str, other: str) -> None:
    client = mlflow.MlflowClient()
    before = mlflow.get_run(run_id).data.tags[tag]
    client.set_tag(run_id, tag, other)
    found = named(run_id)
    client.set_tag(run_id, tag, before)
    assert found == [tag]


def test_a_finished_run_that_has_lost_its_ledger_is_told(run_id: str) -> None:
    client = mlflow.MlflowClient()
    before = mlflow.get_run(run_id).data.tags[LEDGER_DIGEST]
    client.delete_tag(run_id, LEDGER_DIGEST)
    found = verify_run(run_id)
    client.set_tag(run_id, LEDGER_DIGEST, before)
    assert not found.has_ledger
    assert [finding.name for finding in found.findings] == [LEDGER_DIGEST]
    assert named(run_id) == []


def test_the_parameters_are_those_of_the_recipe(
    run_id: str, tone_manifest: Manifest, tmp_path: Path, tracking_database: str
) -> None:
    first = run_experiment(toy_trainer(tone_manifest), new_project(tmp_path)).run.id
    query = "UPDATE params SET value = ? WHERE key = 'config.size' AND run_uuid = ?"
    for altered in (run_id, first):
        with sqlite3.connect(tracking_database.removeprefix("sqlite:///")) as database:
            database.execute(query, ["99", altered])
            database.commit()
            found = verify_run(altered).findings
            database.execute(query, ["1", altered])
        assert [(finding.name, finding.what) for finding in found] == [("parameter config.size", "is '99', was '1'")]
        assert named(altered) == []


def test_what_another_program_has_imported_is_forgotten_with_it(
    tone_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = new_project(tmp_path)
    stopped = run_experiment(toy_trainer(tone_manifest, stop_at=5), project).run.id
    assert IMPORTED_DIGEST in mlflow.get_run(stopped).data.tags
    take = origin.snapshot_code
    monkeypatch.setattr(origin, "snapshot_code", lambda folder: replace(take(folder), imported_digest=""))
    go_on(stopped, toy_trainer(tone_manifest), project)
    assert IMPORTED_DIGEST not in mlflow.get_run(stopped).data.tags


def test_a_metric_that_was_altered_removed_or_added_is_named(run_id: str, tracking_database: str) -> None:
    key = "key = 'train_loss' AND step = 7 AND run_uuid = ?"
    with sqlite3.connect(tracking_database.removeprefix("sqlite:///")) as database:
        ((value,),) = database.execute(f"SELECT value FROM metrics WHERE {key}", [run_id])
        for change, what in (
            (f"UPDATE metrics SET value = value * (1 + 2e-16) WHERE {key}", f"was {value!r}"),
            (f"UPDATE metrics SET step = 70 WHERE {key}", "missing, though the journal has it"),
        ):
            database.execute("SAVEPOINT before")
            database.execute(change, [run_id])
            database.commit()
            found = verify_run(run_id).findings
            database.execute(
                "UPDATE metrics SET value = ?, step = 7 WHERE key = 'train_loss' AND step IN (7, 70) AND run_uuid = ?",
                [value, run_id],
            )
            database.commit()
            assert found[0].name == "metric train_loss at step 7"
            assert what in found[0].what
    assert [finding.name for finding in found[1:]] == ["metric train_loss at step 70", "metric train_loss"]
    assert named(run_id) == []


def test_a_second_row_of_a_step_is_named_whenever_it_was_written(run_id: str, tracking_database: str) -> None:
    client = mlflow.MlflowClient()
    row = next(item for item in client.get_metric_history(run_id, "train_loss") if item.step == 7)
    for delay in (-1000, 1000):
        client.log_metric(run_id, "train_loss", row.value / 2, step=7, timestamp=row.timestamp + delay)
        found = verify_run(run_id).findings
        with sqlite3.connect(tracking_database.removeprefix("sqlite:///")) as database:
            database.execute(
                "DELETE FROM metrics WHERE timestamp = ? AND run_uuid = ?", [row.timestamp + delay, run_id]
            )
        assert [(finding.name, finding.what) for finding in found] == [
            ("metric train_loss at step 7", f"is {row.value / 2!r}, was {row.value!r}")
        ]
    assert named(run_id) == []


def test_what_lists_of_runs_show_is_the_last_row(run_id: str, tracking_database: str) -> None:
    before = mlflow.get_run(run_id).data.metrics["test_word_error_rate"]
    query = "UPDATE latest_metrics SET value = ? WHERE key = 'test_word_error_rate' AND run_uuid = ?"
    with sqlite3.connect(tracking_database.removeprefix("sqlite:///")) as database:
        database.execute(query, [0.001, run_id])
        database.commit()
        found = verify_run(run_id).findings
        database.execute(query, [before, run_id])
    assert [(finding.name, finding.what) for finding in found] == [
        ("metric test_word_error_rate", f"is shown as 0.001, its last row is {before!r}")
    ]


def test_a_run_that_was_cut_off_is_compared_as_far_as_it_goes(tone_manifest: Manifest, tmp_path: Path) -> None:
    project = new_project(tmp_path)
    experiment = Experiment.create({"size": 1}, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    run_id = experiment.run.id
    with pytest.raises(UserError, match="is running: it can be verified when it has ended"):
        verify_run(run_id)
    trainer.start_training()
    experiment.opened.recording.finish(10)
    vanish(experiment)
    assert is_clean(verify_run(run_id))
    path = root(run_id) / LAST / "state.json"
    with replaced(path, flipped(path)):
        assert named(run_id) == [f"{LAST}/state.json"]
    go_on(run_id, toy_trainer(tone_manifest), project)
    assert verify_run(run_id).has_ledger
    assert named(run_id) == []


def test_a_ledger_holds_no_longer_than_until_the_run_goes_on(tone_manifest: Manifest, tmp_path: Path) -> None:
    project = new_project(tmp_path)
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=5), project).run.id
    assert verify_run(run_id).has_ledger
    experiment = Experiment.resume(run_id, project=project)
    trainer = toy_trainer(tone_manifest)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    vanish(experiment)
    # What this process wrote stands in no ledger, and is no damage.
    assert verify_run(run_id) == replace(verify_run(run_id), has_ledger=False, findings=())


def test_a_finished_run_that_goes_on_has_no_final_weights_until_it_ends_again(
    tone_manifest: Manifest, tmp_path: Path
) -> None:
    project = new_project(tmp_path)
    run_id = run_experiment(toy_trainer(tone_manifest), project).run.id
    go_on(run_id, toy_trainer(tone_manifest, epochs=3, stop_at=14), project)
    assert WEIGHTS_DIGEST not in mlflow.get_run(run_id).data.tags
    assert named(run_id) == []


def test_an_end_whose_checkpoint_was_broken_is_no_damage_to_a_run_that_has_gone_on(
    tone_manifest: Manifest, tmp_path: Path
) -> None:
    project = new_project(tmp_path)
    experiment = run_experiment(toy_trainer(tone_manifest), project)
    run_id = experiment.run.id
    for path in (root(run_id) / LAST / "model.safetensors", experiment.folder / LAST / "model.safetensors"):
        path.write_bytes(flipped(path))
    with pytest.warns(UserWarning, match="step-00000012"):
        go_on(run_id, toy_trainer(tone_manifest, epochs=3), project)
    record = root(run_id) / "segments" / "2" / "segment.json"
    assert '"checkpoint": "step-00000008"' in record.read_text()
    assert named(run_id) == []


def is_clean(found: Verification) -> bool:
    return not found.has_ledger and found.findings == () and found.checkpoints > 0


def test_a_run_of_another_kind_has_a_ledger_too(tmp_path: Path) -> None:
    with TrackedRun.open("Default", "data") as run:
        run.log_text("x", "data/lineage.json")
    assert named(run.id) == []
    (root(run.id) / "data" / "lineage.json").write_text("y")
    assert named(run.id) == ["data/lineage.json"]
