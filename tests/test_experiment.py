import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import mlflow
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import (
    SETTINGS,
    all_artifacts,
    artifacts,
    go_on,
    new_project,
    rows,
    run_experiment,
    toy_trainer,
    train,
)
from sonosco_mlflow.canary import canary
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.models import build_model
from sonosco_mlflow.serialization import checkpoint as checkpoint_module
from sonosco_mlflow.serialization.checkpoint import checkpoints_in, read_checkpoint, verify_checkpoint
from sonosco_mlflow.tracking import open_run, origin
from sonosco_mlflow.tracking.changes import Change, input_changes
from sonosco_mlflow.tracking.checkpoints import Deserializer
from sonosco_mlflow.tracking.environment import Environment
from sonosco_mlflow.tracking.journal import DivergedError, read_rows
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.open_run import OpenRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.segments import newest_segment
from sonosco_mlflow.tracking.store import download
from sonosco_mlflow.tracking.tags import OWNER
from sonosco_mlflow.training.callbacks import Callback, CheckpointAverage, EarlyStopping
from sonosco_mlflow.training.callbacks.base import is_timing
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
from sonosco_mlflow.training.interruption import LeaveAtOnce
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import ALPHABET, TOKENIZER, tone_loader

pytestmark = pytest.mark.usefixtures("module_store")
# What taking a lease writes, whether the run then goes on or is refused.
LEASE_TAGS = {"sonosco.owner", "sonosco.host", "sonosco.pid", "sonosco.heartbeat"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_project(tmp_path_factory.mktemp("project"))


def bits(run_id: str) -> Mapping[tuple[str, int], str]:
    """The value of each metric at each step, of those that a repeated run repeats."""
    found = rows(run_id)
    assert {key: len(values) for key, values in found.items() if len(values) != 1} == {}
    return {key: values[0].hex() for key, values in found.items() if not is_timing(key[0])}


def checkpoint_files(experiment: Experiment) -> dict[str, bytes]:
    folder = experiment.folder / "checkpoints"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tags(run_id: str) -> dict[str, str]:
    return {key: value for key, value in mlflow.get_run(run_id).data.tags.items() if key not in LEASE_TAGS}


@dataclass(frozen=True)
class Look:
    """All that a reader of a run could see."""

    status: str
    tags: dict[str, str]
    artifacts: dict[str, int | None]
    rows: Mapping[tuple[str, int], list[float]]


def look(run_id: str) -> Look:
    return Look(mlflow.get_run(run_id).info.status, tags(run_id), all_artifacts(run_id), rows(run_id))


@pytest.fixture(scope="module")
def whole(module_store: str, project: Path, tone_manifest: Manifest) -> Experiment:
    """A run that nothing disturbed."""
    torch.set_num_threads(1)
    return run_experiment(toy_trainer(tone_manifest), project)


@pytest.fixture(scope="module")
def longer(module_store: str, project: Path, tone_manifest: Manifest) -> Experiment:
    """One that was asked for three epochs at the start."""
    torch.set_num_threads(1)
    return run_experiment(toy_trainer(tone_manifest, epochs=3), project)


@pytest.fixture(scope="module")
def stopped(module_store: str, project: Path, tone_manifest: Manifest) -> Experiment:
    """A run that waits for being continued; tests that continue it are refused."""
    torch.set_num_threads(1)
    return run_experiment(toy_trainer(tone_manifest, stop_at=5), project)


# ---------------------------------------------------------------------- a run from start to end


def test_a_finished_run_is_whole(whole: Experiment) -> None:
    run = mlflow.get_run(whole.run.id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"config.size": "1"}
    assert "| val_loss |" in run.data.tags["mlflow.note.content"]
    assert "sonosco.segments" not in run.data.tags
    assert {"code", "environment", "data", "checkpoints", "config", "evaluation", "logs", "tensorboard"} <= artifacts(
        run.info.run_id
    )
    assert artifacts(run.info.run_id, "evaluation") == {
        "evaluation/test_hypotheses.json",
        "evaluation/validation_hypotheses.json",
        "evaluation/learning_curves.png",
        "evaluation/mel_spectrogram.png",
    }
    names = {"train_loss", "learning_rate", "gradient_norm", "utterances_per_second", "val_loss"}
    assert run.data.metrics.keys() >= names | {"val_word_error_rate", "test_loss", "test_word_error_rate"}
    assert not any(name.startswith("resume.") for name in run.data.metrics)
    assert whole._trainer is not None
    found = rows(run.info.run_id)
    assert {step for name, step in found if name == "train_loss"} == set(range(1, whole._trainer.progress.step + 1))
    assert all(len(values) == 1 for values in found.values())


def test_the_journal_in_mlflow_is_that_of_the_disk_and_holds_every_row(whole: Experiment, tmp_path: Path) -> None:
    kept = download(whole.run.id, "journal.jsonl", tmp_path)
    assert kept.read_bytes() == (whole.folder / "journal.jsonl").read_bytes()
    assert {(name, row.step): [value] for row in read_rows(kept) for name, value in row.metrics.items()} == rows(
        whole.run.id
    )


def test_the_same_run_again_ends_in_the_same_bits(whole: Experiment, tone_manifest: Manifest, project: Path) -> None:
    second = run_experiment(toy_trainer(tone_manifest), project)
    assert tags(second.run.id)["sonosco.weights_digest"] == tags(whole.run.id)["sonosco.weights_digest"]
    assert bits(second.run.id) == bits(whole.run.id)
    assert checkpoint_files(second) == checkpoint_files(whole)


def test_the_weights_digest_is_that_of_the_kept_weights(whole: Experiment, tmp_path: Path) -> None:
    found = tags(whole.run.id)
    weights = download(whole.run.id, found["sonosco.checkpoint"], tmp_path) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == found["sonosco.weights_digest"]


def test_hypotheses_stand_beside_their_references(whole: Experiment, tone_manifest: Manifest, tmp_path: Path) -> None:
    table = json.loads(download(whole.run.id, "evaluation/test_hypotheses.json", tmp_path).read_text())
    shown = {row[0]: row[1:3] for row in table["data"]}
    assert whole.test is not None
    assert shown == {
        name: [reference, hypothesis]
        for name, reference, hypothesis in zip(
            whole.test.ids, whole.test.references, whole.test.hypotheses, strict=True
        )
    }
    assert {name: pair[0] for name, pair in shown.items()} == {item.id: item.text for item in tone_manifest}


def test_the_kept_model_transcribes_waveforms(tone_manifest: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"channels": [2], "blocks": [1], "decoder_size": 16, "kernel": 3, "strides": [2]}
    model = build_model("tds", "small", n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, settings=settings)
    loader = tone_loader(tone_manifest, seed=None)
    experiment = run_experiment(ModelTrainer(model, train_loader=loader, val_loader=loader, epochs=1), tmp_path)
    logged = mlflow.pyfunc.load_model(f"runs:/{experiment.run.id}/model")
    waveform = torch.zeros(1, 16000).numpy()
    assert logged.metadata.signature is not None
    texts = logged.predict(waveform)
    assert len(texts) == 1
    assert set(texts[0]) <= set(ALPHABET)
    assert "evaluation/alignment.png" in artifacts(experiment.run.id, "evaluation")


# ---------------------------------------------------------------------- a run that was stopped goes on


def test_a_stopped_run_says_so_and_holds_its_state(stopped: Experiment, tone_manifest: Manifest) -> None:
    run = mlflow.get_run(stopped.run.id)
    assert run.info.status == "KILLED"
    assert run.data.tags["sonosco.state"] == "interrupted"
    assert run.data.tags["sonosco.checkpoint"] == "checkpoints/step-00000005"
    assert not any(name.startswith("test_") for name in run.data.metrics)
    assert {step for name, step in rows(stopped.run.id) if name == "train_loss"} == {1, 2, 3, 4, 5}


def test_its_state_alone_can_be_continued(stopped: Experiment, whole: Experiment, tone_manifest: Manifest) -> None:
    continued = Deserializer(trusted=["toy"]).deserialize(
        f"runs:/{stopped.run.id}",
        train_loader=tone_loader(tone_manifest),
        val_loader=tone_loader(tone_manifest, seed=None),
    )
    assert continued.progress.step == 5
    with pytest.warns(UserWarning, match="ModelCheckpoint has no directory"):
        continued.continue_training()
    assert whole._trainer is not None
    for name, tensor in whole._trainer.model.state_dict().items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
    assert continued.progress == whole._trainer.progress


@pytest.mark.parametrize("local", [True, False], ids=["with its folder", "from MLflow alone"])
def test_stopped_and_resumed_is_as_if_never_stopped(
    whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path, local: bool
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    if not local:
        shutil.rmtree(first.folder)
    again = go_on(first.run.id, toy_trainer(tone_manifest), project)
    assert_as_if_never_stopped(again, whole, tmp_path)
    assert again.run.id == first.run.id
    assert mlflow.get_run(first.run.id).data.metrics["resume.verified_steps"] == 0
    assert {"logs/console.log", "logs/console-2.log"} == artifacts(first.run.id, "logs")
    note = json.loads(download(first.run.id, "segments/2/segment.json", tmp_path).read_text())
    assert (note["segment"], note["checkpoint"], note["branches"]) == (2, "step-00000005", [])


def assert_as_if_never_stopped(again: Experiment, whole: Experiment, folder: Path) -> None:
    run = mlflow.get_run(again.run.id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["sonosco.state"] == "finished"
    assert run.data.tags["sonosco.segments"] == "2"
    assert "sonosco.error" not in run.data.tags
    assert run.data.tags["sonosco.weights_digest"] == tags(whole.run.id)["sonosco.weights_digest"]
    assert bits(again.run.id) == bits(whole.run.id)
    assert checkpoint_files(again) == checkpoint_files(whole)
    assert artifacts(again.run.id, "checkpoints") == artifacts(whole.run.id, "checkpoints")
    for name in artifacts(again.run.id, "checkpoints"):
        verify_checkpoint(download(again.run.id, name, folder / "kept"))
    kept, expected = read_rows(again.folder / "journal.jsonl"), read_rows(whole.folder / "journal.jsonl")
    assert [(row.micro_step, row.step, row.metrics.keys(), row.texts) for row in kept] == [
        (row.micro_step, row.step, row.metrics.keys(), row.texts) for row in expected
    ]
    assert download(again.run.id, "journal.jsonl", folder).read_bytes() == (again.folder / "journal.jsonl").read_bytes()
    shown = download(again.run.id, "tensorboard", folder / "shown")
    assert {path.name for path in shown.iterdir()} == {path.name for path in (again.folder / "tensorboard").iterdir()}
    events = EventAccumulator(str(shown), size_guidance={"scalars": 0})
    events.Reload()
    steps = sorted((tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))
    # The test's are of no step of the training: its board is closed by then.
    assert steps == sorted(key for key in rows(again.run.id) if not key[0].startswith("test_"))


# Killed runs: each in a process of its own, which is what SIGKILL is about.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_experiment as tests
from sonosco_mlflow import experiment as module
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.tracking import origin
from sonosco_mlflow.training.callbacks import Callback
from toy import tone_corpus, tone_texts

project, notes, corpus = map(Path, sys.argv[1:4])
# It takes seconds to make.
origin.canary = lambda: sys.argv[4]
manifest = tone_corpus(corpus, tone_texts(20))


class Kill(Callback):
    def on_safe_point(self, trainer):
        if trainer.progress.step == 11:
            experiment.opened.recording.finish(60)
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_the_end(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


for name in ("midway", "end"):
    if os.fork() == 0:
        experiment = Experiment.create(tests.SETTINGS, project=project, name="toy")
        (notes / name).write_text(experiment.run.id)
        trainer = tests.toy_trainer(manifest)
        experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
        if name == "midway":
            trainer.attach(Kill())
        else:
            module.log_results = kill_at_the_end
        experiment.start()
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def killed(
    module_store: str, project: Path, tone_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Ids of runs that were killed by SIGKILL, by where."""
    notes = tmp_path_factory.mktemp("killed")
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent / "src")])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(project), str(notes), str(tone_manifest.root), canary()],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.splitlines()[-2:] == ["midway -9", "end -9"], ended.stdout + ended.stderr
    return {path.name: path.read_text() for path in notes.iterdir()}


def test_a_run_that_was_killed_goes_on_as_if_never_killed(
    killed: dict[str, str], whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    run_id = killed["midway"]
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    found = [step for name, step in rows(run_id) if name == "train_loss"]
    assert max(found) == 11
    again = go_on(run_id, toy_trainer(tone_manifest), project)
    assert_as_if_never_stopped(again, whole, tmp_path)
    # What lay between its newest checkpoint and its death was made again.
    assert again.resumption is not None
    assert again.resumption.checkpoint is not None
    made_again = set(range(again.resumption.checkpoint.step + 1, 12))
    assert made_again
    assert again.opened.recording.journal.verified_steps == made_again
    assert mlflow.get_run(run_id).data.metrics["resume.verified_steps"] == len(made_again)


def test_an_end_that_is_repeated_verifies_the_tests_metrics(
    killed: dict[str, str], whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    run_id = killed["end"]
    assert ("test_loss", max(step for _, step in bits(whole.run.id))) in rows(run_id)
    assert "evaluation" not in artifacts(run_id)
    again = go_on(run_id, toy_trainer(tone_manifest), project)
    assert_as_if_never_stopped(again, whole, tmp_path)
    assert whole._trainer is not None
    assert again.opened.recording.journal.verified_steps == {whole._trainer.progress.step}
    assert "evaluation/test_hypotheses.json" in artifacts(run_id, "evaluation")


@pytest.mark.parametrize("threads", [1, 2])
def test_without_any_checkpoint_a_run_starts_over_and_its_rows_are_verified(
    whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path, threads: int
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=3), project)
    shutil.rmtree(first.folder / "checkpoints")
    first.run.delete_artifact("checkpoints")
    timings = {key: value for key, value in rows(first.run.id).items() if is_timing(key[0])}
    # On a machine of more cores: the run's own number is set again.
    torch.set_num_threads(threads)
    again = go_on(first.run.id, toy_trainer(tone_manifest), project)
    assert_as_if_never_stopped(again, whole, tmp_path)
    assert again.opened.recording.journal.verified_steps == {1, 2, 3}
    assert {key: rows(again.run.id)[key] for key in timings} == timings


# ---------------------------------------------------------------------- what must be the same


def changed_code(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    (project / "model.py").write_text("x = 2\n")
    return None, manifest


def changed_config(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    return {"size": 2}, manifest


def changed_data(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    return None, manifest[:15]


def changed_environment(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    patch.setattr("platform.python_version", lambda: "3.99.0")
    return None, manifest


def changed_beside(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    """The project's requirements say nothing of pytest."""
    describe = origin.describe_environment

    def elsewhere(threads: int, canary: str, folder: Path) -> Environment:
        found = describe(threads, canary, folder)
        return replace(found, requirements=found.requirements.replace(f"pytest=={version('pytest')}", "pytest==0.1"))

    patch.setattr(origin, "describe_environment", elsewhere)
    return None, manifest


def changed_numerics(project: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> tuple[Any, Manifest]:
    patch.setattr("sonosco_mlflow.tracking.origin.canary", lambda: "other")
    return None, manifest


CHANGED = {
    "code": (changed_code, r"code: 1 files differ: model\.py"),
    "config": (changed_config, "config: size was 1, is 2"),
    "data": (changed_data, r"data: the dev manifest \(\w{12}, was \w{12}\), .*train manifest"),
    "environment": (changed_environment, r"environment: python 3\.\S+ -> 3\.99\.0"),
    "environment, beside": (changed_beside, r"distribution:pytest: was \S+, is 0\.1\n"),
    "numerics": (changed_numerics, "canary: the same operations give other bits here"),
}


@pytest.fixture
def restored(project: Path) -> Iterator[None]:
    yield
    (project / "model.py").write_text("x = 1\n")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_refused_and_the_run_is_left_as_it_was(
    stopped: Experiment, tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make, message = CHANGED[change]
    before, files = look(stopped.run.id), checkpoint_files(stopped)
    config, manifest = make(project, tone_manifest, monkeypatch)
    with pytest.raises(UserError, match=message) as raised:
        go_on(stopped.run.id, toy_trainer(manifest), project, config=config)
    assert f"--allow-{change.partition(',')[0]}-change" in str(raised.value)
    assert str(raised.value).count("--allow-") == 1
    assert look(stopped.run.id) == before
    assert checkpoint_files(stopped) == files
    assert mlflow.active_run() is None


@pytest.mark.usefixtures("restored")
def test_changes_that_are_allowed_are_recorded(
    tone_manifest: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=2), project).run.id
    was = tags(run_id)
    for change in ("code", "numerics"):
        CHANGED[change][0](project, tone_manifest, monkeypatch)
    go_on(
        run_id,
        toy_trainer(tone_manifest[:15]),
        project,
        config={"size": 2},
        allowed_changes=["code", "data", "config", "numerics"],
    )
    now = tags(run_id)
    assert now["sonosco.state"] == "finished"
    assert now["sonosco.allowed_changes"] == "batches,canary,code,config,data"
    for tag in ("code_digest", "data_digest", "config_digest", "canary"):
        assert now[f"sonosco.{tag}"] != was[f"sonosco.{tag}"]
    note = json.loads(download(run_id, "segments/2/segment.json", tmp_path).read_text())
    (branch,) = note["branches"]
    assert (branch["segment"], branch["checkpoint"]) == (2, note["checkpoint"])
    assert branch["changes"]["code"] == {"was": was["sonosco.code_digest"], "is": now["sonosco.code_digest"]}
    assert download(run_id, "config/params.yaml", tmp_path / "root").read_text() == "size: 2\n"
    assert {"segments/2/code/snapshot.zip"} <= all_artifacts(run_id).keys()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("is_changed", [False, True], ids=["the same code", "code that was allowed to change"])
def test_what_code_does_to_the_model_is_the_states_unless_the_code_was_allowed_to_change(
    is_changed: bool, tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=2), project).run.id
    if is_changed:
        changed_code(project, tone_manifest, monkeypatch)
    trainer = toy_trainer(tone_manifest)
    trainer.model.requires_grad_(False).double()
    again = Experiment.resume(run_id, project=project, allowed_changes=["code"])
    again.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    again.opened.close("interrupted")
    expected = (False, torch.float64) if is_changed else (True, torch.float32)
    assert {(parameter.requires_grad, parameter.dtype) for parameter in trainer.model.parameters()} == {expected}


class Patience(Callback):
    """Ends a test that would never end."""

    def __init__(self) -> None:
        self.begun = 0

    def on_epoch_begin(self, trainer: ModelTrainer) -> None:
        self.begun += 1
        assert self.begun < 9, "the same epoch begins again and again"


def test_a_position_that_other_data_does_not_have_is_refused(tone_manifest: Manifest, project: Path) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    before = look(first.run.id)
    trainer = toy_trainer(tone_manifest[:8])
    assert trainer.train_loader is not None
    assert trainer.train_loader.batches_in(0) < 5
    trainer.attach(Patience())
    with pytest.raises(UserError, match="batch 5 of epoch 0"):
        go_on(first.run.id, trainer, project, allowed_changes=["data"])
    assert look(first.run.id) == before


def test_a_change_of_which_nobody_has_heard_is_refused(stopped: Experiment, project: Path) -> None:
    with pytest.raises(UserError, match=r"no change 'colour' to allow; .*Valid: .*code"):
        Experiment.resume(stopped.run.id, allowed_changes=["colour"], project=project)


def test_other_callbacks_are_refused_and_the_run_is_left_as_it_was(
    stopped: Experiment, tone_manifest: Manifest, project: Path
) -> None:
    before = look(stopped.run.id)
    with pytest.raises(UserError, match=r"trainer: callbacks\.length was 2, is 3; .*EarlyStopping"):
        go_on(stopped.run.id, toy_trainer(tone_manifest, EarlyStopping()), project)
    with pytest.raises(UserError, match=r"the state is for the callbacks .*the trainer has .*EarlyStopping"):
        go_on(stopped.run.id, toy_trainer(tone_manifest, EarlyStopping()), project, allowed_changes=["config"])
    assert look(stopped.run.id) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda manifest: toy_trainer(manifest, learning_rate=0.05), r"optimizer\.groups\.0\.lr was 0\.001, is 0\.05"),
        (lambda manifest: with_another(toy_trainer(manifest), "gradient_clip", 0.01), "gradient_clip was .*, is 0.01"),
        (lambda manifest: with_another(toy_trainer(manifest), "accumulation", 3), "accumulation was 1, is 3"),
        (lambda manifest: with_another(toy_trainer(manifest), "seed", 9), "seed was 0, is 9"),
    ],
    ids=["learning rate", "gradient clip", "accumulation", "seed"],
)
def test_a_trainer_that_is_made_otherwise_is_refused_though_settings_and_code_are_the_same(
    stopped: Experiment, tone_manifest: Manifest, project: Path, make: Callable[[Manifest], ModelTrainer], said: str
) -> None:
    before = look(stopped.run.id)
    with pytest.raises(UserError, match=rf"trainer: {said}(?s:.*)--allow-config-change"):
        go_on(stopped.run.id, make(tone_manifest), project)
    assert look(stopped.run.id) == before


def test_where_checkpoints_are_averaged_others_are_another_trainer(tone_manifest: Manifest, project: Path) -> None:
    def trainer(**kept: Any) -> ModelTrainer:
        made = toy_trainer(tone_manifest, *averages, stop_at=5)
        for name, value in kept.items():
            setattr(made.callbacks[-1], name, value)
        return made

    averages: list[Callback] = []
    run_id = run_experiment(trainer(), project).run.id
    go_on(run_id, trainer(every_steps=2), project)
    averages = [CheckpointAverage("last", 2)]
    run_id = run_experiment(trainer(), project).run.id
    with pytest.raises(UserError, match=r"trainer: callbacks\.\d\.every_steps was 4, is 2(?s:.*)--allow-config-change"):
        go_on(run_id, trainer(every_steps=2), project)
    go_on(run_id, trainer(), project)


def with_another(trainer: ModelTrainer, name: str, value: object) -> ModelTrainer:
    setattr(trainer, name, value)
    return trainer


def test_another_trainer_that_is_allowed_trains_as_it_is_made(tone_manifest: Manifest, project: Path) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=2), project).run.id
    again = go_on(run_id, toy_trainer(tone_manifest, learning_rate=0.05), project, allowed_changes=["config"])
    assert tags(run_id)["sonosco.allowed_changes"] == "trainer"
    assert again.history.curve("learning_rate")[1][-1] == 0.05


