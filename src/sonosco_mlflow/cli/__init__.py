"""The command line: one short function a verb.

Exit status: 0 done, 1 a mistake or a failed run (one message; ``--debug`` shows the traceback), 2 usage, 130 and 143
stopped by SIGINT or SIGTERM and resumable.
"""

import faulthandler
import os
import sys
import warnings
from contextlib import suppress

import typer

from sonosco_mlflow.background import is_hanging

# Each module adds its verbs.
from sonosco_mlflow.cli import augment, data, manifest, provenance, training  # noqa: F401
from sonosco_mlflow.cli.app import app, normalise
from sonosco_mlflow.errors import UserError, describe_failure


def main() -> None:
    """Run the command line and end the process, also where a call to a tracking server hangs."""
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        # A crash in a library's own code leaves nothing to catch: at least it says where it came.
        faulthandler.enable(sys.__stderr__)
    try:
        _run()
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    if is_hanging():
        _end_at_once(status)
    sys.exit(status)


def _end_at_once(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _run() -> None:
    arguments = normalise([argument for argument in sys.argv[1:] if argument != "--debug"])
    debug = "--debug" in sys.argv[1:]
    # A warning is for the reader, who does not care for the line of code that gave it.
    warnings.formatwarning = lambda message, *_, **__: f"sonosco: warning: {message}\n"
    try:
        app(arguments, prog_name="sonosco")
    except Exception as error:
        _mark_failed(error)
        if debug:
            raise
        hint = "" if isinstance(error, UserError) else " (`sonosco --debug ...` shows where)"
        typer.secho(f"sonosco: {describe_failure(error)}{hint}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _mark_failed(error: Exception) -> None:
    # Only where `mlflow run` launched this process is there a run that nobody else would mark.
    if "MLFLOW_RUN_ID" in os.environ:
        from sonosco_mlflow.tracking.mlflow_run import mark_launched_run_failed

        mark_launched_run_failed(error)
