import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest

from experiments import all_artifacts, go_on, new_project, run_experiment, toy_trainer, vanish
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.serialization.checkpoint import Checkpoint, read_checkpoint
from sonosco_mlflow.tracking.journal import JOURNAL, read_rows
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.segments import Branch, Segment, newest_segment
from sonosco_mlflow.tracking.store import download, find_run
from sonosco_mlflow.tracking.tags import SEGMENTS

pytestmark = pytest.mark.usefixtures("tracking_store")
CHANGE = {"config": ("a", "b")}
FASTER = {"config": {"size": 2}, "allowed_changes": ["config"]}


@pytest.fixture
def run() -> TrackedRun:
    with TrackedRun.open("Default", "train") as run:
        return run


def checkpoint(name: str, branch: int = 1, **digests: str) -> Checkpoint:
    return Checkpoint(Path(name), 0, {}, {}, digests if branch == 1 else {**digests, "branch": f"{branch}"})


# ---------------------------------------------------------------------- which way a checkpoint lies on


def test_without_a_change_every_checkpoint_is_on_the_way() -> None:
    segment = Segment("run").next(2, checkpoint("step-00000003"), {}, 5).next(3, None, {}, 7)
    assert segment.branches == ()
    assert segment.branch == 1
    assert segment.differs_until == -1
    assert segment.holds(checkpoint("step-00000009"))


@pytest.mark.parametrize(
    ("name", "branch", "held"),
    [
        ("step-00000010", 1, True),
        ("step-00000010.0001", 1, False),
        ("step-00000011", 1, False),
        ("step-00000011", 2, True),
        ("step-00000012", 2, True),
        ("step-00000013", 2, False),
        ("step-00000013", 4, True),
    ],
)
def test_what_lies_beyond_a_branch_is_left(name: str, branch: int, held: bool) -> None:
    """Segment 2 went on otherwise from step 10, segment 4 from step 12."""
    segment = Segment("run").next(2, checkpoint("step-00000010"), CHANGE, 19)
    segment = segment.next(3, checkpoint("step-00000011", 2), {}, 25)
    segment = segment.next(4, checkpoint("step-00000012", 2), CHANGE, 14)
    assert segment.differs_until == 19
    assert segment.branch == 4
    assert segment.holds(checkpoint(name, branch)) is held


def test_a_run_that_began_anew_has_left_everything() -> None:
    segment = Segment("run").next(2, None, CHANGE, 0)
    assert not segment.holds(checkpoint("step-00000000"))
    assert segment.holds(checkpoint("step-00000000", 2))


def test_what_changed_after_a_checkpoint_is_known() -> None:
    segment = Segment("run").next(2, checkpoint("step-00000010"), {"config": ("a", "b"), "code": ("1", "2")}, 10)
    segment = segment.next(3, checkpoint("step-00000010"), {"config": ("b", "c")}, 10)
    assert segment.changes_since(checkpoint("step-00000010")) == {"config": "c", "code": "2"}
    assert segment.changes_since(None) == {"config": "c", "code": "2"}
    assert segment.changes_since(checkpoint("step-00000011", 2)) == {"config": "c"}
    assert segment.changes_since(checkpoint("step-00000011", 3)) == {}


# ---------------------------------------------------------------------- what a run kept


def test_a_segment_is_read_as_it_was_recorded(run: TrackedRun) -> None:
    assert newest_segment(find_run(run.id)) == Segment(run.id)
    before = checkpoint("step-00000010")
    segment = Segment(run.id).next(2, before, CHANGE, 12)
    run.log_text(segment.record(before), "segments/2/segment.json")
    run.set_tags({SEGMENTS: "2"})
    assert newest_segment(find_run(run.id)) == segment
    assert segment.branches == (Branch(2, "step-00000010", CHANGE, 12),)