def test_only_a_training_goes_on(project: Path) -> None:
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    with pytest.raises(UserError, match=f"run {run_id} is no training: its tag sonosco.kind is None"):
        Experiment.resume(run_id, project=project)
    with pytest.raises(UserError, match="'nonsense' is not in the tracking store"):
        Experiment.resume("nonsense", project=project)


# ---------------------------------------------------------------------- a finished run, and more epochs


def test_a_finished_run_with_nothing_to_do_says_so_and_changes_nothing(
    whole: Experiment, tone_manifest: Manifest, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, files = look(whole.run.id), checkpoint_files(whole)
    again = go_on(whole.run.id, toy_trainer(tone_manifest), project)
    assert f"run {whole.run.id} finished after 2 epochs; there is nothing to do" in capsys.readouterr().out
    assert not again.is_open
    assert look(whole.run.id) == before
    assert checkpoint_files(whole) == files
    # And it can be asked again: the lease was given back.
    go_on(whole.run.id, toy_trainer(tone_manifest), project)


def test_more_epochs_end_as_if_they_had_been_asked_for_at_the_start(
    longer: Experiment, tone_manifest: Manifest, project: Path
) -> None:
    first = run_experiment(toy_trainer(tone_manifest), project)
    again = go_on(first.run.id, toy_trainer(tone_manifest, epochs=3), project)
    found, expected = tags(first.run.id), tags(longer.run.id)
    assert found["sonosco.weights_digest"] == expected["sonosco.weights_digest"]
    assert found["sonosco.segments"] == "2"
    assert artifacts(first.run.id, "checkpoints") == artifacts(longer.run.id, "checkpoints")
    ours, theirs = (
        {path.name: read_checkpoint(path) for path in checkpoints_in(experiment.folder / "checkpoints")}
        for experiment in (again, longer)
    )
    assert ours.keys() == theirs.keys()
    newest = checkpoints_in(again.folder / "checkpoints")[-1]
    for path in newest.iterdir():
        assert path.read_bytes() == (longer.folder / "checkpoints" / newest.name / path.name).read_bytes(), path.name
    # Of what came before the end, the rows are the same; the first end had a test of its own.
    mine, whole = bits(first.run.id), bits(longer.run.id)
    assert {key: value for key, value in mine.items() if not key[0].startswith("test_")} == {
        key: value for key, value in whole.items() if not key[0].startswith("test_")
    }
    assert {key: mine[key] for key in whole} == whole


def test_fewer_epochs_than_are_done_are_refused(whole: Experiment, tone_manifest: Manifest, project: Path) -> None:
    before = look(whole.run.id)
    with pytest.raises(UserError, match=rf"training\.epochs is 1, but run {whole.run.id} has done 2 epochs already"):
        go_on(whole.run.id, toy_trainer(tone_manifest, epochs=1), project)
    assert look(whole.run.id) == before


class StopAt(Callback):
    """Stops the training for good."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step:
            trainer.stop_training("it is good enough")


class Cosine(Callback):
    """Knows from the start how long the way is."""

    follows_total_epochs: ClassVar[bool] = True


def test_a_run_that_stopped_early_says_why_it_needs_no_more_epochs(
    tone_manifest: Manifest, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, StopAt(3), Cosine(), epochs=4), project)
    before = look(first.run.id)
    assert before.status == "FINISHED"
    with pytest.raises(UserError, match=r"training\.epochs cannot become 9 instead of 4: Cosine follows"):
        go_on(first.run.id, toy_trainer(tone_manifest, StopAt(3), Cosine(), epochs=9), project)
    capsys.readouterr()
    assert look(first.run.id) == before
    # It is the same for a callback that does not care.
    go_on(first.run.id, toy_trainer(tone_manifest, StopAt(3), Cosine(), epochs=4), project)
    assert "finished after 0 epochs: it is good enough; there is nothing to do" in capsys.readouterr().out
    assert look(first.run.id) == before


# ---------------------------------------------------------------------- what goes wrong


def test_a_failure_is_told_by_the_run(tone_manifest: Manifest, tmp_path: Path) -> None:
    trainer = toy_trainer(tone_manifest)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    experiment = Experiment.create({}, project=tmp_path)
    experiment.setup_model_trainer(trainer)
    with pytest.raises(Exception, match="the loss is nan"):
        experiment.start()
    run = mlflow.get_run(experiment.run.id)
    assert run.info.status == "FAILED"
    assert "the loss is nan at step 1" in run.data.tags["sonosco.error"]


def test_a_run_whose_provenance_fails_does_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise OSError("no snapshot today")

    monkeypatch.setattr("sonosco_mlflow.tracking.origin.snapshot_code", broken)
    with pytest.raises(OSError, match="no snapshot"):
        Experiment.create({}, project=tmp_path)
    run = mlflow.search_runs(["0"], output_format="list", max_results=1)[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["sonosco.error"] == "OSError: no snapshot today"


def test_settings_that_cannot_be_kept_open_no_run(stopped: Experiment, project: Path) -> None:
    before = {run.info.run_id for run in mlflow.search_runs(["0"], output_format="list")}
    with pytest.raises(UserError, match=r"^data\.folder: found PosixPath\('corpus'\), a pathlib\.PosixPath"):
        Experiment.create({"data": {"folder": Path("corpus")}}, project=project)
    with pytest.raises(UserError, match=r"^data\.folder: found"):
        Experiment.resume(stopped.run.id, {"data": {"folder": Path("corpus")}}, project=project)
    assert {run.info.run_id for run in mlflow.search_runs(["0"], output_format="list")} == before
    Lease.take(stopped.run.id).release()


def test_another_tuple_in_settings_is_another_recipe(tone_manifest: Manifest, project: Path) -> None:
    experiment = Experiment.create({"betas": (0.9, 0.98)}, project=project)
    train(experiment, toy_trainer(tone_manifest, stop_at=2))
    assert mlflow.get_run(experiment.run.id).data.params == {"config.betas": "[0.9, 0.98]"}
    with pytest.raises(UserError, match=r"betas was '\[0\.9, 0\.98\]', is '\[0\.9, 0\.999\]'"):
        go_on(experiment.run.id, toy_trainer(tone_manifest), project, config={"betas": (0.9, 0.999)})
    go_on(experiment.run.id, toy_trainer(tone_manifest), project, config={"betas": (0.9, 0.98)})


def test_a_key_of_the_users_own_counts_though_the_recipe_has_one_of_that_name(
    tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    base, large = {"checkpoint": "base.pt"}, {"checkpoint": "large.pt"}
    first = train(Experiment.create(base, project=project), toy_trainer(tone_manifest, stop_at=2))
    with pytest.raises(UserError, match=r"checkpoint was 'base\.pt', is 'large\.pt'"):
        go_on(first.run.id, toy_trainer(tone_manifest), project, config=large)
    other = train(Experiment.create(large, project=project), toy_trainer(tone_manifest, stop_at=2))
    segments = [newest_segment(mlflow.get_run(experiment.run.id)) for experiment in (first, other)]
    tags_of = [tags(experiment.run.id) for experiment in (first, other)]
    (change,) = input_changes(segments[0], tags_of[0], segments[1], tags_of[1], project)
    assert change == Change("config", ("checkpoint was 'base.pt', is 'large.pt'",))


def test_a_recipe_goes_on_as_one_where_the_run_is_all_that_is_named(tone_manifest: Manifest, project: Path) -> None:
    first = train(Experiment.create(Config(), project=project), toy_trainer(tone_manifest, stop_at=2))
    again = go_on(first.run.id, toy_trainer(tone_manifest, stop_at=4), project)
    assert again.origin.command.trains_recipe
    # Free to change, as in the first place.
    config = Config.resolve({}, {"data.workers": "1", "checkpoint.keep_last": "3"})
    go_on(first.run.id, toy_trainer(tone_manifest), project, config=config)
    assert tags(first.run.id)["sonosco.state"] == "finished"


def test_a_step_that_comes_out_otherwise_stops_the_run(tone_manifest: Manifest, project: Path) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    client = mlflow.MlflowClient()
    client.log_metric(first.run.id, "train_loss", 123.0, step=7)
    files, before = checkpoint_files(first), rows(first.run.id)
    with pytest.raises(DivergedError, match=r"step 7 was made again .*: train_loss is .* has 123\.0"):
        go_on(first.run.id, toy_trainer(tone_manifest), project)
    run = mlflow.get_run(first.run.id)
    assert run.info.status == "FAILED"
    assert run.data.tags["sonosco.state"] == "failed"
    assert "step 7 was made again and came out otherwise" in run.data.tags["sonosco.error"]
    # The end of the epoch at step 6 was proven right, and saved.
    found = checkpoint_files(first)
    assert {name: found[name] for name in files} == files
    assert {name.partition("/")[0] for name in found.keys() - files.keys()} == {"step-00000006"}
    recorded = rows(first.run.id)
    assert recorded["train_loss", 7] == [123.0]
    assert {key: recorded[key] for key in before} == before
    assert max(step for name, step in recorded if name == "train_loss") == 7


class Fails(Callback):
    """A user's callback with a mistake in it."""

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == 5:
            raise ZeroDivisionError("a mistake")


def test_what_a_failed_callback_missed_is_kept_apart(whole: Experiment, tone_manifest: Manifest, project: Path) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    with pytest.raises(ZeroDivisionError):
        train(experiment, toy_trainer(tone_manifest, Fails()))
    run = mlflow.get_run(experiment.run.id)
    assert run.info.status == "FAILED"
    assert run.data.tags["sonosco.error"] == "ZeroDivisionError: a mistake"
    folder = experiment.folder / "checkpoints"
    assert read_checkpoint(folder / "failed" / "step-00000005").step == 5
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000000", "step-00000004"]
    assert run.data.tags["sonosco.checkpoint"] == "checkpoints/step-00000004"
    assert "checkpoints/failed" not in artifacts(run.info.run_id, "checkpoints")


def test_a_full_disk_fails_the_run(tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint_module.write_bytes

    def write_bytes(path: Path, content: bytes) -> None:
        if path.parent.name.endswith("step-00000004"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, content)

    monkeypatch.setattr(checkpoint_module, "write_bytes", write_bytes)
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    with pytest.raises(OSError, match="No space left on device"):
        train(experiment, trainer)
    assert trainer.progress.step < 12
    run = mlflow.get_run(experiment.run.id)
    assert run.info.status == "FAILED"
    assert "No space left on device" in run.data.tags["sonosco.error"]
    # It may not have been delivered before the disk was full.
    assert run.data.tags.get("sonosco.checkpoint") in (None, "checkpoints/step-00000000")
    assert [path.name for path in checkpoints_in(experiment.folder / "checkpoints")] == ["step-00000000"]


# It leaves so quickly that its journal may not be in MLflow yet; then the one in its folder is taken, and that is said.
@pytest.mark.filterwarnings("ignore:the journal is taken from:UserWarning")
def test_the_same_signal_twice_leaves_at_once_and_the_run_can_go_on(
    whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=6, times=2), project)
    run = mlflow.get_run(first.run.id)
    assert (run.info.status, run.data.tags["sonosco.state"]) == ("KILLED", "interrupted")
    assert "step-00000006" not in {path.name for path in checkpoints_in(first.folder / "checkpoints")}
    assert mlflow.active_run() is None
    assert_as_if_never_stopped(go_on(first.run.id, toy_trainer(tone_manifest), project), whole, tmp_path)


def test_a_second_interrupt_while_stopping_leaves_at_once(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: ModelCheckpoint, trainer: ModelTrainer) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on saving")

    monkeypatch.setattr(ModelCheckpoint, "saved", save)
    stdout = sys.stdout
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest, stop_at=2)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    with pytest.raises(KeyboardInterrupt):
        experiment.start()
    with pytest.raises(LeaveAtOnce):
        experiment.stop()
    # Whoever caught that can go on in the same process.
    assert sys.stdout is stdout
    assert mlflow.active_run() is None
    assert tags(experiment.run.id)["sonosco.state"] == "interrupted"
    monkeypatch.undo()
    go_on(experiment.run.id, toy_trainer(tone_manifest, stop_at=3), project)


