"""Two runs of a toy, and what `sonosco diff` makes of how they differ."""

import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import pytest
import torch

from experiments import go_on, new_project, run_experiment, toy_trainer, train
from project import run
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.difference_report import difference_page, difference_text
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.reproduction import reproduce
from sonosco_mlflow.runs import resume
from sonosco_mlflow.tracking import origin as origin_module
from sonosco_mlflow.tracking.difference import Difference, difference_of
from sonosco_mlflow.tracking.environment import Environment, describe_environment
from sonosco_mlflow.tracking.rebuilt import Rebuilt
from sonosco_mlflow.tracking.store import find_run, search_runs
from sonosco_mlflow.tracking.tags import LANGUAGE_MODEL_DIGEST
from sonosco_mlflow.tracking.verification import verify_run
from toy import change_a_sample

pytestmark = pytest.mark.usefixtures("module_store")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def code(project: Path) -> Iterator[Path]:
    """The project's module, which a test may change."""
    path = project / "model.py"
    before = path.read_text()
    yield path
    path.write_text(before)


@pytest.fixture(scope="module")
def first(module_store: str, project: Path, tone_manifest: Manifest) -> str:
    torch.set_num_threads(1)
    return run_experiment(toy_trainer(tone_manifest), project).run.id


def compare(first: str, other: Experiment, project: Path) -> Difference:
    return difference_of(first, other.run.id, project)


def test_equal_runs_differ_in_nothing(first: str, tone_manifest: Manifest, project: Path) -> None:
    found = compare(first, run_experiment(toy_trainer(tone_manifest), project), project)
    assert (found.changes, found.code, found.same_weights) == ((), "", True)
    assert found.comparison.partings == ()
    assert found.cause == "nothing that was compared differs, to the last bit"
    text = difference_text(found)
    assert "weights       the same, to the last bit" in text
    assert "likely cause" not in text


def test_another_recipe_is_the_likely_cause(first: str, tone_manifest: Manifest, project: Path) -> None:
    other = Experiment.create({"size": 1, "optimizer": {"lr": 0.002}}, project=project, name="toy")
    train(other, toy_trainer(tone_manifest, learning_rate=2e-3))
    found = compare(first, other, project)
    assert found.cause == "config: optimizer.lr was None, is 0.002"
    assert found.comparison.first is not None
    assert found.comparison.first.step == 1
    assert found.same_weights is False
    text = difference_text(found)
    assert "likely cause  config: optimizer.lr was None, is 0.002" in text
    assert "they part at  step 1: " in text
    losses = next(pair for pair in found.metrics if pair.name == "val_loss")
    assert losses.last[0] != losses.last[1]
    assert None not in losses.lowest
    assert f"{losses.last[0]:.6g}" in text


def test_more_epochs_are_named_and_an_extended_run_is_what_it_says(
    module_store: str, tone_manifest: Manifest, project: Path
) -> None:
    def experiment(epochs: int) -> Experiment:
        return Experiment.create({"size": 1, "training": {"epochs": epochs}}, project=project, name="toy")

    two = train(experiment(2), toy_trainer(tone_manifest))
    three = train(experiment(3), toy_trainer(tone_manifest, epochs=3))
    end = two.history.curve("val_loss")[0][-1]
    found = compare(two.run.id, three, project)
    assert found.cause == (
        f"one went further (training.epochs was 2, is 3); up to step {end} nothing differs, to the last bit"
    )
    extended = go_on(two.run.id, toy_trainer(tone_manifest, epochs=3), project)
    assert verify_run(extended.run.id).findings == ()
    again = compare(three.run.id, extended, project)
    assert again.comparison.partings == ()
    assert again.same_weights


def test_other_code_is_shown_line_by_line(first: str, tone_manifest: Manifest, project: Path, code: Path) -> None:
    code.write_text("x = 2  # <b>not bold</b>\n")
    found = compare(first, run_experiment(toy_trainer(tone_manifest), project), project)
    assert [(change.name, change.what, change.matters) for change in found.changes] == [("code", ("model.py",), True)]
    assert "-x = 1\n+x = 2  # <b>not bold</b>\n" in found.code
    assert found.cause == (
        "nothing that was compared differs, to the last bit; what differs in their inputs (code) made no difference"
    )
    assert difference_text(found).endswith(found.code)
    page = difference_page(found)
    assert "&lt;b&gt;not bold" in page
    assert "<b>not" not in page


