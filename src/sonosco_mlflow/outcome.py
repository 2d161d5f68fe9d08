"""How a run ended, for the one who began it: its error rates, a few transcripts, and where to see more."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.evaluation import UtteranceResult, transcripts
from sonosco_mlflow.tracking.secrecy import without_secrets


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its id, its final metrics, and what it made of the test utterances."""

    run_id: str
    metrics: dict[str, float]
    results: Sequence[UtteranceResult]


def report(outcome: Outcome) -> str:
    """Return what a person wants to read at the end of a run."""
    rates = {name: value for name, value in outcome.metrics.items() if name.endswith("error_rate")}
    lines = [f"  {name:<28} {100 * value:6.2f} %{_interval(outcome.metrics, name)}" for name, value in rates.items()]
    uri = without_secrets(os.environ["MLFLOW_TRACKING_URI"])
    see = f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite") else uri
    return "\n".join(
        [
            f"\nrun {outcome.run_id}",
            *lines,
            "",
            transcripts(outcome.results, 3),
            "",
            f"see it:  {see}",
        ]
    )


def _interval(metrics: Mapping[str, float], rate: str) -> str:
    if f"{rate}_lower" not in metrics:
        return ""
    return f"  (95 %: {100 * metrics[f'{rate}_lower']:.2f} to {100 * metrics[f'{rate}_upper']:.2f})"


def write_json(path: Path, content: object) -> None:
    """Write what DVC keeps of a run."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
