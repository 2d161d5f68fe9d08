import signal
from pathlib import Path

import pytest

from sonosco_mlflow import cli, runs
from sonosco_mlflow.config import Config
from sonosco_mlflow.training.interruption import Terminated

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The recipes that `train` was asked for, instead of a training."""
    configs: list[Config] = []

    def train(config: Config, project: Path, *, prepare: bool, results: Path | None) -> runs.Outcome:
        configs.append(config)
        return runs.Outcome("id", {}, [])

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    return configs


def sonosco(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["sonosco", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_key_is_set_either_way(monkeypatch: pytest.MonkeyPatch, asked: list[Config]) -> None:
    arguments = [
        "--params",
        str(PROJECT / "params.yaml"),
        "--set",
        "optimizer.lr=3e-4",
        "--set",
        "augment.time_masks=0",
    ]
    assert sonosco(monkeypatch, "train", *arguments, "--model", "las", "--training.epochs=2") == 0
    assert asked[0].optimizer.lr == 3e-4
    assert asked[0].augment.time_masks == 0
    assert asked[0].model.name == "las"
    assert asked[0].training.epochs == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimzer.lr", "1"], "optimzer.lr: unknown key; did you mean 'optimizer.lr'?"),
        (["--training.epochs", "two"], "training.epochs: found 'two', expected integer"),
        (["--set", "training.epochs"], "--set training.epochs: expected key=value"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--params", "missing.yaml"], "missing.yaml: no recipe here"),
    ],
)
def test_a_mistake_is_one_message_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(PROJECT)
    assert sonosco(monkeypatch, "train", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_a_failure_of_ours_is_one_message_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.chdir(PROJECT)
    assert sonosco(monkeypatch, "train") == 1
    assert capsys.readouterr().err == (
        "sonosco: ZeroDivisionError: division by zero (`sonosco --debug ...` shows where)\n"
    )


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["sonosco", "--debug", "train", "--optimzer.lr", "1"])
    with pytest.raises(Exception, match="unknown key"):
        cli.main()


@pytest.mark.parametrize(
    ("interrupt", "status"), [(KeyboardInterrupt, 128 + signal.SIGINT), (Terminated, 128 + signal.SIGTERM)]
)
def test_a_signal_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException], status: int
) -> None:
    def train(*arguments: object, **options: object) -> None:
        raise interrupt

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.chdir(PROJECT)
    assert sonosco(monkeypatch, "train") == status


def test_an_unknown_verb_is_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sonosco(monkeypatch, "trian") == 2


def test_every_verb_of_the_pipeline_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for verb in ("corpus", "manifest", "features", "data", "train", "evaluate", "transcribe"):
        assert verb in shown
