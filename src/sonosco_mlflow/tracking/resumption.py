"""A run that is to go on: what it kept, what its state belongs to, and whether what is here is still that."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlflow
from mlflow.entities import Run

from sonosco_mlflow.config import Config
from sonosco_mlflow.errors import UserError, nearest, whole_number
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, MANIFEST, Checkpoint
from sonosco_mlflow.settings import Scalar, flatten, settings_digest
from sonosco_mlflow.tracking import described, identity
from sonosco_mlflow.tracking.checkpoints import is_delivered, newest_checkpoint
from sonosco_mlflow.tracking.code_snapshot import imported_digests
from sonosco_mlflow.tracking.journal import JOURNAL, DamagedJournalError, Records, Row, missing_row, read_rows, rows_of
from sonosco_mlflow.tracking.lease import VANISHED, Lease
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.metric_rows import metric_records
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.segments import BRANCH, Segment, newest_segment
from sonosco_mlflow.tracking.store import download, find_run, find_training, is_away
from sonosco_mlflow.tracking.tags import (
    CANARY,
    CODE_DIGEST,
    DATA_DIGEST,
    ENVIRONMENT_DIGEST,
    FIRST_STEP,
    FOLDER,
    IMPORTED_DIGEST,
    KIND,
    REPRODUCES,
    STATE,
    number_of,
)
from sonosco_mlflow.training.callbacks.base import EPOCH_METRICS, STEP_METRICS

if TYPE_CHECKING:
    from sonosco_mlflow.training.callbacks.history import History
    from sonosco_mlflow.training.trainer import ModelTrainer


# The digests of what makes a trainer the one that it is, apart from its vocabulary.
_SHAPING = frozenset({"config", "code", "imported"})


@dataclass
class Resumption:
    """What is known of a run that is to be continued; the run is not changed by it.

    Attributes:
        run: as the tracking store has it.
        condition: what it was found as: ``interrupted``, ``failed``, ``finished`` or ``vanished``.
        tracked: the same, to be reopened.
        lease: this process's right to train it.
        folder: the run's own files on this machine; it may be empty.
        last: its newest segment.
        settings: what the run kept of its recipe, or of a program's own.
        trains_recipe: whether they are a recipe.
        checkpoint: the newest whole one, or None where the run was killed before the first.
        allowed: names of the changes that are allowed.
        changes: digests that differ (recorded, present), once :meth:`check` has compared them.
        altered: names of all digests that differ from those of the checkpoint: also what an earlier segment was allowed
            to change that was killed before it had a checkpoint of its own.
    """

    run: Run
    condition: str
    tracked: TrackedRun
    lease: Lease
    folder: Path
    last: Segment
    settings: dict[str, Any]
    trains_recipe: bool
    checkpoint: Checkpoint | None
    allowed: frozenset[str]
    changes: dict[str, tuple[str, str]] = field(default_factory=dict)
    altered: frozenset[str] = frozenset()

    @classmethod
    def begin(cls, run_id: str, project: Path, allowed: Iterable[str] = ()) -> Self:
        """Take the lease of a run and bring its newest checkpoint to this machine.

        Raises:
            UserError: there is no such training run, another process trains it, or a change is unknown.
        """
        unknown = sorted(set(allowed) - set(identity.CHANGES))
        if unknown:
            raise UserError(f"there is no change '{unknown[0]}' to allow; {nearest(unknown[0], identity.CHANGES)}")
        run = find_training(run_id)
        tracked = TrackedRun.find(run)
        lease = Lease.take(run_id)
        lease.start()
        try:
            # Again: what stood there before the lease was taken may be outdated.
            run = find_run(run_id)
            # The lease was free: what says that it is running, is not.
            state = run.data.tags.get(STATE, VANISHED)
            condition = VANISHED if state == "running" else state
            folder = project / "runs" / _folder_name(run)
            last = newest_segment(run)
            settings, trains_recipe = last.settings(), last.trains_recipe()
            checkpoint = newest_checkpoint(last, folder / CHECKPOINTS)
        except BaseException:
            lease.release()
            raise
        found = (run, condition, tracked, lease, folder, last, settings, trains_recipe, checkpoint)
        return cls(*found, frozenset(allowed))

    @property
    def was_finished(self) -> bool:
        """Whether the run says that it came to its end."""
        return self.condition == "finished"

    @property
    def recipe(self) -> Config | dict[str, Any]:
        """The recipe that the run goes on with by default, or the settings of a program's own.

        Raises:
            UserError: what the run kept is no recipe of this version.
        """
        if not self.trains_recipe:
            return self.settings
        return Config.resolve(self.settings, {}, origin=f"run {self.tracked.id}")

    @property
    def threads(self) -> int | None:
        """The number of threads that the run computes with, where it is known."""
        digests = self.digests
        place = f"run {self.tracked.id}: the number of threads that it keeps"
        return whole_number(digests["threads"], place) if "threads" in digests else None

    def check(self, origin: Origin, data: Mapping[str, str], lineage: DataLineage, trainer: object) -> None:
        """Compare what is here with what the state belongs to.

        Args:
            origin: code, environment and recipe of now.
            data: digests of the data and its batches.
            lineage: where that data comes from.
            trainer: the description of the trainer that is to go on.

        Raises:
            UserError: something differs and is not allowed.
        """
        last = self.last
        # What a program imports is no part of its state: it stands in no checkpoint.
        recorded = {**self.digests, **last.environment().beside_digests}
        present = {**origin.digests, **origin.environment.beside_digests, **data}
        if origin.code.imported_digest:
            recorded["imported"], present["imported"] = imported_digests(last.archive(), origin.code.archive)
        made = ({}, {}) if self.checkpoint is None else described.compared(self.checkpoint.objects, trainer)
        since = self.last.changes_since(self.checkpoint)
        if not {*identity.differing(recorded, present), *since} & {*_SHAPING, "trainer", "vocabulary"}:
            # Of other settings, code or tokens it is another for a reason that is told, or was allowed, already.
            recorded["trainer"], present["trainer"] = map(described.digest, made)
        self.changes = identity.check_identity(
            self.tracked.id,
            recorded,
            present,
            self.allowed,
            {
                "config": lambda: identity.config_difference(last.decisive(), origin.decisive),
                "trainer": lambda: described.difference(*made),
                "code": lambda: identity.code_difference(last.archive(), origin.code.archive),
                "imported": lambda: identity.code_difference(last.archive(), origin.code.archive),
                "data": lambda: identity.data_difference(last.lineage(), lineage.to_json()),
                "vocabulary": lambda: "the tokenizer has another vocabulary",
                "batches": lambda: "the training loader makes other batches (its seed, its size, or the data)",
                "environment": lambda: identity.environment_difference(last.environment(), origin.environment),
                "threads": lambda: f"was {self.threads}, is {origin.environment.system['threads']}",
                "canary": lambda: identity.numerics_difference(last.environment(), origin.environment),
            },
        )
        self.altered = frozenset({*self.changes, *since})

    def restore(self, trainer: "ModelTrainer") -> None:
        """Put the state into ``trainer``, which is made as it was when the run began.

        Raises:
            UserError: the state does not fit it, or its epochs cannot be the run's.
        """
        if self.checkpoint is None:
            return
        state = self.checkpoint.state
        with self.checkpoint.loading():
            if self.altered & {*_SHAPING, "trainer"}:
                # A program that was allowed to change may freeze or convert another part of the model that it makes.
                state = {**state, "trainer": {**state["trainer"], "parameters": None}}
            trainer.load_state_dict(state)
        if self.altered & {"config", "trainer"}:
            trainer.renew_optimizer_options()
        before, now, done = self.checkpoint.objects["parameters"]["epochs"], trainer.epochs, trainer.progress.epoch
        if now < done:
            raise UserError(f"training.epochs is {now}, but run {self.tracked.id} has done {done} epochs already")
        following = [type(callback).__name__ for callback in trainer.callbacks if callback.follows_total_epochs]
        if now != before and following:
            raise UserError(
                f"training.epochs cannot become {now} instead of {before}: {', '.join(following)} follows the number "
                "of epochs from the start, and would have taken another way; begin a new run"
            )

    def rows(self, history: "History") -> list[Row]:
        """Return the rows of the journal that belongs to the checkpoint: MLflow's, where the checkpoint is there too.

        This machine's own may be of a way that the run has left, or of an earlier day; it is the second choice, and the
        metrics in MLflow are the last.

        Args:
            history: every metric that the checkpoint knows of; of those that the trainer records, the journal is to
                have all.

        Raises:
            UserError: what there is of the journal is damaged, or ends before the checkpoint.
        """
        if self.checkpoint is None:
            return []
        directory = self.checkpoint.directory
        trained = self.checkpoint.state["trainer"]
        names = [*STEP_METRICS, *EPOCH_METRICS, *(trained["validation"] or {}).get("metrics", {})]
        micro_step, step = trained["progress"]["micro_step"], trained["progress"]["step"]
        places: dict[str, Callable[[], list[Row]]] = {}
        if is_delivered(self.tracked, directory.name, (directory / MANIFEST).read_bytes()):
            places[f"runs:/{self.tracked.id}/{JOURNAL}"] = self._delivered_rows
        places[str(self.folder / JOURNAL)] = lambda: read_rows(self.folder / JOURNAL)
        # Without its texts, and with the values as the store gives them back.
        places["the metrics in MLflow"] = lambda: rows_of(self.records, micro_step, step, names)
        problems = []
        for place, read in places.items():
            damage = ""
            try:
                rows = read()
            except DamagedJournalError as error:
                # Behind the rows that the checkpoint counts it is of a crash, as a torn line is.
                rows, damage = error.rows, str(error)
            except UserError as error:
                if is_away(error):
                    raise
                problems.append(str(error))
                continue
            lacks = missing_row(rows, history, names, number_of(self.run, FIRST_STEP, 0))
            if lacks is None:
                if problems:
                    warnings.warn(f"the journal is taken from {place}: {'; '.join(problems)}", stacklevel=2)
                return rows
            problems.append(damage or f"{place}: lacks {lacks}")
        raise UserError(
            f"run {self.tracked.id} cannot go on from {directory.name}, whose metrics are not all in its journal:\n"
            + "".join(f"  {problem}\n" for problem in problems)
            + f"Put {JOURNAL} back as it was; or move {directory} elsewhere, and {CHECKPOINTS}/{directory.name} out of "
            "the run's artifacts if it is there: then the run goes on from the checkpoint before it"
        )

    def _delivered_rows(self) -> list[Row]:
        with tempfile.TemporaryDirectory() as scratch:
            return read_rows(download(self.tracked.id, JOURNAL, Path(scratch)))

    def next_segment(self) -> Segment:
        """Return the segment that this process is about to be."""
        recorded = max((step for _, step in self.records), default=-1)
        return self.last.next(self.tracked.segment + 1, self.checkpoint, self.changes, recorded)

    @cached_property
    def records(self) -> Records:
        """What the tracking store holds of the run's metrics."""
        return metric_records(self.tracked.id)

    @property
    def digests(self) -> dict[str, str]:
        """What the run goes on with, as digests by name."""
        return {**self._state_digests(), **self.last.changes_since(self.checkpoint)}

    def _state_digests(self) -> dict[str, str]:
        if self.checkpoint is not None:
            return {name: digest for name, digest in self.checkpoint.digests.items() if name != BRANCH}
        tags = self.run.data.tags
        names = {"code": CODE_DIGEST, "canary": CANARY, "data": DATA_DIGEST}
        found = {name: tags[tag] for name, tag in names.items() if tag in tags}
        environment = self.last.environment()
        found |= {"threads": str(environment.system["threads"]), "environment": environment.named_digest}
        return {**found, "config": settings_digest(self.last.decisive())}


