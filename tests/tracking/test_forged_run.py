"""A run whose tags or artifacts are not what was written there is refused by the name of what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from experiments import go_on, new_project, run_experiment, toy_trainer
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import Checkpoint
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.store import find_run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged") / "project"
    folder.mkdir()
    return new_project(folder)


@pytest.fixture(scope="module")
def run_id(project: Path, tone_manifest: Manifest, module_store: str) -> str:
    """A run that was stopped; a resume that is refused leaves it as it is."""
    return run_experiment(toy_trainer(tone_manifest, stop_at=5), project).run.id


@pytest.fixture
def tags(run_id: str) -> Iterator[dict[str, str]]:
    """What the run is tagged with, to be put back."""
    client, before = mlflow.MlflowClient(), find_run(run_id).data.tags
    yield before
    for name in {*find_run(run_id).data.tags} - {*before}:
        client.delete_tag(run_id, name)
    for name, value in before.items():
        client.set_tag(run_id, name, value)


@pytest.mark.parametrize("name", ["{outside}", "../../outside", "..", "a/b", "/"])
def test_a_folder_that_lies_elsewhere(
    name: str, project: Path, run_id: str, tags: dict[str, str], tone_manifest: Manifest, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    mlflow.MlflowClient().set_tag(run_id, "sonosco.folder", name.format(outside=outside))
    with pytest.raises(UserError, match=r"its tag sonosco\.folder is '.*', expected the name of one folder"):
        go_on(run_id, toy_trainer(tone_manifest), project)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("value", ["many", "-1", "", "1e3", "9" * 5000])
@pytest.mark.parametrize("name", ["sonosco.segments", "sonosco.first_step"])
def test_a_tag_that_is_no_number(
    name: str, value: str, project: Path, run_id: str, tags: dict[str, str], tone_manifest: Manifest
) -> None:
    mlflow.MlflowClient().set_tag(run_id, name, value)
    with pytest.raises(UserError, match=f"its tag {name} is '{value}', expected a whole number"):
        go_on(run_id, toy_trainer(tone_manifest), project)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("code/command.json", content) for content in (b"{}", b"[]", b"nonsense", b"\xff")),
        *(("environment/system.json", content) for content in (b"[]", b"{}", b"nonsense")),
        *(("environment/requirements.txt", content) for content in (b"torch\n", b"\xff", b"")),
        ("code/snapshot.zip", b"nonsense"),
        ("config/params.yaml", b"- 1\n"),
    ],
)
def test_a_damaged_artifact(name: str, content: bytes, project: Path, run_id: str, tone_manifest: Manifest) -> None:
    artifact = Path(find_run(run_id).info.artifact_uri.removeprefix("file://")) / name
    before = artifact.read_bytes()
    artifact.write_bytes(content)
    try:
        with pytest.raises(UserError, match=rf"runs:/{run_id}/{name}: not "):
            go_on(run_id, toy_trainer(tone_manifest), project)
    finally:
        artifact.write_bytes(before)


def test_a_checkpoint_of_a_branch_that_is_no_number(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "step-00000004", 4, {}, {}, {"branch": "x"})
    with pytest.raises(UserError, match=r"step-00000004/manifest\.json: the digest 'branch' is 'x', expected a whole"):
        Segment("a" * 32).holds(checkpoint)
