"""How a run ends that is stopped, taken over, or whose tracking store does not answer."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore

from experiments import SETTINGS, Interrupt, all_artifacts, go_on, new_project, rows, run_experiment, toy_trainer, train
from sonosco_mlflow import background, determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.console import console_log
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.models import build_model
from sonosco_mlflow.serialization.checkpoint import checkpoints_in, read_checkpoint
from sonosco_mlflow.tracking import open_run
from sonosco_mlflow.tracking.checkpoints import upload_checkpoint
from sonosco_mlflow.tracking.journal import Journal, Row, read_rows
from sonosco_mlflow.tracking.lease import VANISHED, Lease, condition
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.open_run import OpenRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.resumption import find_unfinished
from sonosco_mlflow.tracking.store import download, find_run, models_of
from sonosco_mlflow.tracking.tags import HEARTBEAT, OWNER
from sonosco_mlflow.tracking.verification import verify_run
from sonosco_mlflow.training.callbacks import Callback, ModelCheckpoint
from sonosco_mlflow.training.interruption import LeaveAtOnce, Terminated
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import TOKENIZER, tone_loader

pytestmark = pytest.mark.usefixtures("tracking_store")
LONGEST_WAIT = 30.0  # only a test that fails waits so long


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return new_project(tmp_path / "project")


@pytest.fixture
def stopping(tone_manifest: Manifest, project: Path) -> Experiment:
    """A run that was interrupted at step 5 and has not been stopped yet."""
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest, stop_at=5)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    with pytest.raises(KeyboardInterrupt):
        experiment.start()
    return experiment


def status(experiment: Experiment) -> tuple[str, str]:
    run = mlflow.get_run(experiment.run.id)
    return run.info.status, run.data.tags["sonosco.state"]


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + LONGEST_WAIT
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


def finish(run_id: str, manifest: Manifest, project: Path, **options: Any) -> list[tuple[int, int]]:
    """Let a run go on to its end and return the positions in its journal, of which none may be missing or doubled."""
    again = go_on(run_id, toy_trainer(manifest), project, **options)
    assert status(again) == ("FINISHED", "finished")
    written = [(row.step, name) for row in read_rows(again.folder / "journal.jsonl") for name in row.metrics]
    assert len(written) == len({*written})
    assert {(name, step) for step, name in written} == {*rows(run_id)}
    assert [step for step, name in written if name == "train_loss"] == list(range(1, 13))
    return [(row.micro_step, row.step) for row in read_rows(again.folder / "journal.jsonl")]


# ------------------------------------------------------------------ a store that hangs


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store hangs from when this is called until the event is set that it returns."""
    answers = threading.Event()
    look = Lease._look

    def hang(self: Lease) -> None:
        assert answers.wait(LONGEST_WAIT)
        look(self)

    def begin() -> threading.Event:
        monkeypatch.setattr(Lease, "_look", hang)
        monkeypatch.setattr(open_run, "LONGEST_STOP", 0.3)
        monkeypatch.setattr(open_run, "PATIENCE_AT_LEAVE", 0.3)
        return answers

    yield begin
    answers.set()