def _folder_name(run: Run) -> str:
    run_id = run.info.run_id
    name: str = run.data.tags.get(FOLDER, f"run-{run_id[:6]}")
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(
            f"run {run_id}: its tag {FOLDER} is {name!r}, expected the name of one folder below runs/; set it to what "
            "it was, or delete it"
        )
    return name


def find_unfinished(experiment: str, origin: Origin, data_digest: str) -> str | None:
    """Return the newest training run of an experiment that would come to where one would that began now, and did not.

    What decides that is compared, as for every run that goes on, and the number of epochs.
    """
    known = mlflow.get_experiment_by_name(experiment)
    if known is None:
        return None
    settings = dict(flatten(origin.settings))
    # Of another device the canary is not known here; what goes on is compared with it all the same.
    canary = (CANARY,) if settings.get("training.device", "cpu") == "cpu" else ()
    deciding = (CODE_DIGEST, IMPORTED_DIGEST, ENVIRONMENT_DIGEST, *canary)
    expected = {tag: digest for tag, digest in origin.tags().items() if tag in deciding} | {DATA_DIGEST: data_digest}
    same_code = f"tags.`{KIND}` = 'train' and tags.`{CODE_DIGEST}` = '{expected[CODE_DIGEST]}'"
    for run in mlflow.MlflowClient().search_runs([known.experiment_id], same_code):
        tags = run.data.tags
        if tags.get(STATE) == "finished" or REPRODUCES in tags:
            continue
        # A run that was killed early has no data yet.
        same = all(tags.get(name, value) == value for name, value in expected.items())
        if same and _trains_as(newest_segment(run), origin, settings.get("training.epochs")):
            return str(run.info.run_id)
    return None


def _trains_as(segment: Segment, origin: Origin, epochs: Scalar) -> bool:
    try:
        its_epochs = dict(flatten(segment.settings())).get("training.epochs")
        digest = settings_digest(segment.decisive())
    except UserError as error:
        if is_away(error):
            raise
        # One that has lost its recipe cannot go on.
        return False
    # More epochs change no bit on the way, but where it ends.
    return its_epochs == epochs and digest == origin.digests["config"]
