"""Language models from their training to the numbers that they change, on the data of a project that stands ready."""

from pathlib import Path

import mlflow
import pytest

from project import make_data, make_project
from sonosco_mlflow import cli
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.decoding.arpa import read_arpa
from sonosco_mlflow.decoding.search import GREEDY
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.language_models import train_language_model
from sonosco_mlflow.runs import resume, train
from sonosco_mlflow.tracking.rebuilt import restore_language_model
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.trained import evaluate, recognizer_of

pytestmark = pytest.mark.usefixtures("tracking_store")
SEARCH = {
    "decoding.beam": "4",
    "decoding.language_model": "data/tones.arpa",
    "decoding.language_model_weight": "0.7",
    "decoding.length_reward": "0.3",
}
PLAIN = {"decoding.beam": "1", "decoding.language_model": "null", "decoding.length_reward": "0.0"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(make_project(tmp_path_factory.mktemp("searched") / "project"))


@pytest.fixture
def arpa(project: Path) -> Path:
    path = project / "data" / "tones.arpa"
    train_language_model(DataFolder(project / "data"), "tokens", 3, path)
    return path


def recipe(project: Path, overrides: dict[str, str] | None = None) -> Config:
    return Config.load(project / "params.yaml", overrides or {})


def children(run_id: str) -> list[mlflow.entities.Run]:
    found = mlflow.MlflowClient().search_runs(["0"], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return sorted(found, key=lambda run: int(run.info.start_time))


def test_a_language_model_is_made_of_the_training_transcripts(project: Path, arpa: Path, tmp_path: Path) -> None:
    first = arpa.read_bytes()
    data = DataFolder(project / "data")
    train_language_model(data, "tokens", 3, arpa)
    assert arpa.read_bytes() == first
    ngrams = read_arpa(arpa)
    assert len(ngrams.orders) == 3
    assert set(ngrams.words) <= {"<unk>", "<s>", "</s>", *"ABCDE"}
    assert "of the training manifest" in ngrams.comments[0]
    train_language_model(data, "words", 2, tmp_path / "words.arpa")
    assert all(len(word) > 1 for word in read_arpa(tmp_path / "words.arpa").words)


def test_the_command_line_makes_one_of_the_recipe_s_own_data(
    project: Path, arpa: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project / "elsewhere" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_bytes((project / "params.yaml").read_bytes())
    monkeypatch.chdir(project)
    options = ["--params", str(recipe), "--no-prepare", "--order", "3", "--into", "data/by_hand.arpa"]
    monkeypatch.setattr("sys.argv", ["sonosco", "language-model", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (project / "data" / "by_hand.arpa").read_bytes() == arpa.read_bytes()
    assert "data/by_hand.arpa: 8, " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sonosco", "language-model", *options, "--set", "tokenizer.size=7"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "train.jsonl: there is no such manifest" in capsys.readouterr().err


def test_a_run_is_decoded_as_its_recipe_says_and_keeps_what_it_takes(project: Path, arpa: Path) -> None:
    outcome = train(recipe(project, SEARCH), project, prepare=False)
    assert outcome is not None
    run = mlflow.get_run(outcome.run_id)
    assert run.data.params["config.decoding.beam"] == "4"
    kept = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/decoding/language_model.arpa")
    assert kept == arpa.read_text(encoding="utf-8")
    assert len(run.data.tags["sonosco.language_model_digest"]) == 64

    # Nothing is needed but what the run kept.
    arpa.unlink()
    again = evaluate(outcome.run_id, project, prepare=False)
    (evaluated,) = children(outcome.run_id)
    assert evaluated.data.tags["sonosco.reproduced"] == "true"
    assert evaluated.data.tags["sonosco.language_model_digest"] == run.data.tags["sonosco.language_model_digest"]
    assert [row.hypothesis for row in again.results] == [row.hypothesis for row in outcome.results]
    recognizer = recognizer_of(outcome.run_id, project)
    sound = next((project / "tones").glob("*.wav"))
    ((total, text),) = recognizer.file_hypotheses(sound)
    assert (recognizer.search.beam, recognizer.search.length_reward) == (4, 0.3)
    several = recognizer_of(outcome.run_id, project, overrides={"decoding.beam": "6"}, n_best=3).file_hypotheses(sound)
    assert len(several) == 3
    assert several[0][0] >= total
    assert recognizer.transcribe_file(sound) == text
    # What is not asked for stays as it was recorded.
    beams = [
        recognizer_of(outcome.run_id, project, overrides=overrides, n_best=n_best).search.beam
        for overrides, n_best in (({"decoding.length_reward": "0"}, 1), ({}, 2), ({}, 5), ({"decoding.beam": "1"}, 1))
    ]
    assert beams == [4, 4, 5, 1]

    greedy = evaluate(outcome.run_id, project, prepare=False, overrides=PLAIN)
    assert "sonosco.reproduced" not in children(outcome.run_id)[-1].data.tags
    assert children(outcome.run_id)[-1].data.params["config.decoding.beam"] == "1"
    assert greedy.metrics["test_loss"] == again.metrics["test_loss"]
    with pytest.raises(UserError, match=r"training\.epochs: of a trained model only decoding\.\* can be set"):
        evaluate(outcome.run_id, project, prepare=False, overrides={"training.epochs": "3"})
    with pytest.raises(UserError, match=r"other.arpa: no such language model"):
        evaluate(outcome.run_id, project, prepare=False, overrides={"decoding.language_model": "other.arpa"})


def test_validation_is_greedy_whatever_the_test_set_is_decoded_with(project: Path, arpa: Path) -> None:
    searched, plain = (train(recipe(project, keys), project, prepare=False) for keys in (SEARCH, {}))
    assert searched is not None
    assert plain is not None
    assert searched.metrics["val_word_error_rate"] == plain.metrics["val_word_error_rate"]
    tags = [mlflow.get_run(outcome.run_id).data.tags for outcome in (searched, plain)]
    assert tags[0]["sonosco.weights_digest"] == tags[1]["sonosco.weights_digest"]
    assert [row.hypothesis for row in searched.results] != [row.hypothesis for row in plain.results]
    assert recognizer_of(plain.run_id, project).search == GREEDY


def test_a_stopped_run_is_decoded_with_what_it_kept_or_with_what_it_is_told(project: Path, arpa: Path) -> None:
    whole = train(recipe(project, SEARCH), project, prepare=False)
    assert whole is not None
    runs = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(project, SEARCH), project, prepare=False, until_step=2)
        runs.append(mlflow.search_runs(["0"], output_format="list", max_results=1)[0].info.run_id)
    arpa.unlink()
    assert [one.data.tags["sonosco.state"] for one in map(mlflow.get_run, runs)] == ["interrupted"] * 2
    gone_on = resume(runs[0], project, prepare=False)
    assert gone_on is not None
    assert gone_on.metrics == whole.metrics
    other = resume(runs[1], project, overrides={"decoding.beam": "2"}, prepare=False)
    assert other is not None
    # What makes the run again decodes as it was decoded at its end.
    assert Segment(runs[1]).settings()["decoding"]["beam"] == 2


def test_what_is_made_again_decodes_with_the_same_language_model(project: Path, arpa: Path, tmp_path: Path) -> None:
    outcome = train(recipe(project, SEARCH), project, prepare=False)
    assert outcome is not None
    content = arpa.read_bytes()
    arpa.unlink()
    settings = Segment(outcome.run_id).settings()
    restore_language_model(Segment(outcome.run_id), settings, tmp_path)
    assert settings["decoding"]["language_model"] == "data/language_model.arpa"
    assert Config.resolve(settings, {}).decoding.beam == 4
    assert (tmp_path / "data" / "language_model.arpa").read_bytes() == content


def test_a_language_model_of_other_tokens_stops_a_run_before_it_trains(project: Path, arpa: Path) -> None:
    arpa.write_text(arpa.read_text(encoding="utf-8").replace("# tokens: ", "# tokens: 0"), encoding="utf-8")
    with pytest.raises(UserError, match=r"tones.arpa: it was made for another vocabulary"):
        train(recipe(project, SEARCH), project, prepare=False)
    run = mlflow.search_runs(["0"], output_format="list", max_results=1)[0]
    assert run.data.tags["sonosco.state"] == "failed"
    assert "train_loss" not in run.data.metrics
