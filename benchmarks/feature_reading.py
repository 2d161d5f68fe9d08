"""How quickly batches of features are read, from this package's store and from others.

    python benchmarks/feature_reading.py [FOLDER]               # a Markdown table
    python benchmarks/feature_reading.py --rounds 5             # a shorter look

The same 1000 utterances of 2 to 15 s, 80 bands, are stored in each way; then an epoch of batches, bucketed by length
and shuffled, is read from each into padded tensors, on one thread, the files being in the page cache. In each round
each takes its turn, in an order that rotates; a ratio is taken within a round, of the process's own seconds, and the
table gives the median of the rounds with the smallest and largest. The last row copies as many bytes in memory.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from feature_extraction import in_environment

PINS = ["lhotse==1.33.0", "lilcom==1.8.1", "h5py==3.14.0"]
RATE, UTTERANCES, FRAMES_PER_BATCH = 16_000, 1000, 24_000


def table(rounds: int) -> str:
    import numpy as np
    import soundfile
    import torch

    from sonosco_mlflow.data.batching import BatchPlan
    from sonosco_mlflow.data.executors import Processes
    from sonosco_mlflow.data.extraction import extract_features
    from sonosco_mlflow.data.manifest import Manifest, Utterance
    from sonosco_mlflow.data.processor import AudioDataProcessor

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, stream, rows = Path(name), np.random.default_rng(0), []
        for number, seconds in enumerate(stream.uniform(2.0, 15.0, UTTERANCES)):
            path = folder / f"{number:04d}.wav"
            soundfile.write(path, stream.uniform(-0.1, 0.1, int(seconds * RATE)), RATE)
            rows.append(Utterance(path.stem, path.name, int(seconds * RATE) / RATE, "", ""))
        manifest = Manifest(rows, folder)
        processor = AudioDataProcessor()
        store = extract_features(manifest, processor, folder / "store", executor=Processes(2))
        half = extract_features(manifest, processor, folder / "half", dtype="float16", executor=Processes(2))
        features = {name: store.read(name).copy() for name in store.ids}
        readers: dict[str, Callable[[str], np.ndarray]] = {
            "this store, float32": store.read,
            "this store, float16": lambda name: half.read(name).astype(np.float32),
            **others(folder, features),
            "computed from wav": lambda name: processor(folder / f"{name}.wav").numpy(),
        }
        for title, reader in readers.items():
            tolerance = 0.0 if "32" in title or title in ("HDF5", "a .npy file an utterance") else 0.02
            assert max(abs(reader(name) - features[name]).max() for name in store.ids[:20]) <= tolerance, title
        plan = BatchPlan([store.frames(name) for name in store.ids], FRAMES_PER_BATCH, seed=0)
        batches = [[store.ids[place] for place in batch] for batch in plan.batches(0)]
        seconds = timed(readers, batches, features, rounds)
    audio = sum(utterance.duration for utterance in manifest)
    ours = seconds["this store, float32"]
    lines = ["| | times real time | seconds beside this store |", "|---|---|---|"]
    for title, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, ours, strict=True)]
        beside = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {title} | {audio / median(taken):,.0f} | {beside} |")
    return "\n".join(lines)


def others(folder: Path, features: dict) -> dict[str, Callable]:
    import h5py
    import numpy as np
    from lhotse.features.io import LilcomFilesReader, LilcomFilesWriter

    (folder / "npy").mkdir()
    keys = {}
    with h5py.File(folder / "features.h5", "w") as file, LilcomFilesWriter(folder / "lilcom") as lilcom:
        for name, array in features.items():
            np.save(folder / "npy" / f"{name}.npy", array)
            file[name] = array
            # It changes what it is given.
            keys[name] = lilcom.write(name, array.copy())
    opened, reader = h5py.File(folder / "features.h5"), LilcomFilesReader(folder / "lilcom")
    return {
        "a .npy file an utterance": lambda name: np.load(folder / "npy" / f"{name}.npy"),
        "HDF5": lambda name: opened[name][()],
        "lhotse's lilcom": lambda name: reader.read(keys[name]),
    }


def timed(readers: dict, batches: list, features: dict, rounds: int) -> dict[str, list[float]]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def read(reader: Callable) -> None:
        for batch in batches:
            pad_sequence([torch.from_numpy(reader(name)) for name in batch], batch_first=True)

    padded = [torch.zeros(len(batch), max(len(features[name]) for name in batch), 80) for batch in batches]

    def copy() -> None:
        for batch in padded:
            batch.clone()

    works = {title: (lambda reader=reader: read(reader)) for title, reader in readers.items()}
    works["memory copied"] = copy
    seconds: dict[str, list[float]] = {title: [] for title in works}
    titles = list(works)
    for round_ in range(-1, rounds):
        first = round_ % len(titles)
        for title in titles[first:] + titles[:first]:
            began = time.process_time()
            works[title]()
            if round_ >= 0:  # whoever comes first pays for what is made once
                seconds[title].append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    in_environment(__doc__, __file__, PINS, table)
