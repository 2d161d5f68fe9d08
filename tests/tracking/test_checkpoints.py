import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import (
    MANIFEST,
    BrokenCheckpointError,
    Snapshot,
    checkpoints_in,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from sonosco_mlflow.serialization.durable import remove_directory
from sonosco_mlflow.tracking.checkpoints import fetch_checkpoint, newest_checkpoint, upload_checkpoint
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.store import download, find_run
from sonosco_mlflow.tracking.tags import CHECKPOINT

pytestmark = pytest.mark.usefixtures("tracking_store")
FILES = ["model.safetensors", "objects.json", "state.json"]


class Recorder(TrackedRun):
    """A run that notes what is changed in it, and can fail at a file."""

    def __init__(self) -> None:
        opened = TrackedRun.open("Default", "train")
        opened.end("interrupted")
        super().__init__(find_run(opened.id))
        self.doings: list[str] = []
        self.failing = ""
        self.meanwhile: Callable[[], object] = lambda: None

    def log_file(self, path: Path, folder: str = "") -> None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        if path.name == self.failing:
            raise ConnectionError("the server is away")
        self.doings.append(f"put {folder}/{path.name}")
        super().log_file(path, folder)

    def delete_artifact(self, name: str) -> None:
        self.doings.append(f"delete {name}")
        super().delete_artifact(name)

    def set_tags(self, tags: dict[str, str]) -> None:  # type: ignore[override]
        self.doings += [f"tag {key}={value}" for key, value in tags.items()]
        super().set_tags(tags)

    def done(self) -> list[str]:
        doings, self.doings = self.doings, []
        return doings


@pytest.fixture
def run() -> Recorder:
    return Recorder()


def write(folder: Path, step: int, value: float = 1.0) -> Path:
    state = {"model": {"weight": torch.full((3,), value * step)}}
    return write_checkpoint(folder, Snapshot.take({"class": "x"}, state, step, digests={"code": "c"}))


def kept(*steps: int) -> frozenset[str]:
    return frozenset(f"step-{step:08d}" for step in steps)


def stored(run: TrackedRun) -> list[str]:
    return sorted(run.artifacts_in("checkpoints"))


def break_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------- there


def test_the_manifest_goes_after_the_files_and_the_tag_after_the_manifest(run: Recorder, checkpoints: Path) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    folder = "checkpoints/step-00000001"
    assert run.done() == [
        *(f"put {folder}/{name}" for name in FILES),
        f"put {folder}/{MANIFEST}",
        f"tag {CHECKPOINT}={folder}",
    ]


@pytest.mark.parametrize("failing", [*FILES, MANIFEST])
def test_an_upload_that_was_cut_off_is_no_checkpoint_and_can_be_made_again(
    run: Recorder, checkpoints: Path, tmp_path: Path, failing: str
) -> None:
    directory = write(checkpoints, 1)
    run.failing = failing
    with pytest.raises(ConnectionError):
        upload_checkpoint(run, directory, kept(1))
    assert MANIFEST not in run.artifacts_in("checkpoints/step-00000001")
    assert CHECKPOINT not in find_run(run.id).data.tags
    if failing != FILES[0]:
        with pytest.warns(UserWarning, match="passed over a checkpoint"):
            assert newest_checkpoint(Segment(run.id), tmp_path / "elsewhere") is None

    run.failing = ""
    upload_checkpoint(run, directory, kept(1))
    verify_checkpoint(download(run.id, "checkpoints/step-00000001", tmp_path / "back"))


def test_one_that_the_run_has_already_is_not_uploaded_again(run: Recorder, checkpoints: Path) -> None:
    directory = write(checkpoints, 1)
    upload_checkpoint(run, directory, kept(1))
    run.done()
    upload_checkpoint(run, directory, kept(1))
    assert run.done() == [f"tag {CHECKPOINT}=checkpoints/step-00000001"]


def test_one_that_is_replaced_loses_its_manifest_first(run: Recorder, checkpoints: Path, tmp_path: Path) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    run.done()
    upload_checkpoint(run, write(checkpoints, 1, value=2.0), kept(1))
    folder = "checkpoints/step-00000001"
    assert run.done() == [
        f"delete {folder}/{MANIFEST}",
        *(f"put {folder}/{name}" for name in FILES),
        f"put {folder}/{MANIFEST}",
        f"tag {CHECKPOINT}={folder}",
    ]
    back = read_checkpoint(download(run.id, folder, tmp_path / "back"))
    assert back.state["model"]["weight"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_one_that_is_broken_in_the_store_is_replaced_where_that_is_asked_for(
    run: Recorder, checkpoints: Path, tmp_path: Path, name: str
) -> None:
    directory = write(checkpoints, 1)
    upload_checkpoint(run, directory, kept(1))
    broken = tmp_path / name
    broken.write_bytes((directory / name).read_bytes())
    break_file(broken)
    run.log_file(broken, "checkpoints/step-00000001")
    with pytest.warns(UserWarning, match=f"runs:/{run.id}/checkpoints/step-00000001.*{name}"):
        upload_checkpoint(run, directory, kept(1), verify=True)
    verify_checkpoint(download(run.id, "checkpoints/step-00000001", tmp_path / "back"))
    run.done()
    upload_checkpoint(run, directory, kept(1), verify=True)
    assert run.done() == [f"tag {CHECKPOINT}=checkpoints/step-00000001"], "what is whole is not uploaded again"


def test_those_that_are_kept_stay_and_no_other(run: Recorder, checkpoints: Path) -> None:
    run.log_text("mine", "checkpoints/notes.txt")
    for step, names in ((1, kept(1)), (2, kept(1, 2)), (3, kept(1, 2, 3)), (5, kept(1, 5))):
        upload_checkpoint(run, write(checkpoints, step), names)
    assert stored(run) == ["notes.txt", "step-00000001", "step-00000005"]
    # Only once the newer one is whole.
    done = run.done()
    assert done.index(f"tag {CHECKPOINT}=checkpoints/step-00000005") < done.index("delete checkpoints/step-00000002")


def test_an_older_one_is_deleted_by_no_upload_that_failed(run: Recorder, checkpoints: Path) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    run.failing = MANIFEST
    with pytest.raises(ConnectionError):
        upload_checkpoint(run, write(checkpoints, 2), kept(2))
    assert "step-00000001" in stored(run)
    assert find_run(run.id).data.tags[CHECKPOINT] == "checkpoints/step-00000001"


def test_one_that_was_removed_before_its_turn_is_passed_over(run: Recorder, checkpoints: Path) -> None:
    directory = write(checkpoints, 1)
    shutil.rmtree(directory)
    upload_checkpoint(run, directory, kept(1))
    assert run.done() == []
    assert stored(run) == []


# ---------------------------------------------------------------------- and back


def test_without_any_there_is_none(run: Recorder, checkpoints: Path, tmp_path: Path) -> None:
    assert newest_checkpoint(Segment(run.id), checkpoints) is None
    checkpoints.mkdir()
    assert newest_checkpoint(Segment(run.id), checkpoints) is None
    with pytest.raises(UserError, match=f"run {run.id} has kept no whole checkpoint"):
        fetch_checkpoint(f"runs:/{run.id}", tmp_path)


def test_the_one_on_this_machine_is_used_where_it_is_the_newest(
    run: Recorder, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    newer = write(checkpoints, 2)
    monkeypatch.setattr("sonosco_mlflow.tracking.checkpoints.download", lambda *_: pytest.fail("nothing to fetch"))
    found = newest_checkpoint(Segment(run.id), checkpoints)
    assert found is not None
    assert (found.directory, found.step, found.digests) == (newer, 2, {"code": "c"})


@pytest.mark.parametrize("where", ["same folder", "empty folder"])
def test_the_one_in_mlflow_is_brought_here_where_it_is_the_newest(
    run: Recorder, checkpoints: Path, tmp_path: Path, where: str
) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    newer = write(checkpoints, 2)
    upload_checkpoint(run, newer, kept(1, 2))
    content = {path.name: path.read_bytes() for path in newer.iterdir()}
    shutil.rmtree(newer if where == "same folder" else checkpoints)
    found = newest_checkpoint(Segment(run.id), checkpoints)
    assert found is not None
    assert found.directory == newer
    assert {path.name: path.read_bytes() for path in newer.iterdir()} == content
    assert not list(checkpoints.glob(".partial-*"))


def test_a_finer_position_is_newer(run: Recorder, checkpoints: Path) -> None:
    write(checkpoints, 1)
    state = {"model": {"weight": torch.zeros(1)}}
    within = write_checkpoint(checkpoints, Snapshot.take({}, state, 1, batches=2))
    found = newest_checkpoint(Segment(run.id), checkpoints)
    assert found is not None
    assert found.directory == within


def test_a_broken_one_is_put_aside_and_its_copy_in_mlflow_is_used(run: Recorder, checkpoints: Path) -> None:
    write(checkpoints, 1)
    newest = write(checkpoints, 2)
    upload_checkpoint(run, newest, kept(1, 2))
    break_file(newest / "model.safetensors")
    altered = (newest / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="passed over a checkpoint") as warned:
        found = newest_checkpoint(Segment(run.id), checkpoints)
    (message,) = [str(warning.message) for warning in warned]
    assert f"{newest / 'model.safetensors'}: altered" in message
    assert "put aside as broken-step-00000002-1" in message
    assert found is not None
    assert found.directory == newest
    verify_checkpoint(newest)
    assert (checkpoints / "broken-step-00000002-1" / "model.safetensors").read_bytes() == altered
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-00000001", "step-00000002"]


def test_a_broken_one_without_a_copy_is_passed_over_for_the_one_before(run: Recorder, checkpoints: Path) -> None:
    older = write(checkpoints, 1)
    (write(checkpoints, 2) / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002/state\.json: missing"):
        found = newest_checkpoint(Segment(run.id), checkpoints)
    assert found is not None
    assert found.directory == older


def test_one_that_is_broken_in_mlflow_is_named_by_its_address_and_left_there(
    run: Recorder, checkpoints: Path, tmp_path: Path
) -> None:
    for step in (1, 2):
        upload_checkpoint(run, write(checkpoints, step), kept(1, 2))
    broken = tmp_path / "state.json"
    broken.write_text("{}")
    run.log_file(broken, "checkpoints/step-00000002")
    shutil.rmtree(checkpoints)
    with pytest.warns(UserWarning, match="passed over a checkpoint") as warned:
        found = newest_checkpoint(Segment(run.id), checkpoints)
    (message,) = [str(warning.message) for warning in warned]
    assert f"runs:/{run.id}/checkpoints/step-00000002/state.json: altered" in message
    assert str(tmp_path) not in message
    assert found is not None
    assert found.step == 1
    assert stored(run) == ["step-00000001", "step-00000002"]
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]


def test_when_all_are_broken_there_is_none(run: Recorder, checkpoints: Path) -> None:
    for step in (1, 2):
        break_file(write(checkpoints, step) / "model.safetensors")
    with pytest.warns(UserWarning, match="passed over a checkpoint") as warned:
        assert newest_checkpoint(Segment(run.id), checkpoints) is None
    assert [str(warning.message).count("step-0000000") > 0 for warning in warned] == [True, True]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["broken-step-00000001-1", "broken-step-00000002-1"]


def test_what_an_earlier_fetch_left_half_done_is_no_hindrance(run: Recorder, checkpoints: Path) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    shutil.rmtree(checkpoints)
    leftover = checkpoints / ".partial-step-00000001" / "checkpoints" / "step-00000001"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    (leftover / "surplus").write_text("half")
    found = newest_checkpoint(Segment(run.id), checkpoints)
    assert found is not None
    assert sorted(path.name for path in found.directory.iterdir()) == sorted([*FILES, MANIFEST])


def test_an_address_names_a_run_or_one_checkpoint(run: Recorder, checkpoints: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        upload_checkpoint(run, write(checkpoints, step), kept(1, 2))
    assert read_checkpoint(fetch_checkpoint(f"runs:/{run.id}", tmp_path)).step == 2
    assert read_checkpoint(fetch_checkpoint(f"runs:/{run.id}/checkpoints/step-00000001", tmp_path)).step == 1
    with pytest.raises(UserError, match=r"has no artifact 'checkpoints/step-00000007'"):
        fetch_checkpoint(f"runs:/{run.id}/checkpoints/step-00000007", tmp_path)
    with pytest.raises(UserError, match="'nonsense' is not in the tracking store"):
        fetch_checkpoint("runs:/nonsense", tmp_path)


def test_of_a_run_whose_newest_is_broken_the_one_before_is_fetched(
    run: Recorder, checkpoints: Path, tmp_path: Path
) -> None:
    for step in (1, 2):
        upload_checkpoint(run, write(checkpoints, step), kept(1, 2))
    run.log_file(checkpoints / "step-00000001" / MANIFEST, "checkpoints/step-00000002")
    with pytest.warns(UserWarning, match="step-00000002"):
        assert read_checkpoint(fetch_checkpoint(f"runs:/{run.id}", tmp_path)).step == 1
    with pytest.raises(BrokenCheckpointError):
        read_checkpoint(fetch_checkpoint(f"runs:/{run.id}/checkpoints/step-00000002", tmp_path))


# ---------------------------------------------------------------------- written while it is delivered


def test_a_checkpoint_that_is_removed_while_it_is_delivered_is_passed_over(run: Recorder, checkpoints: Path) -> None:
    upload_checkpoint(run, write(checkpoints, 1), kept(1))
    directory = write(checkpoints, 2)
    run.meanwhile = partial(remove_directory, directory)
    upload_checkpoint(run, directory, kept(2))
    assert find_run(run.id).data.tags[CHECKPOINT] == "checkpoints/step-00000001"
    assert MANIFEST not in run.artifacts_in("checkpoints/step-00000002")
    upload_checkpoint(run, write(checkpoints, 3), kept(3))
    assert stored(run) == ["step-00000003"]


def test_a_checkpoint_that_is_replaced_while_it_is_delivered_never_looks_whole_unless_it_is(
    run: Recorder, checkpoints: Path, tmp_path: Path
) -> None:
    directory = write(checkpoints, 1)
    run.meanwhile = partial(write, checkpoints, 1, value=2.0)
    upload_checkpoint(run, directory, kept(1))
    with pytest.raises(BrokenCheckpointError):
        verify_checkpoint(download(run.id, "checkpoints/step-00000001", tmp_path / "mixed"))
    # The new one has its own turn.
    upload_checkpoint(run, directory, kept(1))
    found = read_checkpoint(download(run.id, "checkpoints/step-00000001", tmp_path / "back"))
    assert found.state["model"]["weight"].tolist() == [2.0] * 3
