import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sonosco_mlflow import cli, reproduction, runs, trained
from sonosco_mlflow.config import Config
from sonosco_mlflow.outcome import Outcome
from sonosco_mlflow.tracking import identity
from sonosco_mlflow.training.interruption import Terminated

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The recipes that `train` was asked for, instead of a training."""
    configs: list[Config] = []

    def train(config: Config, project: Path, *, prepare: bool, **others: object) -> Outcome:
        configs.append(config)
        return Outcome("id", {}, [])

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


@pytest.mark.parametrize(
    ("interrupt", "status"), [(KeyboardInterrupt, 128 + signal.SIGINT), (Terminated, 128 + signal.SIGTERM)]
)
@pytest.mark.parametrize(("verb", "module"), [("evaluate", trained), ("reproduce", reproduction)])
def test_what_else_takes_long_has_the_status_of_its_signal_too(
    monkeypatch: pytest.MonkeyPatch, verb: str, module: ModuleType, interrupt: type[BaseException], status: int
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        if interrupt is Terminated:
            signal.raise_signal(signal.SIGTERM)
        raise interrupt

    monkeypatch.setattr(module, verb, stopped)
    assert sonosco(monkeypatch, verb, "ab12") == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resume", "--no-prepar", "ab12"],
            "--no-prepar is no option of `sonosco resume`; did you mean '--no-prepare'?",
        ),
        (["resume", "--no-prepar"], "--no-prepar is no option of `sonosco resume`"),
        (["evaluate", "--splt", "dev", "ab12"], "--splt is no option of `sonosco evaluate`; did you mean '--split'?"),
        (["corpus", "--sorce=x"], "--sorce is no option of `sonosco corpus`; did you mean '--source'?"),
        (["diff", "a", "b", "--html", str(PROJECT)], f"--html: '{PROJECT}' is a folder"),
    ],
)
def test_a_misspelt_option_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(PROJECT)
    assert sonosco(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_verb_is_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sonosco(monkeypatch, "trian") == 2


def test_every_verb_of_the_pipeline_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for verb in ("corpus", "manifests", "features", "data", "train", "resume", "evaluate", "transcribe"):
        assert verb in shown


# ---------------------------------------------------------------------- resume

CHANGES = ["config", "code", "data", "vocabulary", "environment", "numerics"]


@pytest.fixture
def asked_to_resume(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `resume` was asked for, instead of a training."""
    asked: list[dict[str, Any]] = []

    def resume(run_id: str, project: Path, **options: Any) -> None:
        asked.append({"run_id": run_id, "project": project, **options})

    monkeypatch.setattr(runs, "resume", resume)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return asked


def test_a_run_is_resumed_as_it_is(monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]) -> None:
    assert sonosco(monkeypatch, "resume", "ab12") == 0
    assert asked_to_resume == [
        {
            "run_id": "ab12",
            "project": Path(),
            "overrides": {},
            "allowed_changes": [],
            "prepare": True,
            "results": None,
        }
    ]


@pytest.mark.parametrize("arguments", [["ab12"], ["--run_id", "ab12"], ["--run_id=ab12"]])
def test_the_run_is_named_by_argument_or_option_before_the_variable(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]], arguments: list[str]
) -> None:
    # `mlflow run` has made a run for this process: it is the record of the segment, not what is to go on.
    monkeypatch.setenv("MLFLOW_RUN_ID", "launched")
    assert sonosco(monkeypatch, "resume", *arguments) == 0
    assert asked_to_resume[0]["run_id"] == "ab12"
    assert os.environ["MLFLOW_RUN_ID"] == "launched"


def test_without_another_name_the_launchers_variable_names_it(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "ab12")
    assert sonosco(monkeypatch, "resume") == 0
    assert asked_to_resume[0]["run_id"] == "ab12"


def test_without_any_name_there_is_a_message(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "resume") == 1
    assert "give the id of the run that is to go on: sonosco resume RUN_ID" in capsys.readouterr().err
    assert not asked_to_resume


