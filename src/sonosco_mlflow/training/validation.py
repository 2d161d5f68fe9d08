"""Evaluating a model on a whole set: loss, hypotheses, and metrics of them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.decoding.text import TextDecoder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.metrics import Metric
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.training.inspection import undisturbed

Loss = Callable[[Any, Batch], Tensor]
Decoder = Callable[[Any, Batch], list[str]]


@serializable
def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that the model itself computes: ``model(batch).loss``, or the tensor that it returns."""
    output = model(batch)
    return cast(Tensor, output if isinstance(output, Tensor) else output.loss)


@dataclass(frozen=True)
class Validation:
    """What an evaluation gave: metrics under their names, and every utterance's texts in the loader's order."""

    metrics: dict[str, float]
    ids: list[str]
    references: list[str]
    hypotheses: list[str]


def evaluate(
    model: nn.Module,
    loader: AudioDataLoader,
    prefix: str,
    *,
    loss: Loss = model_loss,
    decoder: Decoder | None = None,
    metrics: Sequence[Metric] = (),
) -> Validation:
    """Return loss and metrics of ``loader``; no generator and no module's mode is left changed.

    Args:
        model: what to evaluate, on the device of its first parameter.
        loader: the utterances.
        prefix: of the metrics' names: ``val_`` gives ``val_loss``.
        loss: a mean over a batch's utterances.
        decoder: gives the hypotheses that ``metrics`` are of.
        metrics: called once, with the texts of the whole set.

    Raises:
        UserError: there is no utterance, or the loader gives a rank's part of them.
    """
    loader.require_all_batches()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = 0.0
    ids: list[str] = []
    references: list[str] = []
    hypotheses: list[str] = []
    with undisturbed(model):
        for batch in loader:
            batch = batch.to(device)
            total += float(loss(model, batch)) * len(batch)
            ids += batch.ids
            references += batch.texts
            if decoder is not None:
                hypotheses += decoder(model, batch)
    if not ids:
        raise UserError(f"there is no utterance to evaluate for '{prefix}loss'; the loader's manifest is empty")
    values = {f"{prefix}loss": total / len(ids)}
    for metric in metrics:
        values[f"{prefix}{_name(metric)}"] = float(metric(references, hypotheses))
    return Validation(values, ids, references, hypotheses)


def default_decoder(model: nn.Module, loader: AudioDataLoader | None, *, is_needed: bool) -> Decoder | None:
    """Return what decodes by the model's own ``decode`` into the texts of the loader's tokenizer, or None.

    Raises:
        UserError: it ``is_needed``, and there is none.
    """
    if loader is not None and hasattr(model, "decode"):
        return TextDecoder(loader.tokenizer)
    if is_needed:
        raise UserError(
            f"metrics need hypotheses, but {type(model).__name__} has no decode(batch) or there is no loader; "
            "pass decoder=..., a callable (model, batch) -> list of texts"
        )
    return None


def require_distinct_names(metrics: Sequence[Metric]) -> None:
    """Return if no metric would be recorded in the place of another, or of the loss.

    Raises:
        UserError: one would; the message names it.
    """
    taken = {"loss"}
    for metric in metrics:
        name = _name(metric)
        if name in taken:
            raise UserError(
                f"two metrics are recorded as '{name}'; give one another __name__ (of a functools.partial, too)"
            )
        taken.add(name)


def _name(metric: Metric) -> str:
    """Return the name that ``metric`` is recorded under, behind the split's: its own, or its class's."""
    return str(getattr(metric, "__name__", type(metric).__name__))
