"""Deriving a run's numbers again, from nothing but what MLflow and DVC kept.

The code of then runs in a scratch folder, in the environment of then, on the data of then; what comes out is compared
with what the run recorded, bit for bit. The answer is a certificate.

>>> certificate = reproduce(run_id, Path())                 # doctest: +SKIP
>>> print(certificate.to_markdown())                        # doctest: +SKIP
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.changes import input_changes
from sonosco_mlflow.tracking.child_runs import new_run
from sonosco_mlflow.tracking.comparison import Comparison, compare_runs, last_step
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.rebuilt import ENVIRONMENT_MANAGERS, Rebuilt, rebuild
from sonosco_mlflow.tracking.segments import Segment, newest_segment
from sonosco_mlflow.tracking.store import connect, find_run, find_training
from sonosco_mlflow.tracking.tags import CANARY, DATA_DIGEST, KIND, REPRODUCED, REPRODUCED_BY, REPRODUCES, STATE

_STOPPED = 130


@dataclass(frozen=True)
class Certificate:
    """What a reproduction gave.

    Attributes:
        original: id of the run.
        reproduction: id of the run that made it again.
        until_step: last optimizer step that was made again, or None for the whole run.
        inputs: recorded inputs that differ, by name, and how; empty where all were the same.
        comparison: what was compared, and what differs.
    """

    original: str
    reproduction: str
    until_step: int | None
    inputs: dict[str, str]
    comparison: Comparison

    @property
    def is_identical(self) -> bool:
        """Whether every compared bit is the same."""
        return not self.comparison.partings

    def to_json(self) -> str:
        """Return the certificate as JSON."""
        found = self.comparison
        content = {
            "original": self.original,
            "reproduction": self.reproduction,
            "bit_identical": self.is_identical,
            "until_step": self.until_step,
            "compared": {
                "metric_rows": found.rows,
                "checkpoints": list(found.checkpoints),
                "hypotheses": list(found.hypotheses),
            },
            "differences": [vars(parting) for parting in found.partings],
            "differing_inputs": self.inputs,
        }
        return json.dumps(content, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return the certificate for a reader."""
        found = self.comparison
        extent = "" if self.until_step is None else f" up to step {self.until_step}"
        checkpoints = ", ".join(found.checkpoints) or "none that both runs keep"
        lines = [
            f"Run `{self.original}`, made again{extent} as run `{self.reproduction}`: "
            + ("**bit-identical**." if self.is_identical else "**not the same**."),
            "",
            f"- {found.rows} rows of metrics",
            f"- weights, optimizer and all other state: {checkpoints}",
            *(f"- {name}" for name in found.hypotheses),
        ]
        if found.remade:
            lines.append(
                f"- of {', '.join(found.remade)} the states; the objects have other parameters, such as epochs"
            )
        if found.first is not None:
            lines += ["", f"They part at step {found.first.step}: {found.first.what}."]
            lines += ["", *(f"- {name}: {how}" for name, how in self.inputs.items())]
            lines += [] if self.inputs else ["No recorded input differs."]
        return "\n".join(lines) + "\n"