def test_a_store_that_hangs_does_not_hold_up_a_run_that_is_told_to_stop(
    stopping: Experiment,
    tone_manifest: Manifest,
    project: Path,
    hanging: Callable[[], threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = hanging()
    told = Mock()
    monkeypatch.setattr(open_run, "say", told)
    began = time.monotonic()
    stopping.stop()
    assert time.monotonic() - began < LONGEST_WAIT / 2
    assert "is left as it is, and can be continued: no answer" in told.call_args.args[0]
    assert mlflow.active_run() is None
    assert status(stopping) == ("RUNNING", "running")
    # The process lives, and the store is back.
    answers.set()
    wait_for(lambda: status(stopping) == ("KILLED", "interrupted"))
    wait_for(lambda: mlflow.get_run(stopping.run.id).data.tags[OWNER] == "")
    finish(stopping.run.id, tone_manifest, project)


def test_a_second_interrupt_waits_for_no_store(
    stopping: Experiment, tone_manifest: Manifest, project: Path, hanging: Callable[[], threading.Event]
) -> None:
    answers = hanging()

    def interrupt(patience: float | None = None) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    stopping.opened.recording.background.settle = interrupt  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(LeaveAtOnce):
        stopping.stop()
    assert time.monotonic() - began < LONGEST_WAIT / 2
    assert mlflow.active_run() is None
    answers.set()
    wait_for(lambda: mlflow.get_run(stopping.run.id).data.tags[OWNER] == "")
    assert status(stopping) == ("KILLED", "interrupted")
    finish(stopping.run.id, tone_manifest, project)


def test_an_interrupt_as_the_store_is_told_leaves_no_run_that_is_called_finished_later(
    stopping: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = TrackedRun.end

    def interrupted(self: TrackedRun, state: str, message: str = "") -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        end(self, state, message)

    monkeypatch.setattr(TrackedRun, "end", interrupted)
    with pytest.raises(LeaveAtOnce):
        stopping.stop()
    assert mlflow.active_run() is None
    assert status(stopping) == ("KILLED", "interrupted")


# ------------------------------------------------------------------ a store that is away for a moment, in the very end


class Outages:
    """Each call to the store is refused once, and is answered once by nothing though it was obeyed; while armed."""

    CALLS: ClassVar[Mapping[type, tuple[str, ...]]] = {
        TrackingStore: (
            *("get_run", "set_tag", "log_batch", "update_run_info", "log_outputs", "search_logged_models"),
            *("create_logged_model", "finalize_logged_model", "delete_logged_model", "set_logged_model_tags"),
        ),
        RegistryStore: (
            *("create_registered_model", "create_model_version", "search_model_versions"),
            *("set_registered_model_alias", "get_registered_model"),
        ),
        LocalArtifactRepository: ("log_artifact", "log_artifacts", "list_artifacts", "delete_artifacts"),
    }

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.armed = False
        self.counts: dict[tuple[str, str], int] = {}
        self._inside = threading.local()
        for owner, names in self.CALLS.items():
            for name in names:
                patch.setattr(owner, name, self._interrupted(name, getattr(owner, name)))

    def _interrupted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*arguments: Any, **options: Any) -> Any:
            if not self.armed or getattr(self._inside, "call", False):
                return call(*arguments, **options)
            # Of a tag its key, of a file its name: others of these are other calls.
            what = [getattr(item, "key", "") for item in arguments] if name == "set_tag" else []
            what += [Path(arguments[1]).name] if name == "log_artifact" else []
            key = (name, "".join(what))
            self.counts[key] = number = self.counts.get(key, 0) + 1
            refused = MlflowException("API request to http://127.0.0.1:1/api failed with exception refused")
            if number == 1:
                raise refused
            self._inside.call = True
            try:
                answer = call(*arguments, **options)
            finally:
                self._inside.call = False
            if number == 2:
                raise refused
            return answer

        return interrupted


def test_a_store_that_is_away_for_a_moment_fails_no_run_that_is_complete(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(background, "LONGEST_PAUSE", 0.002)
    # Drawn again at each further try; they take most of the time, and ask no store.
    for picture in ("learning_curves", "mel_spectrogram", "alignment_picture"):
        monkeypatch.setattr(f"sonosco_mlflow.reporting.{picture}", lambda *arguments: b"a picture")
    outages = Outages(monkeypatch)
    finish_training = Experiment._finish

    def arm(self: Experiment, trainer: ModelTrainer) -> None:
        outages.armed = True
        finish_training(self, trainer)

    def trainer(*observers: Callback) -> ModelTrainer:
        torch.manual_seed(0)
        settings = {"channels": [2], "blocks": [1], "decoder_size": 16, "kernel": 3, "strides": [2]}
        model = build_model("tds", "small", n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, settings=settings)
        loader = tone_loader(tone_manifest, seed=None)
        made = ModelTrainer(model, train_loader=tone_loader(tone_manifest), val_loader=loader, epochs=1)
        for observer in observers:
            made.attach(observer)
        return made

    def run(experiment: Experiment, trainer: ModelTrainer) -> None:
        experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader, registered_model="interrupted")
        experiment.start()

    first = Experiment.create(SETTINGS, project=project, name="toy")
    with pytest.raises(KeyboardInterrupt):
        run(first, trainer(Interrupt(2)))
    first.stop()
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_finish", arm)
        again = Experiment.resume(first.run.id, project=project)
        run(again, trainer())
    outages.armed = False
    interrupted = {name for name, _ in outages.counts}
    assert interrupted >= {"set_tag", "log_batch", "update_run_info", "log_outputs", "create_logged_model"}
    assert interrupted >= {"log_artifact", "log_artifacts", "create_model_version", "set_registered_model_alias"}
    assert ("log_artifact", "ledger.json") in outages.counts
    assert ("set_tag", "sonosco.state") in outages.counts
    assert status(again) == ("FINISHED", "finished")
    client = mlflow.MlflowClient()
    found = client.get_run(first.run.id)
    histories = [client.get_metric_history(first.run.id, name) for name in found.data.metrics if "system/" not in name]
    positions = [(item.key, item.step) for history in histories for item in history]
    assert len(positions) == len({*positions})
    assert "resume.verified_steps" in found.data.metrics
    (model,) = (model for model in models_of(first.run.id) if model.name == "model")
    (version,) = client.search_model_versions("name = 'interrupted'")
    assert (version.run_id, version.source) == (first.run.id, f"models:/{model.model_id}")
    assert "sonosco.ledger_digest" in found.data.tags
    assert verify_run(first.run.id).findings == ()


# ------------------------------------------------------------------ a run that is another's, or nobody's


def test_a_former_holder_whose_store_comes_back_as_it_closes_leaves_the_run_alone(
    stopping: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping.opened.recording.background.finish(LONGEST_WAIT)
    look, calls = Lease._look, [0]

    def away_at_first(self: Lease) -> None:
        calls[0] += 1
        if calls[0] == 1:
            mlflow.MlflowClient().set_tag(self.run_id, OWNER, "another")
            raise ConnectionError("the server is away")
        look(self)

    monkeypatch.setattr(Lease, "_look", away_at_first)
    monkeypatch.setattr("sonosco_mlflow.training.callbacks.model_checkpoint.ModelCheckpoint.save", Mock())
    before = all_artifacts(stopping.run.id), rows(stopping.run.id)
    stopping.stop()
    assert calls[0] > 1
    assert (all_artifacts(stopping.run.id), rows(stopping.run.id)) == before
    assert status(stopping) == ("RUNNING", "running")
    assert mlflow.get_run(stopping.run.id).data.tags[OWNER] == "another"


def test_a_run_that_could_not_be_told_its_end_has_vanished_for_everyone(
    stopping: Experiment, tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TrackedRun, "end", Mock(side_effect=ConnectionError("the server is away")))
        stopping.stop()
    assert mlflow.active_run() is None
    for host in (None, "another machine"):
        assert condition(find_run(stopping.run.id), host=host) == VANISHED
    finish(stopping.run.id, tone_manifest, project)


# ------------------------------------------------------------------ as it is made, and as it is opened again


def test_a_run_whose_console_log_cannot_be_made_is_failed_and_let_go(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {run.info.run_id for run in mlflow.search_runs(["0"], output_format="list")}
    monkeypatch.setattr(OpenRun, "__init__", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Experiment.create(SETTINGS, project=project, name="toy")
    (made,) = (run for run in mlflow.search_runs(["0"], output_format="list") if run.info.run_id not in before)
    assert (made.info.status, made.data.tags["sonosco.state"]) == ("FAILED", "failed")
    assert mlflow.active_run() is None
    Lease.take(made.info.run_id).release()


def test_a_run_that_was_killed_before_it_kept_its_recipe_is_not_one_to_go_on_with(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"size": "of this test"}
    determinism.configure(1)
    origin = Origin.take(settings, project)
    with monkeypatch.context() as patch:
        patch.setattr(Origin, "log_recipe", Mock(side_effect=ConnectionError("the server is away")))
        with pytest.raises(ConnectionError):
            Experiment.create(settings, project=project, name="toy")
    assert find_unfinished("Default", origin, "") is None
    experiment = Experiment.create(settings, project=project, name="toy")
    assert find_unfinished("Default", origin, "") == experiment.run.id
    experiment.opened.close("interrupted")


def test_the_run_to_go_on_with_is_found_by_what_decides(project: Path) -> None:
    def found(**overrides: str) -> str | None:
        config = Config.resolve({}, {"training.seed": "77", **overrides})
        return find_unfinished("Default", Origin.take(config, project), "")

    experiment = Experiment.create(Config.resolve({}, {"training.seed": "77"}), project=project, name="toy")
    experiment.opened.close("interrupted")
    (project / "model.py").touch()
    for command in (["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=project, check=True)
    assert found() == experiment.run.id
    assert found(**{"data.workers": "2", "checkpoint.keep_last": "5", "tracking.run_name": "x"}) == experiment.run.id
    assert found(**{"optimizer.lr": "0.5"}) is None
    # The same bits on the way, but another end.
    assert found(**{"training.epochs": "11"}) is None
    (project / "model.py").write_text("x = 2\n")
    assert found() is None
    (project / "model.py").write_text("x = 1\n")
    assert found() == experiment.run.id
    # One that has lost its recipe cannot go on, and keeps no other from beginning.
    experiment.run.delete_artifact("config")
    assert found() is None


@pytest.mark.parametrize("step", [(TrackedRun, "reopen"), (TrackedRun, "open_ledger")])
def test_a_run_that_could_not_be_opened_again_is_let_go(
    stopping: Experiment,
    tone_manifest: Manifest,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[type, str],
) -> None:
    stopping.stop()
    with monkeypatch.context() as patch:
        patch.setattr(*step, Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            go_on(stopping.run.id, toy_trainer(tone_manifest), project)
    assert mlflow.active_run() is None
    finish(stopping.run.id, tone_manifest, project)


# ------------------------------------------------------------------ what is kept, of which way


def test_a_resume_that_fails_before_it_knows_the_journal_does_not_put_an_older_one_in_its_place(
    tone_manifest: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    shutil.copytree(first.folder, tmp_path / "this machine")
    go_on(first.run.id, toy_trainer(tone_manifest, stop_at=9), project)
    shutil.rmtree(first.folder)
    shutil.copytree(tmp_path / "this machine", first.folder)
    kept = download(first.run.id, "journal.jsonl", tmp_path / "before").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "resume", Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            go_on(first.run.id, toy_trainer(tone_manifest), project)
    assert download(first.run.id, "journal.jsonl", tmp_path / "after").read_bytes() == kept
    finish(first.run.id, tone_manifest, project)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "lacks gradient_norm at step 1$"),
    "a step short": (
        lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1])),
        "lacks gradient_norm at step 5$",
    ),
    "torn in its middle": (
        lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"st', 1)),
        r":\d: not a row of a journal",
    ),
}


def only_here(stopped: Experiment) -> Path:
    """Leave the last checkpoint to this machine, as where the tracking server was away; return its journal here."""
    artifacts = Path(find_run(stopped.run.id).info.artifact_uri.removeprefix("file://"))
    shutil.rmtree(artifacts / "checkpoints" / "step-00000005")
    (artifacts / "journal.jsonl").unlink()
    return stopped.folder / "journal.jsonl"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_does_not_go_on_without_the_journal_of_its_checkpoint(
    tone_manifest: Manifest, project: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    journal = only_here(first)
    whole = journal.read_bytes()
    harm, message = DAMAGES[damage]
    harm(journal)
    before = mlflow.get_run(first.run.id).info, all_artifacts(first.run.id)
    with monkeypatch.context() as patch:
        patch.setattr("sonosco_mlflow.tracking.resumption.metric_records", lambda run_id: {})
        with pytest.raises(UserError, match=rf"(?m)cannot go on from step-00000005[^$]*{message}") as raised:
            go_on(first.run.id, toy_trainer(tone_manifest), project)
    assert f"move {first.folder / 'checkpoints' / 'step-00000005'} elsewhere" in str(raised.value)
    assert mlflow.get_run(first.run.id).info.status == before[0].status
    assert all_artifacts(first.run.id) == before[1]
    journal.write_bytes(whole)
    finish(first.run.id, tone_manifest, project)


@pytest.mark.parametrize("tail", [b"\0" * 400 + b"\n", b"\0" * 400, b'{"micro\n'], ids=["zeros", "zeros alone", "torn"])
def test_what_a_crash_left_behind_the_rows_of_the_checkpoint_is_no_damage(
    tone_manifest: Manifest, project: Path, tail: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    journal = only_here(first)
    # The length of a file may be on the disk, and the end of it, and not what lies between.
    journal.write_bytes(journal.read_bytes() + tail + Row(7, 7, 8, {"train_loss": 9.0}).line())
    monkeypatch.setattr("sonosco_mlflow.tracking.resumption.metric_records", lambda run_id: {})
    finish(first.run.id, tone_manifest, project)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_journal_that_is_lost_everywhere_is_made_of_the_metrics_in_mlflow(
    stopping: Experiment, tone_manifest: Manifest, project: Path, damage: str
) -> None:
    stopping.stop()
    stored = Path(find_run(stopping.run.id).info.artifact_uri.removeprefix("file://")) / "journal.jsonl"
    for path in (stored, stopping.folder / "journal.jsonl"):
        DAMAGES[damage][0](path)
    with pytest.warns(UserWarning, match="the journal is taken from the metrics in MLflow: "):
        finish(stopping.run.id, tone_manifest, project)


def test_a_damaged_journal_in_mlflow_is_replaced_by_the_whole_one_of_this_machine(
    stopping: Experiment, tone_manifest: Manifest, project: Path
) -> None:
    stopping.stop()
    stored = Path(find_run(stopping.run.id).info.artifact_uri.removeprefix("file://")) / "journal.jsonl"
    stored.write_bytes(b"".join(stored.read_bytes().splitlines(True)[:2]))
    with pytest.warns(UserWarning, match=r"the journal is taken from .*journal\.jsonl: runs:/"):
        finish(stopping.run.id, tone_manifest, project)
    assert stored.read_bytes() == (stopping.folder / "journal.jsonl").read_bytes()


def test_checkpoints_of_a_way_that_was_left_do_not_replace_those_of_the_run(
    tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=9), project)
    here, elsewhere = first.folder / "checkpoints", tmp_path / "way that was left"
    shutil.copytree(here, elsewhere)
    # Only this machine had what came after step 4; the run went on from there elsewhere, with other code.
    artifacts = Path(find_run(first.run.id).info.artifact_uri.removeprefix("file://")) / "checkpoints"
    for folder in (here, artifacts):
        for path in folder.glob("step-*"):
            if path.name > "step-00000004":
                shutil.rmtree(path)
    (project / "model.py").write_text("x = 2\n")
    go_on(first.run.id, toy_trainer(tone_manifest, stop_at=10), project, allowed_changes=["code"])
    assert read_checkpoint(artifacts / "step-00000008").digests["branch"] == "2"
    for path in elsewhere.glob("step-*"):
        shutil.rmtree(here / path.name, ignore_errors=True)
        shutil.copytree(path, here / path.name)
    again = Experiment.resume(first.run.id, project=project)
    trainer = toy_trainer(tone_manifest)
    with pytest.warns(UserWarning, match="of a way that the run has left"):
        again.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    again.opened.recording.background.finish(LONGEST_WAIT)
    assert read_checkpoint(artifacts / "step-00000008").digests["branch"] == "2"
    assert [path.name for path in checkpoints_in(here) if path.name in ("step-00000008", "step-00000009")] == []
    again.opened.close("interrupted")


def test_a_store_that_refuses_rows_keeps_no_state_from_the_disk(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits(Callback, is_part_of_trainer=False):
        def on_step_end(self, trainer: ModelTrainer) -> None:
            time.sleep(0.05)

    monkeypatch.setattr("sonosco_mlflow.tracking.journal.SECONDS_BETWEEN_BATCHES", 0.2)
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Waits())
    with monkeypatch.context() as patch:
        patch.setattr(TrackedRun, "log_rows", Mock(side_effect=ValueError("over quota")))
        with pytest.raises(ValueError, match="over quota"):
            train(experiment, trainer)
    assert status(experiment) == ("FAILED", "failed")
    assert 0 < trainer.progress.step < 12
    newest = checkpoints_in(experiment.folder / "checkpoints")[-1]
    assert newest.name == f"step-{trainer.progress.step:08d}"
    finish(experiment.run.id, tone_manifest, project)


# ------------------------------------------------------------------ what a trainer knows that no journal has


class AtEnd(Callback):
    def on_train_end(self, trainer: ModelTrainer) -> None:
        trainer.record({"final_gap": 1.0})


def test_a_trainer_that_has_trained_before_begins_a_run_that_can_go_on(tone_manifest: Manifest, project: Path) -> None:
    trainer = toy_trainer(tone_manifest, epochs=1)
    run_experiment(trainer, project)
    trainer.epochs = 3
    trainer.attach(Interrupt(9))
    second = run_experiment(trainer, project)
    assert mlflow.get_run(second.run.id).data.tags["sonosco.first_step"] == "6"
    again = go_on(second.run.id, toy_trainer(tone_manifest, epochs=3), project)
    assert status(again) == ("FINISHED", "finished")


def test_what_is_recorded_as_training_ends_keeps_no_longer_run_from_going_on(
    tone_manifest: Manifest, project: Path
) -> None:
    def trainer(epochs: int, **options: Any) -> ModelTrainer:
        made = toy_trainer(tone_manifest, AtEnd(), epochs=epochs, **options)
        made.callbacks[-1] = ModelCheckpoint(every_steps=5, every_epochs=None, keep_best=0)
        return made

    first = run_experiment(trainer(2), project)
    go_on(first.run.id, trainer(4, stop_at=17), project)
    assert status(go_on(first.run.id, trainer(4), project)) == ("FINISHED", "finished")


def test_a_trainer_that_goes_on_without_its_run_leaves_the_run_alone(tone_manifest: Manifest, project: Path) -> None:
    trainer = toy_trainer(tone_manifest)
    first = run_experiment(trainer, project)
    before = sorted(path.name for path in (first.folder / "checkpoints").iterdir())
    trainer.epochs = 3
    with pytest.warns(UserWarning, match="nothing is saved"):
        trainer.continue_training()
    assert sorted(path.name for path in (first.folder / "checkpoints").iterdir()) == before


# ------------------------------------------------------------------ what else may fail as it ends


def test_a_full_disk_under_the_console_log_hides_no_error_and_keeps_no_run_open(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_run, "console_log", lambda path, clean: console_log(Path("/dev/full"), clean))
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Raises(ValueError("the real reason")))
    experiment.setup_model_trainer(trainer)
    print("a line")
    with pytest.raises(ValueError, match="the real reason"):
        experiment.start()
    assert status(experiment) == ("FAILED", "failed")
    assert mlflow.get_run(experiment.run.id).data.tags[OWNER] == ""


def test_a_reader_that_has_gone_away_keeps_no_run_open(stopping: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(stopping.run), "log_file", Mock(side_effect=OSError("No space left on device")))
    monkeypatch.setattr("sonosco_mlflow.console.print", Mock(side_effect=BrokenPipeError), raising=False)
    stopping.stop()
    assert status(stopping) == ("KILLED", "interrupted")


def test_closing_again_waits_for_the_one_that_closes_and_takes_nothing_from_it(
    stopping: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    settle = stopping.opened.recording.background.settle

    def slowly(patience: float | None = None) -> None:
        begun.set()
        assert may_end.wait(LONGEST_WAIT)
        settle(patience)

    monkeypatch.setattr(stopping.opened.recording.background, "settle", slowly)
    stops = [threading.Thread(target=stopping.stop) for _ in range(2)]
    stops[0].start()
    assert begun.wait(LONGEST_WAIT)
    stops[1].start()
    stops[1].join(0.2)
    assert stops[1].is_alive()
    may_end.set()
    for thread in stops:
        thread.join(LONGEST_WAIT)
    assert status(stopping) == ("KILLED", "interrupted")


def test_a_block_whose_store_hangs_is_left_after_one_patience(
    tone_manifest: Manifest, project: Path, hanging: Callable[[], threading.Event]
) -> None:
    trainer = toy_trainer(tone_manifest)
    answers: list[threading.Event] = []
    trainer.attach(Does(3, lambda: answers.append(hanging())))
    trainer.attach(Does(3, lambda: Raises(ValueError("mine")).on_step_end(trainer)))
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    experiment.setup_model_trainer(trainer)
    began = time.monotonic()
    with pytest.raises(ValueError, match="mine"), experiment:
        experiment.start()
    assert time.monotonic() - began < LONGEST_WAIT / 2
    answers[0].set()
    wait_for(lambda: status(experiment) == ("FAILED", "failed"))
    wait_for(lambda: mlflow.get_run(experiment.run.id).data.tags[OWNER] == "")


def test_what_still_uploads_after_a_run_was_left_deletes_nothing_and_keeps_the_run(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, may_go_on = threading.Event(), threading.Event()
    log_file = TrackedRun.log_file

    def slowly(self: TrackedRun, path: Path, folder: str = "") -> None:
        if folder == "checkpoints/step-00000004" and not uploads.is_set():
            uploads.set()
            assert may_go_on.wait(LONGEST_WAIT)
        log_file(self, path, folder)

    monkeypatch.setattr(TrackedRun, "log_file", slowly)
    monkeypatch.setattr(open_run, "PATIENCE_AT_LEAVE", 0.3)
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Does(5, lambda: uploads.wait(LONGEST_WAIT)))
    trainer.attach(Interrupt(5, times=2))
    left = run_experiment(trainer, project)
    assert status(left) == ("KILLED", "interrupted")
    with pytest.raises(UserError, match="is being trained by"):
        Experiment.resume(left.run.id, project=project)
    may_go_on.set()
    wait_for(lambda: mlflow.get_run(left.run.id).data.tags[OWNER] == "")
    finish(left.run.id, tone_manifest, project)


def test_what_still_concludes_after_a_run_was_left_keeps_the_run(
    stopping: Experiment, tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    log_file = TrackedRun.log_file

    def slowly(self: TrackedRun, path: Path, folder: str = "") -> None:
        if folder == "logs" and not may_go_on.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert may_go_on.wait(LONGEST_WAIT)
        log_file(self, path, folder)

    monkeypatch.setattr(TrackedRun, "log_file", slowly)
    monkeypatch.setattr(open_run, "PATIENCE_AT_LEAVE", 0.3)
    with pytest.raises(LeaveAtOnce):
        stopping.stop()
    with pytest.raises(UserError, match="is being trained by"):
        Experiment.resume(stopping.run.id, project=project)
    may_go_on.set()
    wait_for(lambda: mlflow.get_run(stopping.run.id).data.tags[OWNER] == "")
    finish(stopping.run.id, tone_manifest, project)


def test_an_upload_that_was_overtaken_moves_no_tag_and_deletes_nothing(
    stopping: Experiment, tone_manifest: Manifest
) -> None:
    stopping.opened.recording.background.finish(LONGEST_WAIT)
    newest = checkpoints_in(stopping.folder / "checkpoints")[-1]
    before = all_artifacts(stopping.run.id), mlflow.get_run(stopping.run.id).data.tags["sonosco.checkpoint"]
    with pytest.raises(UserError, match="taken over"):
        upload_checkpoint(stopping.run, newest, frozenset(), Mock(side_effect=UserError("it was taken over")))
    assert before == (all_artifacts(stopping.run.id), mlflow.get_run(stopping.run.id).data.tags["sonosco.checkpoint"])
    stopping.stop()


def test_a_process_that_ends_without_a_word_has_not_finished_its_run(tracking_store: str, project: Path) -> None:
    program = f"""
        from pathlib import Path
        from sonosco_mlflow.experiment import Experiment
        experiment = Experiment.create({SETTINGS!r}, project=Path({str(project)!r}), name="toy")
        Path({str(project / "run")!r}).write_text(experiment.run.id)
        raise RuntimeError("mine")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True)
    assert ended.returncode == 1
    run = find_run((project / "run").read_text())
    assert run.info.status == "RUNNING"
    assert condition(run) == VANISHED


def test_a_process_ends_also_where_a_call_brought_a_pool_to_hang_with_it() -> None:
    program = """
        import sys, time
        from concurrent.futures import ThreadPoolExecutor
        from sonosco_mlflow import cli
        from sonosco_mlflow.background import OverdueError, within

        def hangs():
            with ThreadPoolExecutor() as pool:
                pool.submit(time.sleep, 60).result()

        @cli.app.command()
        def leave():
            try:
                within(0.1, hangs)
            except OverdueError:
                print("left")
                raise SystemExit(130)

        sys.argv = ["sonosco", "leave"]
        cli.main()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, timeout=50
    )
    assert (ended.returncode, ended.stdout) == (130, b"left\n")


def test_a_termination_at_the_very_end_is_obeyed_when_the_run_is_finished(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = OpenRun._deliver_rest

    def terminated(self: OpenRun, state: str, message: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        deliver(self, state, message)

    monkeypatch.setattr(OpenRun, "_deliver_rest", terminated)
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    experiment.setup_model_trainer(trainer)
    with pytest.raises(Terminated):
        experiment.start()
    assert status(experiment) == ("FINISHED", "finished")


# ------------------------------------------------------------------ several runs in one process


def test_a_run_of_the_users_ends_with_the_one_that_is_left_at_once(tone_manifest: Manifest, project: Path) -> None:
    inner: list[str] = []
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Does(3, lambda: inner.append(mlflow.start_run(nested=True).info.run_id)))
    trainer.attach(Interrupt(5, times=2))
    experiment = run_experiment(trainer, project)
    assert status(experiment) == ("KILLED", "interrupted")
    assert mlflow.get_run(inner[0]).info.status == "KILLED"
    assert mlflow.active_run() is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_runs_in_one_process_end_each_by_itself(project: Path, order: tuple[int, int]) -> None:
    stdout = sys.stdout
    both = [Experiment.create(SETTINGS, project=project, name="toy") for _ in range(2)]
    first, second = (both[number] for number in order)
    first.opened.close("interrupted")
    assert status(second) == ("RUNNING", "running")
    print("still written")
    second.opened.close("interrupted")
    assert status(second) == ("KILLED", "interrupted")
    assert sys.stdout is stdout
    assert mlflow.active_run() is None


def test_a_run_that_another_process_trains_is_not_begun_again(
    stopping: Experiment, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping.opened.recording.background.finish(LONGEST_WAIT)

    def tags() -> dict[str, str]:
        # The run still shows life.
        return {key: value for key, value in find_run(stopping.run.id).data.tags.items() if key != HEARTBEAT}

    before = tags()
    monkeypatch.setenv("MLFLOW_RUN_ID", stopping.run.id)
    with pytest.raises(UserError, match="which MLFLOW_RUN_ID names, is being trained by process"):
        Experiment.create(SETTINGS, project=project, name="another")
    assert tags() == before
    stopping.stop()
    assert status(stopping) == ("KILLED", "interrupted")


def test_a_launched_run_that_another_process_takes_first_is_not_ended(
    project: Path, tracking_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient()
    launched = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)

    def too_late(run_id: str) -> Lease:
        client.set_tag(run_id, OWNER, "another")
        raise UserError(f"run {run_id} is being trained by another process")

    monkeypatch.setattr(Lease, "take", too_late)
    with pytest.raises(UserError, match="trained by another process"):
        Experiment.create(SETTINGS, project=project, name="toy")
    assert find_run(launched).info.status == "RUNNING"
    assert find_run(launched).data.tags["sonosco.state"] == "running"
    assert mlflow.active_run() is None


# ------------------------------------------------------------------ one trainer, several threads


def test_the_same_trainer_goes_on_after_a_stop(tone_manifest: Manifest, project: Path) -> None:
    trainer = toy_trainer(tone_manifest, stop_at=5)
    first = run_experiment(trainer, project)
    again = go_on(first.run.id, trainer, project)
    assert status(again) == ("FINISHED", "finished")
    positions = [(row.micro_step, row.step) for row in read_rows(again.folder / "journal.jsonl")]
    other = run_experiment(toy_trainer(tone_manifest), project)
    assert positions == [(row.micro_step, row.step) for row in read_rows(other.folder / "journal.jsonl")]
    assert {key: len(found) for key, found in rows(first.run.id).items()} == dict.fromkeys(rows(other.run.id), 1)


class Does(Callback, is_part_of_trainer=False):
    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step = step
        self.what = what

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step:
            self.what()


class Raises(Callback, is_part_of_trainer=False):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_step_end(self, trainer: ModelTrainer) -> None:
        raise self.error


class Slow(Callback, is_part_of_trainer=False):
    """Logs to MLflow's active run, as a user's callback may, and takes its time."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def on_step_end(self, trainer: ModelTrainer) -> None:
        mlflow.log_metric("of_a_user", float(trainer.progress.step), step=trainer.progress.step)
        if trainer.progress.step == 2:
            self.reached.set()
        time.sleep(0.05)


def test_a_run_can_be_trained_in_one_thread_and_stopped_from_another(tone_manifest: Manifest, project: Path) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer, slow = toy_trainer(tone_manifest), Slow()
    trainer.attach(slow)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    thread = threading.Thread(target=experiment.start)
    thread.start()
    assert slow.reached.wait(LONGEST_WAIT)
    experiment.stop()
    assert status(experiment) == ("KILLED", "interrupted")
    thread.join(LONGEST_WAIT)
    assert not thread.is_alive()
    assert 2 <= trainer.progress.step < 12
    assert checkpoints_in(experiment.folder / "checkpoints")[-1].name == f"step-{trainer.progress.step:08d}"
    assert ("of_a_user", 2) in rows(experiment.run.id)
    assert mlflow.active_run() is None
    go_on(experiment.run.id, toy_trainer(tone_manifest), project)
    assert status(experiment) == ("FINISHED", "finished")


def test_a_callback_may_stop_the_run(tone_manifest: Manifest, project: Path) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Does(5, experiment.stop))
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    experiment.start()
    assert trainer.progress.step == 5
    assert status(experiment) == ("KILLED", "interrupted")
    finish(experiment.run.id, tone_manifest, project)


def test_a_stop_that_comes_too_late_stops_nothing_later(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    experiment.setup_model_trainer(trainer)
    stopping = threading.Thread(target=experiment.stop)

    def late(*_: object) -> None:
        stopping.start()
        wait_for(lambda: trainer._interruption.requested is not None)

    monkeypatch.setattr("sonosco_mlflow.experiment.log_results", late)
    experiment.start()
    stopping.join(LONGEST_WAIT)
    assert status(experiment) == ("FINISHED", "finished")
    trainer.epochs = 3
    with pytest.warns(UserWarning, match="nothing is saved"):
        trainer.continue_training()
    assert trainer.progress.step == 18


@pytest.mark.parametrize("error", [None, ValueError("mine")])
def test_a_run_ends_as_it_went_whichever_thread_made_it(
    tone_manifest: Manifest, project: Path, error: Exception | None
) -> None:
    made: list[Experiment] = []

    def make() -> None:
        made.append(Experiment.create(SETTINGS, project=project, name="toy"))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (experiment,) = made
    trainer = toy_trainer(tone_manifest)
    if error is not None:
        trainer.attach(Raises(error))
    experiment.setup_model_trainer(trainer)
    if error is None:
        experiment.start()
    else:
        with pytest.raises(ValueError, match="mine"):
            experiment.start()
    expected = ("FINISHED", "finished") if error is None else ("FAILED", "failed")
    assert status(experiment) == expected
    assert mlflow.active_run() is None


# ------------------------------------------------------------------ what it says of itself


def test_an_error_that_is_no_unicode_fails_the_run_all_the_same(tone_manifest: Manifest, project: Path) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    trainer.attach(Raises(UserError("cannot read caf\udce9.wav")))
    with pytest.raises(UserError):
        train(experiment, trainer)
    assert status(experiment) == ("FAILED", "failed")
    assert mlflow.get_run(experiment.run.id).data.tags["sonosco.error"] == "cannot read caf\\udce9.wav"


@pytest.mark.parametrize("own", ["", "Lower rate than before; see the notebook."])
def test_a_description_follows_the_run_until_the_user_writes_another(
    stopping: Experiment, tone_manifest: Manifest, project: Path, own: str
) -> None:
    stopping.stop()
    assert "is interrupted" in mlflow.get_run(stopping.run.id).data.tags["mlflow.note.content"]
    if own:
        mlflow.MlflowClient().set_tag(stopping.run.id, "mlflow.note.content", own)
    finish(stopping.run.id, tone_manifest, project)
    found = mlflow.get_run(stopping.run.id).data.tags["mlflow.note.content"]
    assert found == own if own else "is finished" in found
