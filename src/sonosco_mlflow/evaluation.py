"""What a run shows at its end: hypotheses beside references, learning curves, an alignment, a spectrogram."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter
from torch import Tensor

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import collate
from sonosco_mlflow.metrics import bootstrap_interval, character_errors, word_errors
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.models.ctc import CTCModel
from sonosco_mlflow.pictures import png
from sonosco_mlflow.text import SpecialToken, Tokenizer
from sonosco_mlflow.training.inspection import undisturbed
from sonosco_mlflow.training.validation import Validation

Curve = tuple[Sequence[int], Sequence[float]]

# A loss that falls to less than one part in so many is drawn on a logarithmic scale, which has an end, too.
_FAR, _TOO_FAR = 5.0, 1e9
# A token that no frame gives as much has no line in a picture of CTC's posteriors.
_HEARD = 0.01


@dataclass(frozen=True)
class UtteranceResult:
    """One utterance of an evaluation: its texts, and its word errors against its reference's words."""

    id: str
    reference: str
    hypothesis: str
    errors: int
    words: int


def utterance_results(validation: Validation) -> list[UtteranceResult]:
    """Return each utterance's texts and errors, in the order of the evaluation."""
    results = []
    for name, reference, hypothesis in zip(validation.ids, validation.references, validation.hypotheses, strict=True):
        counts = word_errors([reference], [hypothesis])
        results.append(UtteranceResult(name, reference, hypothesis, counts.errors, counts.reference_length))
    return results


def with_intervals(validation: Validation, prefix: str) -> Validation:
    """Return ``validation`` with 95 % bootstrap intervals of its error rates, named ``<rate>_lower``, ``<rate>_upper``.

    Args:
        validation: an evaluation.
        prefix: of its metrics' names.
    """
    metrics = dict(validation.metrics)
    for rate, count in (("word_error_rate", word_errors), ("character_error_rate", character_errors)):
        if (name := prefix + rate) in metrics:
            pairs = zip(validation.references, validation.hypotheses, strict=True)
            bounds = bootstrap_interval([count([reference], [hypothesis]) for reference, hypothesis in pairs])
            metrics |= zip((f"{name}_lower", f"{name}_upper"), bounds, strict=True)
    return replace(validation, metrics=metrics)


def learning_curves(curves: Mapping[str, Curve]) -> bytes:
    """Return a PNG of losses above and error rates below, over optimizer steps.

    Losses that fall far are on a logarithmic scale. Error rates above 1, which a model that has learnt little yet may
    have, lie beyond the picture.

    Args:
        curves: steps and values by metric name; what is neither a loss nor an error rate is left out.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True)
    for name, (steps, values) in curves.items():
        axes = losses if name.endswith("loss") else rates if name.endswith("error_rate") else None
        if axes is not None:
            axes.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 100 else None)
    for axes, title in ((losses, "loss"), (rates, "error rate")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    low, high = _range(curves, "loss")
    if low > 0 and _FAR < high / low < _TOO_FAR:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter(ScalarFormatter())
        losses.yaxis.set_minor_formatter(NullFormatter())
    rates.set_ylim(0.0, min(1.02, 1.05 * _range(curves, "error_rate")[1]) or 1.02)
    rates.yaxis.set_major_formatter(PercentFormatter(1.0))
    rates.set_xlabel("optimizer step")
    return png(figure)


def _range(curves: Mapping[str, Curve], ending: str) -> tuple[float, float]:
    """Return the least and the greatest number of the curves whose names end so; zeros where there is none."""
    finite = [
        value
        for name, (_, values) in curves.items()
        if name.endswith(ending)
        for value in values
        if math.isfinite(value)
    ]
    return min(finite, default=0.0), max(finite, default=0.0)


def compared_curves(one: Mapping[str, Curve], other: Mapping[str, Curve]) -> bytes:
    """Return a PNG of the curves of two runs, one picture a metric: the first solid, the second dashed."""
    names = sorted({**one, **other}) or [""]
    figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        for label, curves, style in (("a", one, "-"), ("b", other, "--")):
            if name in curves:
                axes.plot(
                    *curves[name], style, label=label, linewidth=1.2, marker="." if len(curves[name][0]) < 100 else None
                )
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.supxlabel("optimizer step", fontsize=9)
    return png(figure)


def mel_spectrogram(sample: Sample) -> bytes:
    """Return a PNG of an utterance's features."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(sample.features.T.numpy(), origin="lower", aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="normalised log energy")
    axes.set(xlabel="frame", ylabel="mel band")
    axes.set_title(f"{sample.id}: {sample.text}", parse_math=False)
    return png(figure)


def compared_features(pictures: Mapping[str, Tensor], title: str) -> bytes:
    """Return a PNG of normalised features ``[frames, size]``, one below the other to one scale."""
    figure = Figure(figsize=(9, 0.8 + 1.5 * len(pictures)), layout="constrained")
    rows = figure.subplots(len(pictures), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, features) in zip(rows, pictures.items(), strict=True):
        axes.imshow(features.T.numpy(), origin="lower", aspect="auto", interpolation="nearest", vmin=-2.5, vmax=2.5)
        axes.set_ylabel(name)
    # Each picture has made its own length that of all.
    rows[-1].set_xlim(-0.5, max(len(features) for features in pictures.values()) - 0.5)
    rows[-1].set_xlabel("frame")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return png(figure)


def alignment_picture(model: SpeechModel, tokenizer: Tokenizer, sample: Sample) -> bytes:
    """Return a PNG of where ``model`` looked while it decoded ``sample``: attention weights, or CTC posteriors."""
    device = next(model.parameters()).device
    with undisturbed(model):
        hypothesis = model.decode(collate([sample]).to(device))[0]
    weights, tokens = hypothesis.alignment.cpu(), hypothesis.tokens
    if isinstance(model, CTCModel):
        # Of ten thousand word pieces an utterance has a few.
        heard = weights.amax(dim=0) >= _HEARD
        heard[SpecialToken.BLANK] = True
        tokens = heard.nonzero()[:, 0].tolist()
        weights = weights[:, heard].T
    special = {int(token): token.name for token in SpecialToken}
    steps = [special.get(token) or tokenizer.decode([token]) for token in tokens]
    figure = Figure(figsize=(8, max(3.0, 0.16 * len(weights))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights.numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    figure.colorbar(image, label="weight")
    axes.set_yticks(range(len(steps)), steps, fontsize=6, parse_math=False)
    axes.set(xlabel="encoder frame", ylabel="token")
    axes.set_title(f"{sample.id}: {tokenizer.decode(hypothesis.tokens)}", parse_math=False)
    return png(figure)


def transcripts(results: Sequence[UtteranceResult], count: int) -> str:
    """Return ``count`` references with their hypotheses below them, evenly spread over ``results``."""
    count = min(count, len(results))
    chosen = [results[i * len(results) // count] for i in range(count)]
    return "\n".join(
        f"  {result.id}\n    reference   {result.reference}\n    hypothesis  {result.hypothesis}" for result in chosen
    )


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return metrics as a Markdown table."""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return f"| metric | value |\n|---|---|\n{rows}"