def test_files_that_no_training_runs_can_have_changed_nothing(
    first: str, tone_manifest: Manifest, project: Path
) -> None:
    for name in ("README.md", "tests/test_model.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("new\n")
    try:
        found = compare(first, run_experiment(toy_trainer(tone_manifest), project), project)
    finally:
        shutil.rmtree(project / "tests")
        (project / "README.md").unlink()
    (change,) = found.changes
    assert (change.what, change.matters) == (("README.md", "tests/test_model.py"), False)
    assert "code (can have changed nothing)\n  README.md" in difference_text(found)


def test_a_file_that_a_program_reads_may_have_done_it(first: str, tone_manifest: Manifest, project: Path) -> None:
    path = project / "conf" / "model.yaml"
    path.parent.mkdir()
    path.write_text("lr: 0.002\n")
    try:
        found = compare(first, run_experiment(toy_trainer(tone_manifest, learning_rate=2e-3), project), project)
    finally:
        shutil.rmtree(path.parent)
    assert found.cause == "code: conf/model.yaml"


def decoded(beam: int, manifest: Manifest, project: Path) -> Experiment:
    recipe = Config.resolve({"decoding": {"beam": beam}}, {})
    return train(Experiment.create(recipe, project=project, name="decoded"), toy_trainer(manifest))


def worse_in_its_test(run_id: str, database: str) -> None:
    query = "UPDATE metrics SET value = value + 1 WHERE key = 'test_word_error_rate' AND run_uuid = ?"
    with sqlite3.connect(database.removeprefix("sqlite:///")) as connection:
        connection.execute(query, [run_id])


def test_how_the_test_set_is_decoded_matters_to_what_comes_of_it_alone(
    module_store: str, tone_manifest: Manifest, project: Path
) -> None:
    one, other = (decoded(beam, tone_manifest, project) for beam in (1, 4))
    lines = ("decoding.beam was 1, is 4",)
    found = compare(one.run.id, other, project)
    assert [(change.name, change.what, change.matters) for change in found.changes] == [("decoding", lines, False)]
    worse_in_its_test(other.run.id, module_store)
    assert compare(one.run.id, other, project).cause == f"decoding: {lines[0]}"
    for run_id, digest in ((one.run.id, "a" * 64), (other.run.id, "b" * 64)):
        mlflow.MlflowClient().set_tag(run_id, LANGUAGE_MODEL_DIGEST, digest)
    cause = compare(one.run.id, other, project).cause
    assert cause == f"decoding: {lines[0]}, the language model (bbbbbbbbbbbb, was aaaaaaaaaaaa)"


def test_other_data_environment_and_arithmetic_are_each_named(
    first: str, tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(threads: int, canary: str, folder: Path) -> Environment:
        found = describe_environment(threads, canary, folder)
        pins = found.requirements.replace("torch==2.11.0", "torch==2.12.0")
        return replace(found, requirements=pins, system={**found.system, "threads": 2, "canary": "another"})

    manifest = Manifest(
        [replace(item, speaker="another") if item.id == tone_manifest[0].id else item for item in tone_manifest],
        tone_manifest.root,
    )
    with monkeypatch.context() as patch:
        patch.setattr(origin_module, "describe_environment", elsewhere)
        other = run_experiment(toy_trainer(manifest), project)
    found = compare(first, other, project)
    named = {change.name: change.summary for change in found.changes}
    assert named.keys() == {"data", "environment", "numerics"}
    assert re.search(r"the train manifest \(\w{12}, was \w{12}\)", named["data"])
    assert named["environment"] == "torch 2.11.0 -> 2.12.0"
    assert named["numerics"] == "threads was 1, is 2"


def test_one_sample_of_a_recording_that_dvc_does_not_know_is_named(
    first: str, tone_manifest: Manifest, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = mlflow.get_run(first).inputs.dataset_inputs
    assert {item.dataset.name for item in inputs} == {"train", "dev", "test"}
    shutil.copytree(tone_manifest.root, tmp_path / "tones")
    manifest = Manifest(tone_manifest, tmp_path / "tones")
    capsys.readouterr()
    same = run_experiment(toy_trainer(manifest), project)
    assert "DVC does not version this data" in capsys.readouterr().err
    assert compare(first, same, project).changes == ()
    path = manifest.audio_path(manifest[3])
    change_a_sample(path)
    found = compare(first, run_experiment(toy_trainer(manifest), project), project)
    names = "the dev recordings, the test recordings, the train recordings"
    assert found.cause == f"data: {names}"
    stopped = run_experiment(toy_trainer(manifest, stop_at=4), project)
    shutil.copyfile(tone_manifest.audio_path(tone_manifest[3]), path)
    with pytest.raises(UserError, match=f"data: {names}"):
        go_on(stopped.run.id, toy_trainer(manifest), project)


def test_a_run_that_took_another_way_says_where(tone_manifest: Manifest, project: Path, code: Path, first: str) -> None:
    stopped = run_experiment(toy_trainer(tone_manifest, stop_at=5), project)
    unfinished = compare(first, stopped, project)
    assert unfinished.same_weights is None
    assert "only the original has" in str(unfinished.comparison.first)
    assert unfinished.cause == (
        f"one went further (run {stopped.run.id} is interrupted); up to step 5 nothing differs, to the last bit"
    )
    code.write_text("x = 3\n")
    other = go_on(stopped.run.id, toy_trainer(tone_manifest), project, allowed_changes=["code"])
    found = compare(first, other, project)
    assert found.branches == (f"run {other.run.id} went on otherwise in segment 2, after step-00000005 (code changed)",)
    assert found.branches[0] in difference_text(found)
    assert found.branches[0] in difference_page(found)


def test_a_run_of_a_program_of_its_own_is_no_recipe(first: str, project: Path) -> None:
    with pytest.raises(UserError, match=rf'there Experiment.resume\("{first}"\) continues it'):
        resume(first, project)


def test_no_reproduction_goes_beyond_the_end(first: str, project: Path) -> None:
    with pytest.raises(UserError, match=r"came to step 12: --until-step 13 has nothing to be compared with"):
        reproduce(first, project, until_step=13)


def test_a_reproduction_that_cannot_begin_has_failed(
    first: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends before it has opened the run."""
    monkeypatch.setattr(Rebuilt, "canary", lambda self, device: self.environment.system["canary"])
    monkeypatch.setattr(Rebuilt, "run", lambda *_: 1)
    with pytest.raises(UserError, match="ended with status 1"):
        reproduce(first, project, environment_manager="local")
    condition = f"tags.`sonosco.reproduces` = '{first}'"
    (made,) = search_runs([find_run(first).info.experiment_id], condition)
    assert (made.data.tags["sonosco.state"], made.info.status) == ("failed", "FAILED")


class Balanced(HTMLParser):
    """Notes tags that are not closed, and what the page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loads += [
            str(value) for key, value in attrs if key in ("src", "href") and not str(value).startswith("data:")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_command_prints_it_and_writes_one_page(
    first: str, tone_manifest: Manifest, project: Path, tmp_path: Path, code: Path, module_store: str
) -> None:
    code.write_text("x = 4\n")
    other = run_experiment(toy_trainer(tone_manifest, learning_rate=2e-3), project)
    source = Path(__file__).parents[1] / "src"
    command = [
        "python",
        "-m",
        "sonosco_mlflow",
        "diff",
        first,
        other.run.id,
        "--html",
        str(tmp_path / "a" / "page.html"),
    ]
    variables = {"MLFLOW_TRACKING_URI": module_store, "PYTHONPATH": str(source)}
    said = run(command, project, variables=variables).stdout
    assert "likely cause  code: model.py" in said
    page = (tmp_path / "a" / "page.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert (parser.open, parser.loads) == ([], [])
    for expected in (
        first,
        other.run.id,
        "Likely cause: code: model.py",
        '<span class="added">+x = 4</span>',
        "val_loss",
    ):
        assert expected in page
    assert 'src="data:image/png;base64,iVBOR' in page


def test_what_is_no_training_is_refused(first: str, project: Path) -> None:
    other = mlflow.MlflowClient().create_run("0").info.run_id
    with pytest.raises(UserError, match=f"run {other} is no training"):
        difference_of(first, other, project)
    with pytest.raises(UserError, match="is not in the tracking store"):
        difference_of("nonsense", first, project)