def reproduce(
    run_id: str,
    project: Path,
    *,
    until_step: int | None = None,
    environment_manager: str = "uv",
    allow_numerics_change: bool = False,
) -> Certificate:
    """Make a run again from what MLflow and DVC kept, and compare what comes out with what it recorded.

    Args:
        run_id: a training run; it may have been killed and continued.
        project: a project whose DVC cache or remotes have the data; nothing in it is changed.
        until_step: stop there, for a proof that costs less.
        environment_manager: ``uv`` builds the recorded environment, ``local`` takes this process's.
        allow_numerics_change: go on although this machine's arithmetic is known to give other bits.

    Raises:
        UserError: the run cannot be made again; the message says what is missing.
    """
    connect(project)
    run = find_training(run_id)
    if environment_manager not in ENVIRONMENT_MANAGERS:
        raise UserError(f"env-manager is '{environment_manager}', expected {' or '.join(ENVIRONMENT_MANAGERS)}")
    if run.data.tags.get(STATE) != "finished" and until_step is None:
        raise UserError(
            f"run {run_id} is {run.data.tags.get(STATE)}, not finished: continue it by `sonosco resume {run_id}`, or "
            "make it again as far as it came by --until-step"
        )
    reached = last_step(run_id)
    if until_step is not None and until_step > reached:
        raise UserError(
            f"run {run_id} came to step {reached}: --until-step {until_step} has nothing to be compared with"
        )
    _require_one_way(newest_segment(run), until_step)
    first = Segment(run_id)
    with tempfile.TemporaryDirectory(prefix="sonosco-reproduce-") as scratch:
        rebuilt = rebuild(first, project, Path(scratch), environment_manager, run.data.tags.get(DATA_DIGEST))
        device = str(first.settings()["training"]["device"]) if rebuilt.command.trains_recipe else "cpu"
        kept = str(rebuilt.environment.system["canary"])
        expected = kept if device == "cpu" else run.data.tags.get(CANARY, kept)
        _require_same_arithmetic(rebuilt, device, expected, allowed=allow_numerics_change)
        again = new_run(run.info.experiment_id, {REPRODUCES: run_id, KIND: "train", STATE: "running"}, run_id)
        try:
            _train(rebuilt, again, until_step)
        except BaseException as error:
            # Of a process that did not come to opening its run nobody else would tell.
            TrackedRun(find_run(again)).abandon(error)
            raise
    made = find_run(again)
    certificate = Certificate(
        original=run_id,
        reproduction=again,
        until_step=until_step,
        inputs={
            change.name: change.summary
            for change in input_changes(first, run.data.tags, Segment(again), made.data.tags, project)
        },
        comparison=compare_runs(run_id, again, until_step),
    )
    _log(certificate)
    return certificate


def _require_one_way(newest: Segment, until_step: int | None) -> None:
    for branch in newest.branches:
        step = 0 if branch.checkpoint is None else int(branch.checkpoint.removeprefix("step-").partition(".")[0])
        if until_step is None or until_step > step:
            raise UserError(
                f"run {newest.run_id} went on otherwise in segment {branch.segment}, after step {step} "
                f"({', '.join(branch.changes)} changed): no one recipe makes it again. --until-step {step} makes again "
                "what was before"
            )


def _require_same_arithmetic(rebuilt: Rebuilt, device: str, expected: str, *, allowed: bool) -> None:
    found = rebuilt.canary(device)
    if found != expected and not allowed:
        raise UserError(
            f"the same operations give other bits here (canary {found[:12]}, the run's {expected[:12]}; it ran on "
            f"{rebuilt.environment.system['processor']}); --allow-numerics-change makes it again all the same, to see "
            "where the two part"
        )


def _train(rebuilt: Rebuilt, run_id: str, until_step: int | None) -> None:
    command = rebuilt.command
    if command.trains_recipe:
        arguments = ["-P", "-m", "sonosco_mlflow", "train"]
        arguments += ["--no-prepare"] if rebuilt.has_data else []
        arguments += [] if until_step is None else ["--until-step", str(until_step)]
    elif until_step is not None:
        raise UserError("the run was started by a program of its own, which knows no --until-step; leave it out")
    else:
        arguments = list(command.arguments)
    print(f"making the run again: python {' '.join(arguments)}", flush=True)
    status = rebuilt.run(arguments, {"MLFLOW_RUN_ID": run_id})
    if status not in ({0} if until_step is None else {0, _STOPPED}):
        raise UserError(f"the run could not be made again: the command above ended with status {status}")


def _log(certificate: Certificate) -> None:
    made = TrackedRun(find_run(certificate.reproduction))
    made.open_ledger()
    made.log_text(certificate.to_json(), "reproduction/certificate.json")
    made.log_text(certificate.to_markdown(), "reproduction/certificate.md")
    made.close_ledger()
    made.describe(certificate.to_markdown())
    made.rename(f"reproduction-of-{certificate.original[:6]}")
    made.set_tags({REPRODUCED: str(certificate.is_identical).lower()})
    TrackedRun(find_run(certificate.original)).set_tags({REPRODUCED_BY: certificate.reproduction})
