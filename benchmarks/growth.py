"""Whether ten or a hundred times as much audio costs ten or a hundred times as much, and no more.

    python benchmarks/growth.py [FOLDER] [--hours 1,10,100] [--mels 80] [--rounds 3]

Rows of a manifest, 10 s on average, refer to 40 files of noise of 5 to 15 s that are made once: what is read, computed
and written for each row is what distinct recordings would cost, save that their bytes are in the page cache. Each stage
at each size is a process of its own, the sizes taking turns; the median of the rounds is given, the largest size being
measured once. Seconds are the processor's, of the process and its one worker, so that what else the machine does counts
little. Memory is the most that a process ever held of its own, which files that are mapped are not.

manifest    Manifest.read
features    extract_features, one process beside the one that writes
epoch       the plan of an epoch of 12,000 frames a batch
batches     the loader's pass over it, in the same process, from the first batch to the last
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

RATE, FILES, FRAMES_PER_BATCH = 16_000, 40, 12_000
FRAMES_IN_AN_HOUR = 360_000
STAGES = ["manifest", "features", "epoch"]


def write_recordings(folder: Path) -> list[float]:
    """Write the recordings, and return their seconds."""
    import numpy as np
    import soundfile

    stream = np.random.default_rng(0)
    lengths = [5 + 10 * number / (FILES - 1) for number in range(FILES)]
    for number, seconds in enumerate(lengths):
        samples = stream.uniform(-0.1, 0.1, round(seconds * RATE))
        soundfile.write(folder / f"{number:02d}.wav", samples, RATE, subtype="PCM_16")
    return lengths


def write_manifest(path: Path, hours: int, lengths: list[float]) -> None:
    """Write so many hours of rows over the recordings."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(hours * 360):
            number = row % FILES
            entry = {
                "id": f"{row:08d}",
                "audio_filepath": f"{number:02d}.wav",
                "duration": round(lengths[number] * RATE) / RATE,
            }
            file.write(
                json.dumps({**entry, "text": "so many words as are said in it", "speaker": f"{row // 400}"}) + "\n"
            )


class Memory:
    """The most memory of its own that this process held while it was looked at, fifty times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.most = max(self.most, 1024 * anonymous)


def processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(stage: str, manifest: Path, mels: int) -> dict[str, Any]:
    """Return what a stage took; features lie beside the manifest."""
    import torch

    from sonosco_mlflow.data.dataset import AudioDataset
    from sonosco_mlflow.data.executors import Processes
    from sonosco_mlflow.data.extraction import extract_features
    from sonosco_mlflow.data.features import FeatureStore
    from sonosco_mlflow.data.loader import AudioDataLoader
    from sonosco_mlflow.data.manifest import Manifest
    from sonosco_mlflow.data.processor import AudioDataProcessor
    from sonosco_mlflow.text import CharacterTokenizer

    torch.set_num_threads(1)
    processor, features = AudioDataProcessor(n_mels=mels), manifest.with_suffix("")
    found: dict[str, Any] = {}
    with Memory() as memory:
        begun = processor_seconds()
        rows = Manifest.read(manifest)
        if stage == "manifest":
            found["manifest"] = processor_seconds() - begun
        if stage == "features":
            begun, clock = processor_seconds(), time.perf_counter()
            extract_features(rows, processor, features, executor=Processes(1))
            found = {"features": processor_seconds() - begun, "clock": time.perf_counter() - clock}
            found["worker"] = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        if stage == "epoch":
            tokenizer = CharacterTokenizer([" ", *"abcdefghijklmnopqrstuvwxyz"])
            dataset = AudioDataset(rows, processor, tokenizer, store=FeatureStore(features))
            loader = AudioDataLoader(dataset, frames_per_batch=FRAMES_PER_BATCH, seed=0)
            begun = processor_seconds()
            assert loader.batches_in(0)
            found["epoch"] = processor_seconds() - begun
            begun = processor_seconds()
            assert sum(len(batch) for batch in loader.epoch(0)) == len(rows)
            found["batches"] = processor_seconds() - begun
    return {**found, "memory": memory.most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where all of it goes; by default a temporary one")
    parser.add_argument("--hours", default="1,10,100")
    parser.add_argument("--mels", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "MANIFEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]), arguments.mels)))
        return
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    sizes = sorted(map(int, arguments.hours.split(",")))
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        need = 4 * arguments.mels * FRAMES_IN_AN_HOUR * (sizes[-1] + max(sizes[:-1], default=0)) * 1.1
        if shutil.disk_usage(folder).free < need:
            raise SystemExit(f"{folder}: {need / 1e9:.0f} GB are needed; give another folder, fewer --hours or --mels")
        lengths = write_recordings(folder)
        rounds: dict[int, list[dict[str, dict[str, Any]]]] = {hours: [] for hours in sizes}
        for hours in sizes:
            write_manifest(folder / f"{hours}.jsonl", hours, lengths)
        for number in range(arguments.rounds):
            for hours in sizes:
                if number and hours == sizes[-1]:
                    continue
                rounds[hours].append({})
                for stage in STAGES:
                    command = [sys.executable, __file__, "--mels", str(arguments.mels)]
                    command += ["--one", stage, str(folder / f"{hours}.jsonl")]
                    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                    rounds[hours][-1][stage] = answer
                    print(hours, stage, answer, file=sys.stderr, flush=True)
                shutil.rmtree(folder / str(hours))
    print(table(rounds))


def table(rounds: dict[int, list[dict[str, dict[str, Any]]]]) -> str:
    def middle(hours: int, stage: str, key: str) -> float:
        return median(round_[stage][key] for round_ in rounds[hours])

    columns = [
        "hours",
        *("manifest, ms an hour", "features, s an hour", "beside the smallest", "their memory, worker's"),
        *("epoch, ms an hour", "batches, s an hour", "beside the smallest", "their memory"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    smallest = next(iter(rounds))
    for hours in rounds:

        def an_hour(stage: str, key: str, hours: int = hours) -> float:
            return middle(hours, stage, key) / hours

        def beside(stage: str, key: str, hours: int = hours) -> str:
            return f"{middle(hours, stage, key) / hours / (middle(smallest, stage, key) / smallest):.2f}"

        cells = [
            str(hours),
            f"{1000 * an_hour('manifest', 'manifest'):.1f}",
            f"{an_hour('features', 'features'):.2f}",
            beside("features", "features"),
            f"{middle(hours, 'features', 'memory') / 1e6:.0f}, {middle(hours, 'features', 'worker') / 1e6:.0f} MB",
            f"{1000 * an_hour('epoch', 'epoch'):.1f}",
            f"{an_hour('epoch', 'batches'):.3f}",
            beside("epoch", "batches"),
            f"{middle(hours, 'epoch', 'memory') / 1e6:.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
