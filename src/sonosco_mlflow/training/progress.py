"""Where a training stands."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Where training stands; ``epoch`` and ``batch`` name the next batch to train on."""

    epoch: int = 0
    batch: int = 0
    micro_step: int = 0
    step: int = 0
    utterances: int = 0
    frames: int = 0