@pytest.mark.parametrize("value", [[], ["true"], ["True"]], ids=["bare", "true", "True"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_allowed_by_a_flag_as_mlflow_passes_it_on_too(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]], change: str, value: list[str]
) -> None:
    arguments = [f"--allow-{change}-change", *value, "--training.epochs", "9"]
    assert sonosco(monkeypatch, "resume", "--run_id", "ab12", *arguments) == 0
    assert asked_to_resume[0]["allowed_changes"] == [change]
    assert asked_to_resume[0]["overrides"] == {"training.epochs": "9"}
    assert asked_to_resume[0]["run_id"] == "ab12"


def test_a_flag_that_mlflow_passes_on_as_false_allows_nothing(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]
) -> None:
    assert sonosco(monkeypatch, "resume", "--run_id", "ab12", "--allow-code-change", "false") == 0
    assert asked_to_resume[0]["allowed_changes"] == []
    assert asked_to_resume[0]["run_id"] == "ab12"


def test_all_changes_and_keys_come_together(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]
) -> None:
    flags = [f"--allow-{change}-change" for change in CHANGES]
    settings = ["--set", "training.epochs=9", "--optimizer.lr=1e-4", "--no-prepare", "--results", "kept"]
    assert sonosco(monkeypatch, "resume", "ab12", *flags, *settings) == 0
    assert asked_to_resume[0]["allowed_changes"] == CHANGES
    assert asked_to_resume[0]["overrides"] == {"training.epochs": "9", "optimizer.lr": "1e-4"}
    assert (asked_to_resume[0]["prepare"], asked_to_resume[0]["results"]) == (False, Path("kept"))


def test_the_flags_are_the_changes_that_a_message_may_name() -> None:
    assert set(CHANGES) == set(identity.CHANGES)


def test_a_misspelt_flag_is_a_message(monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]) -> None:
    monkeypatch.setattr(runs, "resume", lambda run_id, project, overrides, **_: Config.resolve({}, overrides))
    assert sonosco(monkeypatch, "resume", "ab12", "--allow-cod-change") == 1


@pytest.mark.parametrize(
    ("interrupt", "status"), [(KeyboardInterrupt, 128 + signal.SIGINT), (Terminated, 128 + signal.SIGTERM)]
)
def test_a_signal_while_resuming_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch,
    asked_to_resume: list[dict[str, Any]],
    interrupt: type[BaseException],
    status: int,
) -> None:
    def resume(*arguments: object, **options: object) -> None:
        raise interrupt

    monkeypatch.setattr(runs, "resume", resume)
    assert sonosco(monkeypatch, "resume", "ab12") == status


@pytest.mark.parametrize(("arguments", "expected"), [([], False), (["--continue"], True)])
def test_a_stage_that_was_killed_asks_to_go_on(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(runs, "train", lambda config, project, *, go_on, **options: asked.append(go_on))
    monkeypatch.chdir(PROJECT)
    assert sonosco(monkeypatch, "train", *arguments) == 0
    assert asked == [expected]


def test_a_command_leaves_the_handling_of_signals_as_it_was(
    monkeypatch: pytest.MonkeyPatch, asked_to_resume: list[dict[str, Any]]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert sonosco(monkeypatch, "resume", "ab12") == 0
    assert asked_to_resume
    assert signal.getsignal(signal.SIGTERM) is before


CRASHES = """
import ctypes
from sonosco_mlflow import cli

def at_home_in_a_library(*arguments, **options):
    ctypes.string_at(0)

cli.app = at_home_in_a_library
cli.main()
"""


def test_a_crash_in_a_library_says_where_it_came() -> None:
    process = subprocess.run([sys.executable, "-c", CRASHES], capture_output=True, text=True)
    assert process.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in process.stderr
    assert "in at_home_in_a_library" in process.stderr
