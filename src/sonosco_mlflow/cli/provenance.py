"""The verbs that show a run, check it, and make it again."""

from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.cli.app import allowing, app, termination
from sonosco_mlflow.errors import UserError


@app.command()
def show(
    run_id: Annotated[str | None, typer.Argument(help="A training run; without one, all of them.")] = None,
) -> None:
    """Show what runs there are, or what one of them is and how to go on with it."""
    from sonosco_mlflow.overview import show_run, show_runs

    if run_id is None:
        show_runs(Path())
    else:
        show_run(run_id, Path())


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="A training run.")],
    until_step: Annotated[int | None, typer.Option(min=1, help="Stop there: a proof that costs less.")] = None,
    env_manager: Annotated[str, typer.Option(help="uv builds the run's environment, local takes this one.")] = "uv",
    allow_numerics_change: Annotated[bool, allowing("this machine's arithmetic")] = False,
) -> None:
    """Make a run again from what MLflow and DVC kept, and certify that it comes out the same, bit for bit."""
    from sonosco_mlflow.reproduction import reproduce

    with termination():
        certificate = reproduce(
            run_id,
            Path(),
            until_step=until_step,
            environment_manager=env_manager,
            allow_numerics_change=allow_numerics_change,
        )
    typer.echo(certificate.to_markdown())
    if not certificate.is_identical:
        raise typer.Exit(1)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="A training run.")],
    other: Annotated[str, typer.Argument(help="Another.")],
    html: Annotated[Path | None, typer.Option(help="Write a page of it to this file.")] = None,
) -> None:
    """Show in what two runs differ: the likely cause first, then inputs, outcomes and code."""
    from sonosco_mlflow.difference_report import difference_text, write_difference_page
    from sonosco_mlflow.tracking.difference import difference_of
    from sonosco_mlflow.tracking.store import connect

    if html is not None and html.is_dir():
        raise UserError(f"--html: '{html}' is a folder, expected the name of the page")
    connect(Path())
    found = difference_of(one, other, Path())
    typer.echo(difference_text(found), nl=False)
    if html is not None:
        write_difference_page(found, html)
        typer.echo(f"\nwritten: {html}")


@app.command()
def verify(run_id: Annotated[str, typer.Argument(help="A run that has ended.")]) -> None:
    """Read again all that MLflow keeps of a run, and say what is missing or is not as it was recorded."""
    from sonosco_mlflow.overview import show_verification
    from sonosco_mlflow.tracking.store import connect
    from sonosco_mlflow.tracking.verification import verify_run

    connect(Path())
    found = verify_run(run_id)
    show_verification(found)
    if found.findings:
        raise typer.Exit(1)