def test_an_interrupt_in_the_very_end_leaves_a_run_that_goes_on(
    whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deliver(self: OpenRun, state: str, message: str) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(OpenRun, "_deliver_rest", deliver)
        first = run_experiment(toy_trainer(tone_manifest), project)
    assert tags(first.run.id)["sonosco.state"] == "interrupted"
    assert_as_if_never_stopped(go_on(first.run.id, toy_trainer(tone_manifest), project), whole, tmp_path)


def test_a_run_of_which_nobody_could_be_told_that_it_is_finished_is_no_success(
    whole: Experiment, tone_manifest: Manifest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    with monkeypatch.context() as patch:
        patch.setattr(open_run, "PATIENCE_AT_END", 1.0)
        patch.setattr(TrackedRun, "end", Mock(side_effect=ConnectionError("the server is away")))
        with pytest.raises(ConnectionError):
            train(experiment, toy_trainer(tone_manifest))
    assert tags(experiment.run.id)["sonosco.state"] == "running"
    mlflow.end_run("KILLED")
    assert_as_if_never_stopped(go_on(experiment.run.id, toy_trainer(tone_manifest), project), whole, tmp_path)


def test_a_block_ends_as_it_went(tone_manifest: Manifest, project: Path) -> None:
    for error, state in ((KeyboardInterrupt(), "interrupted"), (ValueError("mine"), "failed")):
        with (
            pytest.raises(type(error)),
            Experiment.create(SETTINGS, project=project, name="toy") as experiment,
        ):
            raise error
        assert tags(experiment.run.id)["sonosco.state"] == state


# ---------------------------------------------------------------------- what a reviewer found


class RecordsBetweenSteps(Callback):
    """Records where no step is being made: such a row belongs to the next one."""

    def on_epoch_begin(self, trainer: ModelTrainer) -> None:
        if trainer.progress.batch == 0:
            trainer.record({"drawn": torch.rand(()).item()})

    def on_train_end(self, trainer: ModelTrainer) -> None:
        trainer.record({"end": 1.0})


@pytest.mark.parametrize("stop_at", [6, 7])
def test_what_is_recorded_between_two_steps_does_not_keep_a_run_from_going_on(
    tone_manifest: Manifest, project: Path, stop_at: int
) -> None:
    whole = run_experiment(toy_trainer(tone_manifest, RecordsBetweenSteps()), project)
    first = run_experiment(toy_trainer(tone_manifest, RecordsBetweenSteps(), stop_at=stop_at), project)
    again = go_on(first.run.id, toy_trainer(tone_manifest, RecordsBetweenSteps()), project)
    assert tags(again.run.id)["sonosco.state"] == "finished"
    assert bits(again.run.id) == bits(whole.run.id)
    assert ("end", 12) in bits(whole.run.id)


def test_a_stop_that_cannot_save_ends_the_run_as_failed(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    experiment.setup_model_trainer(toy_trainer(tone_manifest, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        experiment.start()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ModelCheckpoint, "saved", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        experiment.stop()
    run = mlflow.get_run(experiment.run.id)
    assert (run.info.status, run.data.tags["sonosco.state"]) == ("FAILED", "failed")
    assert "No space left" in run.data.tags["sonosco.error"]


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt(), "interrupted"), (OSError("full"), "failed")])
def test_a_run_that_ends_as_it_is_made_says_so_and_lets_go(
    project: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str
) -> None:
    before = {run.info.run_id for run in mlflow.search_runs(["0"], output_format="list")}
    monkeypatch.setattr(Origin, "log", Mock(side_effect=error))
    with pytest.raises(type(error)):
        Experiment.create(SETTINGS, project=project, name="toy")
    (made,) = (run for run in mlflow.search_runs(["0"], output_format="list") if run.info.run_id not in before)
    assert made.data.tags["sonosco.state"] == state
    assert mlflow.active_run() is None
    Lease.take(made.info.run_id).release()


def test_a_run_of_the_users_that_is_left_open_below_does_not_take_its_place(
    tone_manifest: Manifest, project: Path
) -> None:
    class OpensAnother(Callback, is_part_of_trainer=False):
        def on_step_end(self, trainer: ModelTrainer) -> None:
            if trainer.progress.step == 2:
                mlflow.start_run(nested=True, run_name="beside")
                raise ValueError("mine")

    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    trainer.attach(OpensAnother())
    with pytest.raises(ValueError, match="mine"):
        train(experiment, trainer)
    assert mlflow.get_run(experiment.run.id).info.status == "FAILED"
    assert mlflow.active_run() is None


def test_a_closed_run_is_not_started_again_and_is_not_called_finished(tone_manifest: Manifest, project: Path) -> None:
    experiment = run_experiment(toy_trainer(tone_manifest, stop_at=2), project)
    with pytest.raises(UserError, match=f"run {experiment.run.id} is closed; Experiment.resume"):
        experiment.start()


class TakenOver(Callback, is_part_of_trainer=False):
    """Another machine takes the run over at a step, and this process is not told; or it hears of it right away."""

    def __init__(self, experiment: Experiment, hears: bool) -> None:
        self.experiment = experiment
        self.hears = hears
        self.left: object = None

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step != 6:
            return
        self.experiment.opened.recording.background.finish(60)
        mlflow.MlflowClient().set_tag(self.experiment.run.id, OWNER, "another")
        self.left = look(self.experiment.run.id)
        if self.hears:
            self.experiment.opened.lease.renew()


@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_more_is_written_to_a_run_that_was_taken_over(
    tone_manifest: Manifest, project: Path, hears: bool, interrupted: bool
) -> None:
    experiment = Experiment.create(SETTINGS, project=project, name="toy")
    trainer = toy_trainer(tone_manifest, stop_at=7 if interrupted else None)
    observer = TakenOver(experiment, hears)
    trainer.attach(observer)
    with suppress(UserError):
        train(experiment, trainer)
    assert look(experiment.run.id) == observer.left
    assert mlflow.get_run(experiment.run.id).data.tags[OWNER] == "another"
    assert mlflow.get_run(experiment.run.id).info.status == "RUNNING"
    assert mlflow.active_run() is None
    assert not experiment.is_open


def test_a_run_that_goes_on_shows_life_from_when_it_was_taken(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=3), project)
    assert mlflow.get_run(first.run.id).data.tags[OWNER] == "", "whoever has ended lets go"
    again = Experiment.resume(first.run.id, project=project)
    thread = again.opened.lease._thread
    assert thread is not None
    assert thread.is_alive()
    with pytest.raises(UserError, match="which showed life"):
        Lease.take(first.run.id, host="elsewhere", locks=project / "runs" / "locks of another machine")
    trainer = toy_trainer(tone_manifest)
    train(again, trainer)
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["w(1)", "a=b", "a//b", "a/", "x" * 251])
def test_a_setting_of_a_name_that_mlflow_refuses_opens_no_run(name: str, project: Path) -> None:
    before = len(mlflow.search_runs(search_all_experiments=True))
    with pytest.raises(UserError, match="MLflow keeps no setting of that name"):
        Experiment.create({"model": {name: 1}}, project=project)
    assert len(mlflow.search_runs(search_all_experiments=True)) == before
