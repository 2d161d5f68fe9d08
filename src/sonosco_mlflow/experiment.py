"""Experiment: a training run with its provenance.

What is needed to derive the run's numbers again is in MLflow before the first step: the code as it ran, the commit,
the environment, the recipe, the data's digests. The trainer knows nothing of this; the Experiment attaches itself to
it as observers.

>>> experiment = Experiment.create(config)                              # doctest: +SKIP
>>> experiment.setup_model_trainer(trainer, checkpoints=True)           # doctest: +SKIP
>>> experiment.start()                                                  # doctest: +SKIP
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch

from sonosco_mlflow.config import Config, flatten, settings_digest
from sonosco_mlflow.console import console_log
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.errors import UserError, describe_failure
from sonosco_mlflow.evaluation import (
    alignment_picture,
    learning_curves,
    mel_spectrogram,
    metrics_table,
    utterance_results,
)
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.serving.logging import log_recognizer
from sonosco_mlflow.serving.recognizer import SpeechRecognizer
from sonosco_mlflow.tracking.checkpoints import upload_checkpoint
from sonosco_mlflow.tracking.journal import Journal
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import DATA_DIGEST, TrackedRun, connect
from sonosco_mlflow.tracking.provenance import describe_environment, snapshot_code
from sonosco_mlflow.tracking.tensorboard import TensorBoard
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.history import History
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
from sonosco_mlflow.training.interruption import deferred_interrupts
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation

C = TypeVar("C", bound=Callback)


class Experiment:
    """A run in MLflow, and the trainer that it runs.

    Use :meth:`create`. In a ``with`` statement the run ends with the block: finished, stopped or failed as the block
    was; elsewhere it ends with :meth:`start` or :meth:`stop`.

    Args:
        run: the open run.
        serializer: writes the trainer's objects into checkpoints.
        folder: the run's own files: checkpoints, journal, TensorBoard events, console log.

    Attributes:
        history: every recorded metric by step.
        test: what the evaluation after training gave, or None.
    """

    def __init__(self, run: TrackedRun, serializer: Serializer, folder: Path) -> None:
        self.run = run
        self.serializer = serializer
        self.folder = folder
        self.history = History()
        self.test: Validation | None = None
        self.journal = Journal(folder / "journal.jsonl", run.log_rows)
        self._resources = ExitStack()
        self._trainer: ModelTrainer | None = None
        self._checkpoint: ModelCheckpoint | None = None
        self._in_block = False
        self._closed = False
        self._test_loader: AudioDataLoader | None = None
        self._resources.enter_context(console_log(folder / "console.log"))

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

        Args:
            config: the recipe, or any nested mapping of your own settings; logged flattened.
            serializer: writes the trainer's objects into checkpoints.
            name: of the run in the UI; a short piece of its id is added.
            experiment: MLflow experiment for a run that ``mlflow run`` has not made already.
            project: folder whose code is kept; the run's files go to ``project/runs``.
        """
        connect(project)
        run = TrackedRun.open(experiment, "train", name)
        # A name in the UI may hold anything, a folder's may not.
        safe_name = re.sub(r"[^\w. -]+", "-", name or "train").strip(". ")[:100]
        folder = project / "runs" / f"{safe_name}-{run.id[:6]}"
        created = cls(run, serializer or Serializer(), folder)
        try:
            created._log_provenance(config, project)
        except Exception as error:
            created._close("failed", error)
            raise
        return created

    def setup_model_trainer(
        self,
        trainer: ModelTrainer,
        *,
        checkpoints: bool = True,
        tensorboard: bool = True,
        test_loader: AudioDataLoader | None = None,
        lineage: DataLineage | None = None,
    ) -> None:
        """Attach this experiment to ``trainer``.

        Args:
            trainer: what :meth:`start` trains.
            checkpoints: keep its state at the end of each epoch, and at :meth:`stop`, in the run's folder and MLflow.
            tensorboard: write event files below ``runs/``.
            test_loader: evaluated once, after training.
            lineage: where the data comes from; by default only the loaders' manifests are known.
        """
        self._trainer = trainer
        self._test_loader = test_loader
        self._lineage = lineage or DataLineage.of_loaders(trainer.train_loader, trainer.val_loader, test_loader)
        self._log_data(self._lineage)
        self.history = _own(trainer, History) or self.history
        if self.history not in trainer.callbacks:
            trainer.callbacks.insert(0, self.history)
        trainer.attach(self.journal)
        if tensorboard:
            trainer.attach(TensorBoard(self.folder / "tensorboard"))
        if checkpoints:
            self._checkpoint = _own(trainer, ModelCheckpoint) or ModelCheckpoint(self.folder / "checkpoints")
            self._checkpoint.serializer = self.serializer
            self._checkpoint.listeners.append(partial(upload_checkpoint, self.run))
            if self._checkpoint not in trainer.callbacks:
                # Last, so that what it saves is what the others decided.
                trainer.callbacks.append(self._checkpoint)

    def start(self) -> None:
        """Train to the end, evaluate, and keep everything in MLflow.

        Raises:
            KeyboardInterrupt: stopped by signal; call :meth:`stop`, which loses nothing.
            Exception: whatever the training raised; the run is marked as failed.
        """
        trainer = self._required_trainer()
        try:
            trainer.start_training()
            self._finish(trainer)
        except Exception as error:
            self._close("failed", error)
            raise
        if not self._in_block:
            self._close("finished")

    def stop(self) -> None:
        """Keep the trainer's whole state in MLflow and end the run as stopped; training can go on from there."""
        # A launcher's second signal must not cut this off.
        with deferred_interrupts():
            if self._checkpoint is not None:
                self._checkpoint.save(self._required_trainer())
            self._close("stopped")

    def __enter__(self) -> Self:
        self._in_block = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._close("finished")
        elif isinstance(error, Exception):
            self._close("failed", error)
        elif self._trainer is not None:
            self.stop()
        else:
            self._close("stopped")

    # ------------------------------------------------------------------ what goes to MLflow, and when

    def _log_provenance(self, config: Config | Mapping[str, object], project: Path) -> None:
        run = self.run
        code = snapshot_code(project)
        environment = describe_environment(torch.get_num_threads(), project)
        settings = config.model_dump(mode="json") if isinstance(config, Config) else config
        run.set_tags(
            {
                "sonosco.code_digest": code.digest,
                "sonosco.commit": code.commit or "none",
                "sonosco.dirty": str(code.dirty).lower(),
                "sonosco.config_digest": settings_digest(settings),
                "sonosco.environment_digest": environment.digest,
            }
        )
        run.log_parameters(dict(flatten(settings)))
        run.log_bytes(code.archive, "code/snapshot.zip")
        run.log_text(code.patch, "code/uncommitted.patch")
        run.log_text(code.git_json(), "code/git.json")
        run.log_text(environment.requirements, "environment/requirements.txt")
        run.log_text(json.dumps(environment.system, indent=1) + "\n", "environment/system.json")
        if isinstance(config, Config):
            run.log_text(config.to_yaml(), "config/params.yaml")

    def _log_data(self, lineage: DataLineage) -> None:
        self.run.set_tags({DATA_DIGEST: lineage.digest, **lineage.tags()})
        self.run.log_text(lineage.to_json(), "data/lineage.json")
        for split, path in lineage.manifest_paths.items():
            self.run.log_dataset(split, lineage.manifests[split], path, context=split)
        self.run.adopt_data_runs(lineage.digest)

    def _finish(self, trainer: ModelTrainer) -> None:
        if self._test_loader is not None:
            self.test = trainer.evaluate(self._test_loader, "test_")
            self.journal.write(trainer.progress.step, self.test.metrics)
        self.journal.flush()
        if self._checkpoint is not None:
            weights = self._checkpoint.save(trainer) / "model.safetensors"
            self.run.set_tags({"sonosco.weights_digest": hashlib.sha256(weights.read_bytes()).hexdigest()})
        self._describe(trainer)
        self._log_results(trainer)
        self._log_model(trainer)

    def _describe(self, trainer: ModelTrainer) -> None:
        validations = [result.metrics for result in (trainer.validation, self.test) if result is not None]
        metrics = {name: value for result in validations for name, value in result.items()}
        progress = trainer.progress
        self.run.describe(
            f"{type(trainer.model).__name__}, {progress.step} steps in {progress.epoch} epochs.\n\n"
            f"{metrics_table(metrics)}\n{self._lineage.to_markdown()}\n"
            f"Derive the test numbers again: `sonosco evaluate {self.run.id}`\n"
        )

    def _log_results(self, trainer: ModelTrainer) -> None:
        for name, validation in (("validation", trainer.validation), ("test", self.test)):
            if validation is not None and validation.hypotheses:
                results = utterance_results(validation)
                self.run.log_table([vars(result) for result in results], f"evaluation/{name}_hypotheses.json")
        curves = {name: self.history.curve(name) for name in self.history.names()}
        self.run.log_bytes(learning_curves(curves), "evaluation/learning_curves.png")
        loader = self._test_loader or trainer.val_loader or trainer.train_loader
        if loader is not None and isinstance(loader.dataset, AudioDataset):
            sample = loader.dataset[0]
            self.run.log_bytes(mel_spectrogram(sample), "evaluation/mel_spectrogram.png")
            if isinstance(trainer.model, SpeechModel):
                picture = alignment_picture(trainer.model, loader.tokenizer, sample)
                self.run.log_bytes(picture, "evaluation/alignment.png")

    def _log_model(self, trainer: ModelTrainer) -> None:
        if not isinstance(trainer.model, SpeechModel) or trainer.train_loader is None:
            return
        dataset = trainer.train_loader.dataset
        recognizer = SpeechRecognizer(trainer.model, dataset.tokenizer, dataset.processor, dataset.statistics)
        with tempfile.TemporaryDirectory() as scratch:
            log_recognizer(recognizer, Path(scratch))

    def _close(self, state: str, error: Exception | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        message = "" if error is None else describe_failure(error)
        with deferred_interrupts():
            self.journal.close()
            self._resources.close()
            with (self.folder / "console.log").open("a", encoding="utf-8") as log:
                log.write(message + "\n" if message else "")
            self.run.log_file(self.folder / "console.log", "logs")
            if self.journal.path.exists():
                self.run.log_file(self.journal.path)
            if (self.folder / "tensorboard").exists():
                self.run.log_folder(self.folder / "tensorboard", "tensorboard")
            self.run.end(state, message)

    def _required_trainer(self) -> ModelTrainer:
        if self._trainer is None:
            raise UserError("the experiment has no trainer yet; call setup_model_trainer first")
        return self._trainer


def _own(trainer: ModelTrainer, kind: type[C]) -> C | None:
    """Return the callback of that kind which the user gave the trainer, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
