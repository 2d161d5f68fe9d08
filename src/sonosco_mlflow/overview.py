"""What runs there are, and what one of them is: in the terminal, on one screen."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table
from rich.text import Text

from sonosco_mlflow.tracking.description import describe_run, list_trainings
from sonosco_mlflow.tracking.store import connect, find_run
from sonosco_mlflow.tracking.verification import Verification

RATES = {"val_word_error_rate": "val WER", "test_word_error_rate": "test WER"}
# What is no terminal has no width: nothing is to be cut there.
_WIDE = 10_000


def show_run(run_id: str, project: Path) -> None:
    """Print what a run is, on what data, how it went, and how to go on with it.

    Raises:
        UserError: there is no such run.
    """
    connect(project)
    text = describe_run(find_run(run_id))
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)


def show_runs(project: Path) -> None:
    """Print the trainings of the tracking store, the newest first, each with what it is in truth."""
    connect(project)
    # An id is there to be copied, whatever else has to be folded.
    columns = [
        Column("run", no_wrap=True),
        *(Column(name, overflow="fold") for name in ("name", "state", "begun, UTC")),
    ]
    table = Table(*columns, "step", *RATES.values(), box=None)
    for line in list_trainings():
        rates = [line.metrics.get(name) for name in RATES]
        table.add_row(
            line.run_id,
            # Whatever stands in brackets is part of it.
            Text(line.name),
            line.state,
            f"{line.begun:%Y-%m-%d %H:%M}",
            "" if line.step is None else str(line.step),
            *("" if rate is None else f"{100 * rate:.2f} %" for rate in rates),
        )
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    console.print(table if table.row_count else "no run yet: `make train`, or `mlflow run . -P model=tds`, makes one")


def show_verification(found: Verification) -> None:
    """Print what was read again of a run, and what is not as it was recorded."""
    print(
        f"run {found.run_id}: {found.files} files of {found.size / 1e6:.1f} MB, {found.checkpoints} checkpoints, "
        f"{found.rows} values of metrics read again"
    )
    if not found.has_ledger:
        print("it did not come to closing its ledger: files that no other digest knows could not be compared")
    for finding in found.findings:
        print(f"  {finding.name}: {finding.what}")
    print("all is as recorded" if not found.findings else f"{len(found.findings)} are not as recorded")