def test_a_segment_that_was_killed_as_it_began_does_not_count(run: TrackedRun) -> None:
    second = Segment(run.id, 2)
    run.log_text(second.record(None), "segments/2/segment.json")
    run.log_text("size: 9\n", "segments/4/config/params.yaml")
    run.set_tags({SEGMENTS: "4"})
    assert newest_segment(find_run(run.id)) == second


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"branches": [1]}', '{"branches": [{"segment": "x"}]}'])
def test_a_record_that_cannot_be_read_is_named(run: TrackedRun, text: str) -> None:
    run.log_text(text, "segments/2/segment.json")
    run.set_tags({SEGMENTS: "2"})
    with pytest.raises(UserError, match=f"runs:/{run.id}/segments/2/segment.json: not the record of a segment"):
        newest_segment(find_run(run.id))


def test_the_recipe_of_a_segment_is_read_again(run: TrackedRun) -> None:
    segment = Segment(run.id)
    with pytest.raises(UserError, match=r"has no artifact 'config/params\.yaml'"):
        segment.settings()
    run.log_text("optimizer:\n  lr: 3e-4\n", "config/params.yaml")
    assert segment.settings() == {"optimizer": {"lr": 3e-4}}
    for broken in ("- a\n- b\n", "a: [", "7\n"):
        run.log_text(broken, "config/params.yaml")
        with pytest.raises(UserError, match=f"runs:/{run.id}/config/params.yaml: not a recipe"):
            segment.settings()
    run.log_text("", "config/params.yaml")
    assert segment.settings() == {}


# ---------------------------------------------------------------------- runs that branch


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return new_project(folder)


def values(rows_of: Path, name: str = "train_loss") -> Mapping[int, float]:
    return {row.step: row.metrics[name] for row in read_rows(rows_of / JOURNAL) if name in row.metrics}


def test_what_was_allowed_stays_so_when_the_process_is_killed_before_its_first_checkpoint(
    tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=5), project).run.id
    killed = Experiment.resume(run_id, project=project, **FASTER)  # type: ignore[arg-type]
    trainer = toy_trainer(tone_manifest, learning_rate=0.1)
    killed.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    vanish(killed)
    again = go_on(run_id, toy_trainer(tone_manifest, learning_rate=0.1), project)
    assert again.resumption is not None
    assert again.resumption.settings == {"size": 2}
    assert again.resumption.changes == {}
    assert mlflow.get_run(run_id).data.tags["sonosco.allowed_changes"] == "config"
    learning_rates = values(again.folder, "learning_rate")
    assert (learning_rates[5], learning_rates[6]) == (1e-3, 0.1)
    newest = read_checkpoint(max((again.folder / "checkpoints").iterdir()))
    assert newest.digests["branch"] == "2"
    # Who goes back to what it was before must say so.
    with pytest.raises(UserError, match=r"size was 2, is 1"):
        go_on(run_id, toy_trainer(tone_manifest, epochs=3), project, config={"size": 1})


def test_a_checkpoint_and_a_journal_of_a_way_that_was_left_are_not_continued(
    tone_manifest: Manifest, project: Path, tmp_path: Path
) -> None:
    first = run_experiment(toy_trainer(tone_manifest, stop_at=11), project)
    run_id = first.run.id
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project, elsewhere, ignore=shutil.ignore_patterns("runs"))
    # As if it had been killed before its last checkpoint reached MLflow.
    first.run.delete_artifact("checkpoints/step-00000011")
    second = go_on(run_id, toy_trainer(tone_manifest, learning_rate=0.1, stop_at=9), elsewhere, **FASTER)
    assert "checkpoints/step-00000009/manifest.json" in all_artifacts(run_id)
    with pytest.warns(UserWarning, match="step-00000011: of a way that the run has left; segment 2 went on otherwise"):
        third = go_on(run_id, toy_trainer(tone_manifest, learning_rate=0.1), project)
    note = json.loads(download(run_id, "segments/3/segment.json", tmp_path).read_text())
    assert note["checkpoint"] == "step-00000009"
    assert values(third.folder)[9] == values(second.folder)[9]
    assert (third.folder / "checkpoints" / "broken-step-00000011-1").is_dir()
