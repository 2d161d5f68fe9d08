"""What a manifest of a million rows costs: seconds, rows a second, and peak memory, beside plain JSON.

    python benchmarks/manifest_size.py [--rows 1000000] [--rounds 3]

Each way is a process of its own on one core, and in a round each has one turn, so that what else the machine does falls
on all of them. Seconds are the processor's, of the work alone; memory is the most that the process ever held. The table
gives the median of the rounds, and the ratio to plain JSON within a round.

plain JSON    a list of what json.loads makes of each line, as NeMo reads a manifest: nothing is checked or sorted
open          Manifest.read
open, exact   the way that Manifest.read takes where anything is irregular: line by line
walk          Manifest.read, then a loop over all utterances
digest        Manifest.read, then its digest
validate      the checks of `sonosco manifest validate --rows-only`, with a vocabulary
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "as", "with", "they", "by"]
VOCABULARY = {"tokenizer": "characters", "alphabet": sorted({*" ".join(WORDS)})}


def write_manifest(path: Path, rows: int) -> None:
    """Write rows like LibriSpeech's: 30 words, 400 utterances a speaker."""
    choose = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            speaker = f"{row // 400:05d}"
            name = f"{speaker}-{row // 40:06d}-{row:08d}"
            entry = {
                "id": name,
                "audio_filepath": f"wav/{speaker}/{name}.flac",
                "duration": round(choose.uniform(1, 20), 4),
                "text": " ".join(choose.choices(WORDS, k=30)),
                "speaker": speaker,
            }
            file.write(json.dumps(entry) + "\n")


def plain(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return len([json.loads(line) for line in file])


def opened(path: Path) -> int:
    from sonosco_mlflow.data.manifest import Manifest

    return len(Manifest.read(path))


def exact(path: Path) -> int:
    from sonosco_mlflow.data import manifest

    with mock.patch.object(manifest, "read_columns", return_value=None):
        return len(manifest.Manifest.read(path))


def walk(path: Path) -> int:
    from sonosco_mlflow.data.manifest import Manifest

    return sum(1 for _ in Manifest.read(path))


def digest(path: Path) -> int:
    from sonosco_mlflow.data.manifest import Manifest

    manifest = Manifest.read(path)
    assert len(manifest.digest) == 64
    return len(manifest)


def validate(path: Path) -> int:
    from sonosco_mlflow.data.manifest_tools.validation import findings_of

    vocabulary = path.with_name("vocabulary.json")
    found = list(findings_of([path], vocabulary, expected=None, processes=1, progress=lambda done, total: None))
    assert not found, found[:3]
    with path.open("rb") as file:
        return sum(1 for _ in file)


WAYS: dict[str, Callable[[Path], int]] = {
    "plain JSON": plain,
    "open": opened,
    "open, exact": exact,
    "walk": walk,
    "digest": digest,
    "validate": validate,
}


def measure(way: str, path: Path) -> None:
    """Print [rows, processor seconds, peak bytes] of one way."""
    before = time.process_time()
    rows = WAYS[way](path)
    seconds = time.process_time() - before
    print(json.dumps([rows, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a long manifest costs.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, arguments.path)
        return
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.jsonl")
        write_manifest(path, arguments.rows)
        path.with_name("vocabulary.json").write_text(json.dumps(VOCABULARY))
        print(f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB")
        for _ in range(arguments.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--path", str(path)]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                found[way].append(json.loads(output))
                assert found[way][-1][0] == arguments.rows
    print("| | seconds | rows a second | peak MB | plain JSON's seconds / these |\n|---|---|---|---|---|")
    for way, rounds in found.items():
        seconds = median(round_[1] for round_ in rounds)
        peak = median(round_[2] for round_ in rounds)
        ratios = [reference[1] / round_[1] for reference, round_ in zip(found["plain JSON"], rounds, strict=True)]
        span = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {way} | {seconds:.2f} | {arguments.rows / seconds:,.0f} | {peak / 1e6:.0f} | {span} |")


if __name__ == "__main__":
    main()
