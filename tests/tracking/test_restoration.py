import shutil
import stat
from pathlib import Path

import pytest

from project import make_project, run
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.data_lock import lock_text, stage_outputs
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import prepare_data
from sonosco_mlflow.tracking.restoration import restore_data

# The quick case stands in test_pipeline.py, where a project is at hand.
pytestmark = pytest.mark.slow
DVC = ["python", "-m", "dvc"]


class Kept:
    """A project, and what a run on its data kept."""

    def __init__(self, folder: Path) -> None:
        self.project = make_project(folder / "project")
        self.remote = folder / "remote"
        self.config = Config.load(self.project / "params.yaml")
        self.data = prepare_data(self.config, self.project)
        self.lock = lock_text(self.data)
        self.lineage = DataLineage.of_folder(self.data)
        self.features = contents(self.data.features("tones"))
        run([*DVC, "remote", "add", "--default", "storage", "../remote"], self.project)
        run([*DVC, "push", *stage_outputs(self.data)], self.project)

    def restore(self, lock: str | None = "", expected: str | None = None) -> DataFolder:
        return restore_data(self.config, self.project, lock or self.lock, expected or self.lineage.digest)

    @property
    def cache(self) -> Path:
        return self.project / ".dvc" / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("restoration"))


@pytest.fixture
def kept(before: Kept) -> Kept:
    """The project as a run left it."""
    shutil.rmtree(before.project / ".sonosco", ignore_errors=True)
    shutil.rmtree(before.data.root, ignore_errors=True)
    run([*DVC, "pull", "--force", *stage_outputs(before.data)], before.project)
    return before


@pytest.fixture
def no_stage_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a stage was run")

    monkeypatch.setattr("sonosco_mlflow.tracking.restoration.reproduce", refuse)


@pytest.mark.usefixtures("no_stage_may_run")
def test_a_changed_manifest_is_not_accepted_and_a_restored_folder_serves_again(kept: Kept) -> None:
    manifest = kept.data.manifest("train")
    manifest.write_text(manifest.read_text().replace('"duration": 0.', '"duration": 9.', 1))
    assert DataLineage.of_folder(kept.data).digest != kept.lineage.digest
    restored = kept.restore()
    assert DataLineage.of_folder(restored).digest == kept.lineage.digest
    assert kept.restore() == restored
    # And so is one that was edited there.
    restored.manifest("dev").write_text(manifest.read_text())
    assert DataLineage.of_folder(kept.restore()).digest == kept.lineage.digest


@pytest.mark.usefixtures("no_stage_may_run")
def test_what_the_cache_has_lost_comes_from_the_remote(kept: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    local = kept.project / ".dvc" / "config.local"
    local.write_text('[remote "other"]\n    url = ssh://user@nowhere\n    password = secret\n')
    shutil.rmtree(kept.data.root)
    shutil.rmtree(kept.cache)
    try:
        restored = kept.restore()
    finally:
        local.unlink()
    assert contents(restored.features("tones")) == kept.features
    assert DataLineage.of_folder(restored).digest == kept.lineage.digest
    copy = restored.root.parent / ".dvc" / "config.local"
    assert "secret" in copy.read_text()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    said = capfd.readouterr()
    assert "secret" not in said.out + said.err
    assert "--remote storage" in said.err


def test_what_is_nowhere_is_made_again_or_refused(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = (kept.project / "dvc.lock").read_bytes()
    shutil.rmtree(kept.data.root)
    shutil.rmtree(kept.cache)
    kept.remote.rename(kept.remote.with_name("away"))
    try:
        restored = kept.restore()
        assert contents(restored.features("tones")) == kept.features
        assert (kept.project / "dvc.lock").read_bytes() == lock
        assert not kept.data.root.exists()

        with pytest.raises(UserError, match=f"recipe makes other data now.*{kept.lineage.digest[:12]}.*it differs"):
            restore_data(kept.config, kept.project, None, "f" * 64, lambda lineage: f"{lineage.digest}: it differs")

        shutil.rmtree(restored.root.parent)
        shutil.rmtree(kept.cache)
        (kept.project / "tones").rename(kept.project / "away")
        with pytest.raises(UserError, match=r"cannot be made again: data\.corpora\.tones\.source: found 'tones'"):
            kept.restore()
    finally:
        kept.remote.with_name("away").rename(kept.remote)
        if (kept.project / "away").exists():
            (kept.project / "away").rename(kept.project / "tones")
