"""How long a training step of each model takes, beside the same model written plainly, a peer's, and the floor.

    python benchmarks/step_time.py [FOLDER]                         # all models and presets, a Markdown table
    python benchmarks/step_time.py --only las/small --rounds 5      # one of them, a shorter look
    python benchmarks/step_time.py --no-peers                       # without an environment for SpeechBrain

A step is forward, backward and AdamW, on one thread, under deterministic algorithms. Each competitor is a process
of its own that keeps its model and batch; in a round each makes one step, one right after another and in an order
that rotates, so that what else the machine does falls on all of them. Seconds are the process's own, which has one
thread: on a machine that does nothing else they are the clock's. A ratio is taken within a round; the table gives
the median of the rounds and the smallest and largest.

ours        the model as it stands in this package
obvious     the same architecture and weights, written down the way that comes to mind first: a loop over decoder
            steps, a loop over utterances for each mask, packed sequences. Its loss is checked to be the same.
peer        SpeechBrain's nearest model, its width chosen so that the number of parameters is the nearest possible
floor       the matrix products of a step alone, at the rate of a large product on this machine in the same round
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from resume_peers import PYTHON, REPOSITORY, make_environment

SCRIPTS = Path(__file__).with_suffix("")
PINS = ["torch==2.11.0", "torchaudio==2.11.0", "numpy==2.4.6", "speechbrain==1.1.2"]
SCRIPT_OF = {
    "ours": "with_sonosco.py",
    "obvious": "with_sonosco.py",
    "floor": "with_sonosco.py",
    "peer": "with_speechbrain.py",
}


@dataclass(frozen=True)
class Case:
    """A model at a preset, and the batch that it trains on: utterances up to a longest one, equally spaced."""

    model: str
    preset: str
    vocabulary: int
    utterances: int
    frames: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.preset}"


# A small preset trains on short utterances of a few words, a paper's on sentences: characters, or TDS' word pieces.
CASES = [
    Case("tds", "small", 30, 10, 240, 15),
    Case("tds", "paper", 10_000, 8, 800, 30),
    Case("las", "small", 30, 10, 240, 15),
    Case("las", "paper", 30, 8, 800, 100),
    Case("deepspeech2", "small", 30, 10, 240, 15),
    Case("deepspeech2", "paper", 30, 8, 800, 100),
]


class Competitor:
    """A process that makes steps when it is told to."""

    def __init__(self, name: str, case: Case, python: Path, wanted: int | None = None) -> None:
        self.name = name
        arguments = json.dumps({"competitor": name, "wanted": wanted, **asdict(case)})
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS / SCRIPT_OF[name]), arguments],
            env={**os.environ, **threads, "PYTHONPATH": str(REPOSITORY / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}, see above")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(case: Case, pythons: dict[str, Path], rounds: int) -> dict[str, str]:
    """Return the cells of a row of the table."""
    with ExitStack() as stack:
        competitors: dict[str, Competitor] = {}
        for name, python in pythons.items():
            wanted = competitors["ours"].facts["parameters"] if name == "peer" else None
            competitors[name] = Competitor(name, case, python, wanted)
            stack.callback(competitors[name].end)
        ours, floor = competitors["ours"].facts, competitors["floor"].facts
        if abs(ours["loss"] - competitors["obvious"].facts["loss"]) > 1e-4 * ours["loss"]:
            raise SystemExit(f"{case.name}: the obvious model's loss is another one, so it is no comparison")
        steps: dict[str, list[float]] = {name: [] for name in competitors}
        decoders: dict[str, list[float]] = {"ours": [], "obvious": []}
        names = list(competitors)
        for round_ in range(-1, rounds):
            taken = {name: competitors[name].ask("step")["seconds"] for name in rotated(names, round_)}
            parts = {}
            if ours["has_decoder"]:
                parts = {name: competitors[name].ask("decoder")["seconds"] for name in rotated([*decoders], round_)}
            if round_ < 0:
                continue  # whoever comes first pays for what is made once
            for name, seconds in taken.items():
                steps[name].append(seconds * floor["products"] if name == "floor" else seconds)
            for name, seconds in parts.items():
                decoders[name].append(seconds)
        peaks = [competitor.ask("peak") for name, competitor in competitors.items() if name != "floor"]
        # The profiler may take many times the memory of a step.
        largest = competitors["ours"].ask("largest")
    row = {
        "model": case.name,
        "parameters": f"{ours['parameters'] / 1e6:.1f} M",
        "step": f"{median(steps['ours']):.3g} s",
        "obvious / ours": ratio(steps["obvious"], steps["ours"]),
        "decoders alone": ratio(decoders["obvious"], decoders["ours"]) if ours["has_decoder"] else "no decoder",
        "peer / ours": "not asked for",
        "ours / floor": ratio(steps["ours"], steps["floor"]),
        "largest cost beside products": largest,
        "peak memory: ours, obvious, peer": ", ".join(f"{peak:.0f}" for peak in peaks) + " MB",
    }
    if "peer" in steps:
        peer = competitors["peer"].facts
        row["peer / ours"] = ratio(steps["peer"], steps["ours"])
        row["the peer"] = f"{peer['title']}, {peer['parameters'] / 1e6:.1f} M"
    return row


def rotated(names: list[str], by: int) -> list[str]:
    first = by % len(names)
    return names[first:] + names[:first]


def ratio(above: list[float], below: list[float]) -> str:
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the peer's environment; by default a new one")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="a row; repeatable")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true", help="do not compare with SpeechBrain")
    arguments = parser.parse_args()
    # Run by the project's own environment: what is measured is what trains.
    pythons = {name: Path(sys.executable) for name in ("ours", "obvious", "floor")}
    if not arguments.no_peers:
        folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="step-time-"))).resolve()
        pythons["peer"] = make_environment(folder / "environment-speechbrain", PINS)
    rows = []
    for case in CASES:
        if arguments.only is None or case.name in arguments.only:
            rows.append(measured(case, pythons, arguments.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    columns = list({column: None for row in rows for column in row})
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row.get(column, '') for column in columns)} |")
    print(f"\n{arguments.rounds} rounds, one thread; Python {PYTHON}, {', '.join(PINS).replace('==', ' ')}.")


if __name__ == "__main__":
    main()
