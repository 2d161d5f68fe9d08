"""Experiment: a training run with its provenance.

What is needed to derive the run's numbers again is in MLflow before the first step: the code as it ran, the commit,
the environment, the recipe, the data's digests. The trainer knows nothing of this; the Experiment attaches itself to
it as observers.

>>> experiment = Experiment.create(config)                              # doctest: +SKIP
>>> experiment.setup_model_trainer(trainer, checkpoints=True)           # doctest: +SKIP
>>> experiment.start()                                                  # doctest: +SKIP

A run that was killed or stopped goes on, bit for bit, by the same lines with a trainer that is made in the same way;
only the first of them differs:

>>> experiment = Experiment.resume(run_id)                              # doctest: +SKIP
"""

import hashlib
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Self, TypeVar

import torch

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.decoding.text import TextDecoder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.evaluation import with_intervals
from sonosco_mlflow.reporting import log_results
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.serving.checkpoint_models import CheckpointModels
from sonosco_mlflow.serving.logging import trained_recognizer
from sonosco_mlflow.settings import flatten, plain_settings
from sonosco_mlflow.tracking.language_model import kept_model_of
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.names import folder_name, require_setting_names
from sonosco_mlflow.tracking.open_run import OpenRun
from sonosco_mlflow.tracking.origin import Origin, data_digests
from sonosco_mlflow.tracking.provenance import Provenance
from sonosco_mlflow.tracking.resumption import Resumption
from sonosco_mlflow.tracking.secrecy import require_no_secrets
from sonosco_mlflow.tracking.segments import BRANCH
from sonosco_mlflow.tracking.store import connect, download
from sonosco_mlflow.tracking.tags import FIRST_STEP, FOLDER, WEIGHTS_DIGEST
from sonosco_mlflow.training.callbacks.averages import CheckpointAverage, are_known
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.history import History
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
from sonosco_mlflow.training.interruption import LeaveAtOnce, deferred_interrupts
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation

C = TypeVar("C", bound=Callback)


