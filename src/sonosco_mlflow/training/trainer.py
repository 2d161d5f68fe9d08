"""ModelTrainer: the one visible loop.

A step runs in a fixed order: optimizer step, metrics, validation, early stopping, and last the safe point at which
state may be saved. Nothing that a step draws is carried from the step before: batches are keyed by (seed, epoch),
augmentation by (seed, epoch, utterance), dropout by (seed, micro-step). So the state is small, is complete at every
safe point, and continues on the same path wherever it is loaded.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from signal import SIGINT
from typing import Any

import torch
from torch import nn

from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.determinism import KeptGenerators, seed_for
from sonosco_mlflow.errors import UserError, require_positive
from sonosco_mlflow.metrics import Metric
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.training.averaging import borrowed_weights
from sonosco_mlflow.training.callbacks.base import EPOCH_METRICS, STEP_METRICS, Callback
from sonosco_mlflow.training.callbacks.dispatch import (
    callbacks_state,
    emit,
    emit_exception,
    evaluated_weights,
    learning_rate_factor,
    load_callbacks_state,
    tell_callbacks,
    tell_observers,
)
from sonosco_mlflow.training.interruption import Interruption, deferred_interrupts
from sonosco_mlflow.training.optimizer import (
    LearningRates,
    OptimizerRecipe,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
    placed_as,
)
from sonosco_mlflow.training.parameters import load_model_state, parameter_traits
from sonosco_mlflow.training.precision import Precision
from sonosco_mlflow.training.progress import Progress
from sonosco_mlflow.training.validation import (
    Decoder,
    Loss,
    Validation,
    default_decoder,
    evaluate,
    model_loss,
    require_distinct_names,
)


@serializable
class ModelTrainer:
    """Trains a model, and can be stopped and continued at any step.

    Args:
        model: any module; one without ``decode`` needs a ``decoder`` if there are metrics. One whose constructor's
            parameters cannot be known (``nn.Sequential``, a class without ``@serializable``) is given anew.
        loss: ``loss(model, batch)``, a scalar that is a mean over the batch's utterances.
        optimizer: over the model's parameters.
        train_loader: batches to train on. Loaders are not kept with the trainer: they are given anew.
        val_loader: batches to validate on, or None.
        metrics: called as ``metric(references, hypotheses)`` on the validation set, recorded as ``val_<name>``.
        callbacks: see :class:`~sonosco_mlflow.training.callbacks.base.Callback`; called in this order.
        decoder: ``decoder(model, batch)`` gives the hypothesis texts; by default the model's own decoding.
        epochs: how often to go through the training set.
        seed: key of all randomness inside the model.
        accumulation: batches whose gradients are averaged into one optimizer step.
        gradient_clip: bound on the gradient's 2-norm, or None.
        validate_every_steps: validate also every so many optimizer steps, besides the end of each epoch.
        device: where the model trains.
        precision: what forward passes of training compute in, where the device has units for it; see
            :class:`~sonosco_mlflow.training.precision.Precision`.

    Attributes:
        progress: where training stands.
        validation: what the last validation gave, or None.
        at_safe_point: whether the state is consistent, as it is between two micro-steps.
        is_whole: the same, and already while callbacks are told ``on_safe_point``.
        failure: what a callback raised in the middle of a micro-step that was then finished, or None.

    Raises:
        UserError: a number is not above 0, two metrics have one name, there is no such precision, or metrics need a
            ``decoder``; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = model_loss,
        optimizer: torch.optim.Optimizer | OptimizerRecipe | None = None,
        train_loader: AudioDataLoader | None = None,
        val_loader: AudioDataLoader | None = None,
        *,
        metrics: Sequence[Metric] = (),
        callbacks: Sequence[Callback] = (),
        decoder: Decoder | None = None,
        epochs: int = 10,
        seed: int = 0,
        accumulation: int = 1,
        gradient_clip: float | None = None,
        validate_every_steps: int | None = None,
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        periods = {"accumulation": accumulation, "validate_every_steps": validate_every_steps}
        require_positive("ModelTrainer", **periods, gradient_clip=gradient_clip)
        require_distinct_names(metrics)
        self.device = torch.device(device)
        self.precision = Precision(precision, self.device)
        self.model = model.to(self.device)
        self.loss = loss
        if optimizer is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if isinstance(optimizer, OptimizerRecipe):
            optimizer = optimizer.build(model)
        self.optimizer = optimizer
        self.optimizer_recipe = OptimizerRecipe.of(optimizer, model)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.metrics = list(metrics)
        self.callbacks = list(callbacks)
        self.observers: list[Callback] = []
        self.decoder = decoder or default_decoder(model, val_loader or train_loader, is_needed=bool(metrics))
        self.epochs = epochs
        self.seed = seed
        self.accumulation = accumulation
        self.gradient_clip = gradient_clip
        self.validate_every_steps = validate_every_steps
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.validation: Validation | None = None
        self.at_safe_point = True
        self.is_whole = True
        self.failure: Exception | None = None
        self._safe_micro_step = 0
        self._interruption = Interruption()
        self._generators = KeptGenerators()
        self._window_loss = 0.0
        self._window_utterances = 0
        self._rates = LearningRates(self.optimizer_recipe)

    # ------------------------------------------------------------------ what users call

    def start_training(self) -> None:
        """Train from the current position to the last epoch, or until a callback stops it.

        Raises:
            KeyboardInterrupt: after a SIGINT or SIGTERM, at the next safe point; training can be continued.
            UserError: there is nothing to train on, or the loss or its gradient is not finite.
            Exception: of a callback; the micro-step in which it came is finished first.
        """
        if self.train_loader is None:
            raise UserError("there is no train_loader; give it to the ModelTrainer or to Deserializer.deserialize")
        self.failure = None
        self._reach_safe_point()
        try:
            with self._generators.drawing(self.seed, "training", first=self.progress.micro_step == 0):
                emit(self, "on_train_begin")
                with deferred_interrupts(self._interruption):
                    while not self.finished:
                        self._epoch(self.train_loader)
            emit(self, "on_train_end")
        except BaseException as error:
            # A launcher sends SIGTERM right behind the SIGINT: it must not cut off the saving.
            with deferred_interrupts(obeyed=SIGINT):
                emit_exception(self, error)
            raise

    continue_training = start_training

    def stop_training(self, reason: str) -> None:
        """Ask the loop to end after the current step, for good; ``reason`` is kept with the state."""
        self.stop_reason = reason

    def interrupt(self) -> None:
        """Have the training raise KeyboardInterrupt at its next safe point, as SIGINT does; from any thread."""
        self._interruption.request()

    def cancel_interrupt(self) -> None:
        """Take back an :meth:`interrupt` that came too late."""
        self._interruption.requested = None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or a callback stopped the training."""
        return self.stop_reason is not None or self.progress.epoch >= self.epochs

    @property
    def position(self) -> int:
        """The micro-step to whose end belongs what is recorded now: a state that was saved earlier does not know it."""
        return self._safe_micro_step + 1

    @property
    def batches_into_step(self) -> int:
        """Batches whose gradients wait for the optimizer step."""
        return self.progress.batch % self.accumulation

    def attach(self, observer: Callback) -> None:
        """Add a callback that belongs to where the trainer runs, not to the trainer: it is not kept with it."""
        self.observers.append(observer)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` at the current step: into MLflow, TensorBoard, the history, whatever listens."""
        emit(self, "on_metrics", metrics)

    def record_text(self, name: str, text: str) -> None:
        """Record a Markdown text at the current step."""
        emit(self, "on_text", name, text)

    def evaluate(self, loader: AudioDataLoader, prefix: str, decoder: Decoder | None = None) -> Validation:
        """Return loss and metrics of ``loader``, named ``prefix + name``; no generator and no mode is left changed.

        ``decoder`` takes the place of the trainer's own.
        """
        chosen = decoder or self.decoder
        with self.evaluated_weights():
            return evaluate(self.model, loader, prefix, loss=self.loss, decoder=chosen, metrics=self.metrics)

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Give the model, for a block, the weights that it is evaluated with: a callback's average, or its own."""
        return borrowed_weights(self.model, evaluated_weights(self))

    # ------------------------------------------------------------------ the loop

    def _epoch(self, loader: AudioDataLoader) -> None:
        """Train on what is left of the current epoch, or until a callback stops the training."""
        batches = self._require_batches(loader)
        emit(self, "on_epoch_begin")
        started = time.perf_counter()
        for batch in loader.epoch(self.progress.epoch, start=self.progress.batch):
            started = self._micro_step(batch.to(self.device), batches, started)
            self._interruption.raise_if_requested()
            if self.stop_reason is not None:
                break

    def _require_batches(self, loader: AudioDataLoader) -> int:
        """Return how many batches the current epoch has; the next one is among them."""
        loader.require_all_batches()
        progress = self.progress
        batches = loader.batches_in(progress.epoch)
        if batches == 0:
            raise UserError("there is nothing to train on: the train_loader's manifest is empty")
        if progress.batch >= batches:
            raise UserError(
                f"the training stands before batch {progress.batch} of epoch {progress.epoch}, where the train_loader "
                f"has {batches} batches: it makes other ones than it did; give the loader of then, or begin a new run"
            )
        return batches

    def _micro_step(self, batch: Batch, batches: int, started: float) -> float:
        """Train on ``batch``, of an epoch of so many ``batches``; return when the next optimizer step starts."""
        progress = self.progress
        # The last optimizer step of an epoch may have fewer batches than the others.
        window = min(self.accumulation, batches - (progress.batch - self.batches_into_step))
        self.at_safe_point = self.is_whole = False
        torch.manual_seed(seed_for(self.seed, "step", progress.micro_step))
        self.model.train()
        with self.precision.computing():
            loss = self.loss(self.model, batch)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss is {loss.item()} at step {progress.step + 1} (epoch {progress.epoch}, utterances "
                f"{', '.join(batch.ids[:5])}); "
                "lower optimizer.lr, set training.gradient_clip, or look at these utterances"
            )
        self.precision.backward(loss / window)
        self._window_loss += loss.item() / window
        self._window_utterances += len(batch)
        progress.batch += 1
        progress.micro_step += 1
        progress.utterances += len(batch)
        progress.frames += batch.frames
        epoch_ended = progress.batch == batches
        stepped = progress.batch % self.accumulation == 0 or epoch_ended
        if stepped:
            self._optimizer_step(time.perf_counter() - started, self._epoch_metrics() if epoch_ended else {})
        if epoch_ended:
            progress.epoch, progress.batch = progress.epoch + 1, 0
        if stepped and self._validation_is_due(epoch_ended):
            self._validate()
        if epoch_ended:
            emit(self, "on_epoch_end", progress.epoch - 1)
        self.is_whole = True
        if self.failure is None:
            tell_callbacks(self, "on_safe_point")
        self._reach_safe_point()
        if self.failure is not None:
            raise self.failure
        tell_observers(self, "on_safe_point")
        return time.perf_counter() if stepped else started

    def _reach_safe_point(self) -> None:
        self.at_safe_point = self.is_whole = True
        self._safe_micro_step = self.progress.micro_step

    def _epoch_metrics(self) -> dict[str, float]:
        assert self.train_loader is not None
        return dict(zip(EPOCH_METRICS, [self.train_loader.padding_in(self.progress.epoch)], strict=True))

    def _optimizer_step(self, seconds: float, more: Mapping[str, float]) -> None:
        self.precision.unscale(self.optimizer)
        emit(self, "on_gradients")
        norm = clip_gradients(self.optimizer, self.model, self.gradient_clip)
        # Of float16 the scale is lowered until they are; the step is left out meanwhile.
        if not math.isfinite(norm) and self.precision.used != "float16":
            raise UserError(
                f"the gradient is not finite ({norm}) at step {self.progress.step + 1} (epoch {self.progress.epoch}), "
                "and nothing has moved by it; lower optimizer.lr, or look at what the loss is made of"
            )
        self._rates.set(self.optimizer, learning_rate_factor(self), self.progress.step + 1)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.precision.step(self.optimizer)
        # Of parameters too that the optimizer does not move: they are no state between two steps.
        self.model.zero_grad()
        self.progress.step += 1
        emit(self, "on_step_end")
        values = (self._window_loss, rate, norm, self._window_utterances / seconds)
        self.record({**dict(zip(STEP_METRICS, values, strict=True)), **more})
        self._window_loss, self._window_utterances = 0.0, 0

    def _validation_is_due(self, epoch_ended: bool) -> bool:
        every = self.validate_every_steps
        return self.val_loader is not None and (epoch_ended or (every is not None and self.progress.step % every == 0))

    def _validate(self) -> None:
        assert self.val_loader is not None
        self.validation = self.evaluate(self.val_loader, "val_")
        self.record(self.validation.metrics)
        emit(self, "on_validation_end", self.validation)

    # ------------------------------------------------------------------ state

    @property
    def external_parameters(self) -> tuple[str, ...]:
        """What is not kept with the trainer but given anew: the loaders, and a model that cannot be described."""
        try:
            Serializer().describe(self.model)
        except UserError:
            return ("train_loader", "val_loader", "model")
        return ("train_loader", "val_loader")

    def serialized_parameters(self) -> dict[str, object]:
        """Return the constructor's parameters as they now are, the optimizer as its recipe."""
        return {
            "model": self.model,
            "loss": self.loss,
            "optimizer": self.optimizer_recipe,
            "train_loader": self.train_loader,
            "val_loader": self.val_loader,
            "metrics": self.metrics,
            "callbacks": self.callbacks,
            "decoder": self.decoder,
            "epochs": self.epochs,
            "seed": self.seed,
            "accumulation": self.accumulation,
            "gradient_clip": self.gradient_clip,
            "validate_every_steps": self.validate_every_steps,
            "device": str(self.device),
            "precision": self.precision.wanted,
        }

    def state_dict(self) -> dict[str, object]:
        """Return the whole state as a tree of plain data: ``model``, ``optimizer`` and ``trainer``."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if self.batches_into_step and parameter.grad is not None
        }
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.model),
            "trainer": {
                "progress": asdict(self.progress),
                "stop_reason": self.stop_reason,
                "validation": None if self.validation is None else asdict(self.validation),
                "parameters": parameter_traits(self.model),
                "gradients": gradients,
                "window_loss": self._window_loss,
                "precision": self.precision.state_dict(),
                "generators": self._generators.state_dict(),
                "callbacks": callbacks_state(self.callbacks),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` described.

        Raises:
            UserError: the state is of other callbacks or another optimizer, at a place that the train_loader does not
                have, or no trainer's.
        """
        trainer = state["trainer"]
        load_model_state(self.model, state["model"], trainer["parameters"])
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        self._rates = LearningRates(self.optimizer_recipe)
        self.progress = Progress.of_state(trainer["progress"])
        self.stop_reason = trainer["stop_reason"]
        self.validation = None if trainer["validation"] is None else Validation(**trainer["validation"])
        self._window_loss = trainer["window_loss"]
        # A state from before there was a choice has none.
        precision = trainer.get("precision", {})
        self.precision.load_state_dict(precision)
        # Gradients that wait were kept as they were then, scaled or not.
        rescaled = self.precision.scale / precision.get("scale", 1.0)
        for name, parameter in self.model.named_parameters():
            gradient = trainer["gradients"].get(name)
            parameter.grad = None if gradient is None else placed_as(parameter, gradient).mul_(rescaled)
        load_callbacks_state(self.callbacks, trainer["callbacks"])
        self._reach_safe_point()
        self._generators.load_state_dict(trainer["generators"])
        if self.train_loader is not None and not self.finished:
            self._require_batches(self.train_loader)

    def renew_optimizer_options(self) -> None:
        """Set the optimizer's options as this trainer was made with, after a state of other ones was loaded."""
        self.optimizer_recipe.renew_options(self.optimizer)
