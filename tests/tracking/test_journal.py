import json
from pathlib import Path

from sonosco_mlflow.tracking.journal import Journal, Row


def test_every_row_is_written_and_sent_once_in_order(tmp_path: Path) -> None:
    sent: list[Row] = []
    journal = Journal(tmp_path / "runs" / "journal.jsonl", sent.extend)
    journal.write(1, {"train_loss": 0.1})
    journal.flush()
    journal.write(2, {"train_loss": 0.30000000000000004, "gradient_norm": 2.0})
    journal.close()
    journal.flush()

    assert [(row.step, row.metrics) for row in sent] == [
        (1, {"train_loss": 0.1}),
        (2, {"train_loss": 0.30000000000000004, "gradient_norm": 2.0}),
    ]
    lines = (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"] for line in lines] == [row.metrics for row in sent]
    assert [json.loads(line)["timestamp"] for line in lines] == [row.timestamp for row in sent]


def test_what_was_written_before_is_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        journal = Journal(tmp_path / "journal.jsonl", lambda rows: None)
        journal.write(step, {"train_loss": 1.0})
        journal.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_not_a_number_is_tagged() -> None:
    assert json.loads(Row(1, 2, {"rate": float("nan")}).line())["metrics"] == {"rate": {"$float": "nan"}}


def test_rows_that_could_not_be_sent_are_sent_again(tmp_path: Path) -> None:
    sent: list[Row] = []
    answers = iter([ConnectionError("down"), None])

    def send(rows: list[Row]) -> None:
        if error := next(answers):
            raise error
        sent.extend(rows)

    journal = Journal(tmp_path / "journal.jsonl", send)
    journal.write(1, {"train_loss": 1.0})
    try:
        journal.flush()
    except ConnectionError:
        journal.close()
    assert [row.step for row in sent] == [1]
