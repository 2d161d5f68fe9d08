import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sonosco_mlflow.serialization.checkpoint import BrokenCheckpointError, Snapshot, write_checkpoint
from sonosco_mlflow.tracking.checkpoints import upload_checkpoint
from sonosco_mlflow.tracking.comparison import Parting, compare_runs
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import find_run

pytestmark = pytest.mark.usefixtures("tracking_store")
NAN = float("nan")
HYPOTHESES = [{"id": "a", "hypothesis": "ONE"}, {"id": "b", "hypothesis": "TWO"}]


def make_run(
    folder: Path,
    rows: Mapping[int, Mapping[str, float]],
    states: Mapping[int, Mapping[str, Any]] | None = None,
    hypotheses: list[dict[str, object]] | None = None,
    epochs: int = 2,
) -> str:
    with TrackedRun.open("Default", "train") as run:
        run.log_rows([Row(step, step, 1000 + step, dict(metrics)) for step, metrics in rows.items()])
        names = frozenset(f"step-{step:08d}" for step in states or {})
        for step, state in (states or {}).items():
            parts = {"model": {}, "optimizer": {}, "trainer": {}, **state}
            path = write_checkpoint(folder / run.id, Snapshot.take({"class": "x", "epochs": epochs}, parts, step))
            upload_checkpoint(run, path, names)
        if hypotheses is not None:
            run.log_table(hypotheses, "evaluation/test_hypotheses.json")
    return run.id


def model(value: float) -> dict[str, Any]:
    return {"model": {"bias": torch.zeros(2), "weight": torch.full((3,), value)}}


ROWS = {1: {"train_loss": 0.5, "a_seconds": 1.0}, 2: {"train_loss": NAN, "val_loss": 0.25}}


def test_equal_runs_are_equal_whatever_time_they_took(tmp_path: Path) -> None:
    other = {**ROWS, 1: {"train_loss": 0.5, "a_seconds": 9.0}}
    one, two = (make_run(tmp_path, rows, {2: model(1.0)}, list(HYPOTHESES)) for rows in (ROWS, other))
    found = compare_runs(one, two)
    assert found.partings == ()
    assert found.first is None
    assert (found.rows, found.checkpoints, found.hypotheses) == (3, ("step-00000002",), ("test_hypotheses.json",))


def test_the_earliest_difference_comes_first(tmp_path: Path) -> None:
    one = make_run(tmp_path, {3: {"a": 1.0}, 1: {"b": 1.0}, 2: {"a": 0.1 + 0.2}})
    two = make_run(tmp_path, {3: {"a": 2.0}, 1: {"b": 1.0}, 2: {"a": 0.3, "c": 1.0}})
    found = compare_runs(one, two)
    assert found.partings == (
        Parting(2, "a was 0.30000000000000004, is 0.3"),
        Parting(2, "only the other has c"),
        Parting(3, "a was 1.0, is 2.0"),
    )
    assert compare_runs(two, one).partings[1] == Parting(2, "only the original has c")
    assert compare_runs(one, two, until=2).partings == found.partings[:2]
    assert compare_runs(one, two, until=1).partings == ()


def test_the_first_tensor_that_differs_is_named_and_those_after_it_are_not(tmp_path: Path) -> None:
    states = {step: model(1.0) for step in (1, 2, 3)}
    one = make_run(tmp_path, {}, states)
    two = make_run(tmp_path, {}, {**states, 2: model(1.5), 3: model(9.0)})
    parting = Parting(2, "step-00000002/model.safetensors: weight, largest difference 0.5")
    assert compare_runs(one, two).partings == (parting,)
    assert compare_runs(one, two, until=1).partings == ()
    assert compare_runs(one, two, until=1).checkpoints == ("step-00000001",)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (
            {"model": {"bias": torch.zeros(2), "weight": torch.ones(1, 3)}},
            "weight is not in both, or has another shape",
        ),
        ({"model": {"bias": torch.zeros(2)}}, "weight is not in both, or has another shape"),
        ({"model": {"bias": -torch.zeros(2), "weight": torch.ones(3)}}, "bias, largest difference 0"),
        ({**model(1.0), "optimizer": {"step": torch.tensor(3)}}, "step is not in both, or has another shape"),
        ({**model(1.0), "trainer": {"epoch": 3}}, "step-00000002: state.json"),
    ],
    ids=["shape", "missing", "sign of zero", "optimizer", "plain value"],
)
def test_whatever_differs_in_a_state_is_found(tmp_path: Path, state: dict[str, Any], what: str) -> None:
    one, two = make_run(tmp_path, {}, {2: model(1.0)}), make_run(tmp_path, {}, {2: state})
    (parting,) = compare_runs(one, two).partings
    assert parting.what.endswith(what)


def test_objects_of_other_parameters_with_the_same_state_part_no_runs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, {}, {2: model(1.0)}), make_run(tmp_path, {}, {2: model(1.0)}, epochs=3)
    found = compare_runs(one, two)
    assert (found.partings, found.remade) == ((), ("step-00000002",))
    other = make_run(tmp_path, {}, {2: model(1.5)}, epochs=3)
    found = compare_runs(one, other)
    assert [parting.what for parting in found.partings] == [
        "step-00000002/model.safetensors: weight, largest difference 0.5"
    ]
    assert found.remade == ()


def test_what_one_has_at_its_end_the_other_goes_beyond_without(tmp_path: Path) -> None:
    short = make_run(tmp_path, {1: {"a": 1.0}, 2: {"a": 1.0, "test_loss": 1.0}}, None, HYPOTHESES)
    longer = make_run(tmp_path, {1: {"a": 1.0}, 2: {"a": 1.0}, 3: {"a": 1.0, "test_loss": 2.0}}, None, HYPOTHESES[:1])
    found = compare_runs(short, longer)
    assert found.reached == (2, 3)
    assert found.partings == (Parting(3, "only the other has a"), Parting(3, "only the other has test_loss"))
    assert found.hypotheses == ()
    assert compare_runs(longer, short).partings[0] == Parting(3, "only the original has a")
    rows = {1: {"a": 1.0}, 2: {"a": 1.0, "test_loss": 9.0}}
    assert compare_runs(short, make_run(tmp_path, rows)).first == Parting(2, "test_loss was 1.0, is 9.0")
    lacking = make_run(tmp_path, {1: {"a": 1.0}, 2: {"a": 1.0}})
    assert compare_runs(short, lacking).first == Parting(2, "only the original has test_loss"), "it ended there as well"


def test_a_broken_checkpoint_is_no_difference_but_an_error(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, {}, {2: model(1.0)}), make_run(tmp_path, {}, {2: model(2.0)})
    run = TrackedRun(find_run(two))
    run.log_bytes(b"", "checkpoints/step-00000002/model.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors: altered"):
        compare_runs(one, two)


def test_the_first_hypothesis_that_differs_is_named(tmp_path: Path) -> None:
    changed = [HYPOTHESES[0], {"id": "b", "hypothesis": "THREE"}]
    one, two, short = (
        make_run(tmp_path, {4: {"a": 1.0}}, None, list(rows)) for rows in (HYPOTHESES, changed, HYPOTHESES[:1])
    )
    name = "evaluation/test_hypotheses.json"
    assert [parting.what for parting in compare_runs(one, two).partings] == [f"{name}: b was 'TWO', is 'THREE'"]
    assert [parting.what for parting in compare_runs(one, short).partings] == [f"{name}: 2 utterances, and 1"]
    assert compare_runs(one, two, until=4).partings == ()
    assert json.loads(json.dumps([vars(parting) for parting in compare_runs(one, two).partings]))
