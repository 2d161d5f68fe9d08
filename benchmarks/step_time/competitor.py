"""What all competitors share: the batch, the step, and how they are told to make one."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

N_MELS = 80
FIRST_CHARACTER = 5  # ids below are blank, start and end of sentence and the like


@dataclass(frozen=True)
class Task:
    """What a competitor is asked to train; it arrives as JSON on the command line."""

    competitor: str
    wanted: int | None
    model: str
    preset: str
    vocabulary: int
    utterances: int
    frames: int
    tokens: int

    @classmethod
    def from_command_line(cls) -> "Task":
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        return cls(**json.loads(sys.argv[1]))

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features ``[batch, time, mel]`` and lengths, tokens ``[batch, length]`` and lengths, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.utterances, self.frames, N_MELS, generator=generator)
        tokens = torch.randint(FIRST_CHARACTER, self.vocabulary, (self.utterances, self.tokens), generator=generator)
        # Buckets hold utterances of like length: the shortest has nine tenths of the longest.
        shares = torch.linspace(1.0, 0.9, self.utterances)
        lengths, token_lengths = ((size * shares).long() for size in (self.frames, self.tokens))
        for row, length in enumerate(lengths.tolist()):
            features[row, length:] = 0
        for row, length in enumerate(token_lengths.tolist()):
            tokens[row, length:] = 0
        return features, lengths, tokens, token_lengths


def serve(
    facts: dict[str, object],
    step: Callable[[], object],
    decoder: Callable[[], object] = lambda: None,
    largest: Callable[[], str] = lambda: "",
) -> None:
    """Say the ``facts``, then make a step or the decoder's part of it for each line that comes in, and time it."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() in ("peak", "largest"):
            peak = (in_kilobytes("VmHWM") - BASE) / 1024
            print(json.dumps(peak if line.strip() == "peak" else largest()), flush=True)
            continue
        started = time.process_time()
        {"step": step, "decoder": decoder}[line.strip()]()
        print(json.dumps({"seconds": time.process_time() - started}), flush=True)


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def in_kilobytes(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1])
    raise KeyError(entry)


# What libraries need before there is a model; the highest mark of memory so far is forgotten.
BASE = 0


def imports_are_done() -> None:
    global BASE
    Path("/proc/self/clear_refs").write_text("5")
    BASE = in_kilobytes("VmRSS")
