import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.tensorboard import TensorBoard

# TensorFlow's generated classes and NumPy's scalars, as the reader and the writer use them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def at(step: int, batch: int = 1) -> Any:
    """As much of a trainer as the writer looks at."""
    return SimpleNamespace(progress=SimpleNamespace(step=step, batch=batch))


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_trainer_that_never_trains_leaves_no_file(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board")
    board.rewrite([])
    board.on_safe_point(at(0, batch=0))
    board.close()
    assert not (tmp_path / "board").exists()


def test_one_that_is_built_again_writes_nothing_until_it_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    board = Deserializer().build(Serializer().describe(TensorBoard(tmp_path / "then")))
    with pytest.warns(UserWarning, match="TensorBoard has no directory"):
        board.on_train_begin(at(0))
    for step in (1, 2):
        board.on_metrics(at(step), {"train_loss": 0.5})
        board.on_text(at(step), "samples", "| a |")
        board.on_safe_point(at(step, batch=0))
    board.on_train_end(at(2))
    assert not list(tmp_path.iterdir())
    board.directory = tmp_path / "now"
    board.on_train_begin(at(2))
    board.on_metrics(at(3), {"train_loss": 0.25})
    board.on_train_end(at(3))
    assert scalars(tmp_path / "now", "train_loss") == [(3, 0.25)]


def test_metrics_and_texts_stand_at_their_steps(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        board.on_metrics(at(step), {"train_loss": step / 2, "learning_rate": 0.25})
    board.on_text(at(3), "samples", "| a |")
    board.on_train_end(at(3))
    assert scalars(tmp_path, "train_loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (text,) = read(tmp_path).Tensors("samples/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (3, b"| a |")


def test_the_end_of_an_epoch_is_on_the_disk(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_metrics(at(1), {"train_loss": 0.5})
    board.on_safe_point(at(1, batch=0))
    assert scalars(tmp_path, "train_loss") == [(1, 0.5)]
    board.close()


def test_a_rewritten_board_shows_each_step_once_and_in_order(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(1, 7):
        board.on_metrics(at(step), {"train_loss": float(step)})
        board.on_text(at(step), "samples", f"old {step}")
    board.close()
    # A second process, that was killed in its turn.
    second = TensorBoard(tmp_path)
    second.on_metrics(at(5), {"train_loss": 5.0})
    second.close()
    (tmp_path / "notes.txt").write_text("mine")

    resumed = TensorBoard(tmp_path)
    rows = [
        Row(step, step, 1_700_000_000_000 + 1000 * step, {"train_loss": float(step)}, {"samples": f"kept {step}"})
        for step in (1, 2, 3)
    ]
    resumed.rewrite(rows)
    for step in (4, 5, 6, 7):
        resumed.on_metrics(at(step), {"train_loss": float(step)})
        resumed.on_text(at(step), "samples", f"new {step}")
    resumed.close()

    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert "notes.txt" in files(tmp_path)
    assert scalars(tmp_path, "train_loss") == [(step, float(step)) for step in range(1, 8)]
    events = read(tmp_path)
    times = [event.wall_time for event in events.Scalars("train_loss")]
    assert times[:3] == [1_700_000_001, 1_700_000_002, 1_700_000_003]
    written = events.Tensors("samples/text_summary")
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in written]
    assert texts == [*((step, f"kept {step}") for step in (1, 2, 3)), *((step, f"new {step}") for step in (4, 5, 6, 7))]


def test_without_a_journal_the_reader_shows_no_zigzag(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path)
    for step in range(1, 7):
        killed.on_metrics(at(step), {"train_loss": float(step)})
    killed.close()
    assert len(files(tmp_path)) == 1
    # A process takes more than a second to come back; in one second the files of a process are read as 1, 10, 2, ...
    time.sleep(1.1)
    continued = TensorBoard(tmp_path)
    for step in range(4, 9):
        continued.on_metrics(at(step), {"train_loss": step + 0.5})
    continued.close()
    assert scalars(tmp_path, "train_loss") == [
        *((step, float(step)) for step in (1, 2, 3)),
        *((step, step + 0.5) for step in range(4, 9)),
    ]


def test_what_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.rewrite([Row(1, 1, 1_700_000_000_000, {"rate": float("nan"), "norm": float("inf")})])
    board.close()
    assert np.isnan(scalars(tmp_path, "rate")[0][1])
    assert scalars(tmp_path, "norm") == [(1, float("inf"))]