class Experiment:
    """A run in MLflow, and the trainer that it runs.

    Use :meth:`create` or :meth:`resume`. In a ``with`` statement the run ends with the block: finished, interrupted or
    failed as the block was; elsewhere it ends with :meth:`start` or :meth:`stop`.

    Args:
        run: the run.
        lease: this process's right to train it.
        serializer: writes the trainer's objects into checkpoints.
        folder: the run's own files: checkpoints, journal, TensorBoard events, console log.
        origin: code, environment and recipe.
        resumption: what is known of a run that goes on, or None for a new one.

    Attributes:
        history: every recorded metric by step.
        test: what the evaluation after training gave, or None.
        opened: the run as this process has it in its hands.
    """

    def __init__(
        self,
        run: TrackedRun,
        lease: Lease,
        serializer: Serializer,
        folder: Path,
        origin: Origin,
        resumption: Resumption | None = None,
    ) -> None:
        self.run = run
        self.serializer = serializer
        self.folder = folder
        self.origin = origin
        self.resumption = resumption
        self.history = History()
        self.test: Validation | None = None
        self.opened = OpenRun(run, lease, folder, is_open=resumption is None)
        self._trainer: ModelTrainer | None = None
        self._checkpoint: ModelCheckpoint | None = None
        self._test_loader: AudioDataLoader | None = None
        self._registered_model: str | None = None
        self._search = GREEDY
        self._in_block = False
        # The thread that trains, if one does.
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._stop_requested = False

    @property
    def is_open(self) -> bool:
        """Whether the run is being written to: it is not before a resume has proven right, nor after the end."""
        return self.opened.is_open

    @classmethod
    def create(
        cls,
        config: Config | Mapping[str, object],
        serializer: Serializer | None = None,
        *,
        name: str | None = None,
        experiment: str = "Default",
        project: Path = Path(),
    ) -> "Experiment":
        """Open a run and log where it comes from.

        torch is set to deterministic algorithms and to the recipe's number of threads. Settings of your own leave the
        number as it is; a resume sets it again.

        Args:
            config: the recipe, or a nested mapping of your own settings (texts, numbers, lists); logged flattened.
            serializer: writes the trainer's objects into checkpoints.
            name: of the run in the UI; a short piece of its id is added.
            experiment: MLflow experiment for a run that ``mlflow run`` has not made already.
            project: folder whose code is kept; the run's files go to ``project/runs``.

        Raises:
            UserError: the recipe holds credentials, or settings of your own what cannot be kept; no run is opened.
        """
        config = _keepable(config)
        connect(project)
        threads = config.training.threads if isinstance(config, Config) else torch.get_num_threads()
        determinism.configure(threads)
        run = TrackedRun.open(experiment, "train", name)
        place = folder_name(name or "train", run.id)
        try:
            lease = Lease.take(run.id)
        except BaseException as error:
            run.abandon(error)
            raise
        try:
            run.set_tags({FOLDER: place})
            lease.start()
            origin = Origin.take(config, project)
            run.log_parameters(dict(flatten(origin.settings)))
            origin.log(run)
            # By these it is found as one that can be continued: what that needs stands by now.
            run.set_tags(origin.tags())
            return cls(run, lease, serializer or Serializer(), project / "runs" / place, origin)
        except BaseException as error:
            with suppress(Exception):
                # This error is the one to tell.
                run.end_after(error)
            lease.release()
            raise

    @classmethod
    def resume(
        cls,
        run_id: str,
        config: Config | Mapping[str, object] | None = None,
        serializer: Serializer | None = None,
        *,
        allowed_changes: Iterable[str] = (),
        project: Path = Path(),
    ) -> "Experiment":
        """Continue a run that was killed, stopped or failed, or a finished one that is given more epochs.

        Nothing is needed but what MLflow kept. The run itself is touched by :meth:`setup_model_trainer`, once all that
        its newest checkpoint belongs to has proven to be the same here.

        Args:
            run_id: a training run of this tracking store.
            config: the recipe to go on with; by default the one that the run kept.
            serializer: writes the trainer's objects into checkpoints.
            allowed_changes: what may differ: ``config``, ``code``, ``data``, ``vocabulary``, ``environment``,
                ``numerics``. The run records it.
            project: folder with the code; the run's files go to ``project/runs``.

        Raises:
            UserError: there is no such training run, another process trains it, the recipe holds credentials, or
                settings of your own what cannot be kept.
        """
        config = None if config is None else _keepable(config)
        connect(project)
        resumption = Resumption.begin(run_id, project, allowed_changes)
        try:
            config = resumption.recipe if config is None else config
            threads = config.training.threads if isinstance(config, Config) else resumption.threads
            determinism.configure(threads or torch.get_num_threads())
            origin = Origin.take(config, project)
            arguments = (resumption.tracked, resumption.lease, serializer or Serializer(), resumption.folder, origin)
            return cls(*arguments, resumption)
        except BaseException:
            resumption.lease.release()
            raise

    def setup_model_trainer(
        self,
        trainer: ModelTrainer,
        *,
        checkpoints: bool = True,
        tensorboard: bool = True,
        test_loader: AudioDataLoader | None = None,
        lineage: DataLineage | None = None,
        registered_model: str | None = None,
        search: Search = GREEDY,
    ) -> None:
        """Attach this experiment to ``trainer``; where a run goes on, put its state into the trainer.

        Args:
            trainer: what :meth:`start` trains; for a run that goes on, made as it was the first time.
            checkpoints: keep its state at the end of each epoch, and at :meth:`stop`, in the run's folder and MLflow.
            tensorboard: write event files below ``runs/``.
            test_loader: evaluated once, after training.
            lineage: where the data comes from; by default only the loaders' manifests are known.
            registered_model: of which the trained model becomes a version in MLflow's registry.
            search: how the test set is decoded, and what the trained model then does; validation is the trainer's.

        Raises:
            UserError: the run would not go on as it began; the message says what differs, and the run stays as it was.
        """
        self._trainer = trainer
        self._test_loader = test_loader
        self._registered_model = registered_model
        self._search = search
        lineage = lineage or DataLineage.of_loaders(trainer.train_loader, trainer.val_loader, test_loader)
        digests = {**self.origin.digests, **data_digests(trainer, lineage)}
        provenance = Provenance(self.origin, lineage, digests["canary"], kept_model_of(search))
        self.history = _own(trainer, History) or self.history
        if self.history not in trainer.callbacks:
            trainer.callbacks.insert(0, self.history)
        if checkpoints:
            self._checkpoint = _own(trainer, ModelCheckpoint) or ModelCheckpoint()
            self._checkpoint.serializer = self.serializer
            self._checkpoint.digests = digests
            self._checkpoint.fetch = lambda name, folder: download(self.run.id, f"{CHECKPOINTS}/{name}", folder)
            if self._checkpoint not in trainer.callbacks:
                # Last, so that what it saves is what the others decided.
                trainer.callbacks.append(self._checkpoint)
        models = CheckpointModels(self.run, trained_recognizer(trainer)) if are_known(trainer.callbacks) else None
        follow = None if models is None else models.follow
        self.opened.recording.attach(trainer, self._checkpoint, tensorboard=tensorboard, follow=follow)
        if self.resumption is None:
            provenance.log_data(self.run)
            if trainer.progress.step:
                # It has been trained before: what it knows of that is not in this run's journal.
                self.run.set_tags({FIRST_STEP: str(trainer.progress.step)})
            self.opened.describe()
            return
        try:
            self.resumption.check(self.origin, digests, lineage, self.serializer.describe(trainer))
            self.resumption.restore(trainer)
        except BaseException:
            self.opened.close("failed")
            raise
        if not (self.resumption.was_finished and trainer.finished):
            self._go_on(self.resumption, trainer, provenance)

    def start(self) -> None:
        """Train to the end, evaluate, and keep everything in MLflow. A finished run with nothing to do is left alone.

        Raises:
            KeyboardInterrupt: stopped by signal; call :meth:`stop`, which loses nothing.
            Exception: whatever the training raised; the run is marked as failed.
        """
        trainer = self._required_trainer()
        if not self.is_open and (self.resumption is None or not self.resumption.was_finished):
            raise UserError(f"run {self.run.id} is closed; Experiment.resume('{self.run.id}') continues it")
        if not self.is_open:
            reason = f": {trainer.stop_reason}" if trainer.stop_reason else ""
            print(f"run {self.run.id} finished after {trainer.progress.epoch} epochs{reason}; there is nothing to do")
            self.run.leave()
            self.opened.close("finished")
            return
        self._idle.clear()
        self._thread = threading.current_thread()
        try:
            with self.run.active():
                trainer.start_training()
                self._finish(trainer)
            if not self._in_block:
                self.opened.close("finished")
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, LeaveAtOnce) or not self._stop_requested:
                raise
            self._stop(trainer)
        except Exception as error:
            self.opened.close("failed", error)
            raise
        finally:
            trainer.cancel_interrupt()
            self._thread = None
            self._idle.set()

    def stop(self) -> None:
        """Keep the trainer's whole state in MLflow and end the run as interrupted; training can go on from there.

        While :meth:`start` runs, in another thread or as what a callback is called by, it stops at its next step, ends
        the run and returns; called from another thread, this returns when it has.

        Raises:
            LeaveAtOnce: an interrupt from the keyboard while it is at it; what is saved by then stays saved.
        """
        if isinstance(sys.exception(), LeaveAtOnce):
            self.opened.leave()
            return
        trainer = self._required_trainer()
        thread = self._thread
        if thread is None:
            self._stop(trainer)
            return
        self._stop_requested = True
        trainer.interrupt()
        if thread is not threading.current_thread():
            self._idle.wait()

    def _stop(self, trainer: ModelTrainer) -> None:
        try:
            # A launcher's SIGTERM behind the SIGINT must not cut this off; the user's second SIGINT may.
            with deferred_interrupts(obeyed=SIGINT):
                self._save(trainer)
                self.opened.close("interrupted")
        except LeaveAtOnce:
            if self.is_open:
                self.opened.leave()
            raise

    def _save(self, trainer: ModelTrainer) -> None:
        if not self.is_open or self._checkpoint is None or not trainer.at_safe_point:
            return
        try:
            self._checkpoint.saved(trainer)
        except Exception as error:
            self.opened.close("failed", error)
            raise

    def __enter__(self) -> Self:
        self._in_block = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.opened.close("finished")
        elif isinstance(error, Exception):
            self.opened.close("failed", error)
        elif isinstance(error, LeaveAtOnce):
            self.opened.leave()
        elif self._trainer is not None:
            self.stop()
        else:
            self.opened.close("interrupted")

    def _go_on(self, resumption: Resumption, trainer: ModelTrainer, provenance: Provenance) -> None:
        """Open the run again, with everything as it was at the checkpoint."""
        try:
            segment = resumption.next_segment()
            rows = resumption.rows(self.history)
            self.opened.open()
            self.run.reopen()
            if self._checkpoint is not None and segment.branches:
                self._checkpoint.digests[BRANCH] = str(segment.branch)
            kept = frozenset() if self._checkpoint is None else self._checkpoint.kept
            recording = self.opened.recording
            recording.resume(rows, resumption.records, segment, trainer.progress.micro_step, kept)
            provenance.log_segment(self.run, segment, resumption.checkpoint)
            self.opened.describe()
        except BaseException as error:
            self.opened.close(*_state_after(error))
            raise

    def _finish(self, trainer: ModelTrainer) -> None:
        if self._test_loader is not None:
            # In the trainer's own way, unless another is asked for.
            decoder = None if self._search.is_greedy else TextDecoder(self._test_loader.tokenizer, self._search)
            self.test = with_intervals(trainer.evaluate(self._test_loader, "test_", decoder), "test_")
            # No checkpoint counts it: a resume makes it again.
            self.opened.recording.journal.write(trainer.position, trainer.progress.step, self.test.metrics)
        weights = None if self._checkpoint is None else self._checkpoint.saved(trainer) / "model.safetensors"
        self.opened.complete(partial(self._show, trainer, weights))

    def _show(self, trainer: ModelTrainer, weights: Path | None) -> None:
        """Write to the run what it is when it has come to its end; again, where a server went away meanwhile."""
        if weights is not None:
            self.run.set_tags({WEIGHTS_DIGEST: hashlib.sha256(weights.read_bytes()).hexdigest()})
        validation = trainer.validation
        if trainer.val_loader is not None and _own(trainer, CheckpointAverage) is not None:
            # The last one was of the weights of its step; what is shown and registered is the mean.
            validation = trainer.evaluate(trainer.val_loader, "val_")
        shown = (self.history, validation, self.test, self._test_loader, self._registered_model, self._search)
        with trainer.evaluated_weights():
            log_results(self.run, trainer, *shown)

    def _required_trainer(self) -> ModelTrainer:
        if self._trainer is None:
            raise UserError("the experiment has no trainer yet; call setup_model_trainer first")
        return self._trainer


def _keepable(config: Config | Mapping[str, object]) -> Config | Mapping[str, object]:
    settings = config.model_dump(mode="json") if isinstance(config, Config) else plain_settings(config)
    require_no_secrets(settings)
    require_setting_names(settings)
    return config if isinstance(config, Config) else settings


def _state_after(error: BaseException) -> tuple[str, Exception | None]:
    return ("failed", error) if isinstance(error, Exception) else ("interrupted", None)


def _own(trainer: ModelTrainer, kind: type[C]) -> C | None:
    """Return the callback of that kind which the user gave the trainer, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
