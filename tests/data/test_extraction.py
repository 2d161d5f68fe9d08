import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sonosco_mlflow.data import extraction
from sonosco_mlflow.data.executors import Processes
from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.features import FeatureStore
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.errors import UserError
from toy import PROCESSOR, tone_corpus, tone_texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Counting:
    """Does tasks here and now, and counts the recordings of each kind of task."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def map(self, function: Callable, tasks: Sequence) -> Iterator:
        name = getattr(function, "__name__", type(function).__name__)
        for task in tasks:
            self.counts[name] = self.counts.get(name, 0) + len(task)
            yield function(task)

    @property
    def extracted(self) -> int:
        return self.counts.get("_Extraction", 0)


def interrupted_at(wanted: int) -> Callable[[int, int], None]:
    def interrupt(done: int, total: int) -> None:
        if done == wanted:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.usefixtures("small_shards")
def test_the_bytes_do_not_depend_on_the_number_of_processes(tone_manifest: Manifest, tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        extract_features(tone_manifest, PROCESSOR, tmp_path / str(processes), executor=Processes(processes))
    one, two, three = (contents(tmp_path / str(processes)) for processes in (1, 2, 3))
    assert list(one) == ["index.jsonl", *(f"shard-{number:05d}.npy" for number in range(len(one) - 1))]
    assert len(one) > 4
    assert one == two == three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.usefixtures("small_shards")
def test_no_shard_is_over_its_size(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    sizes = [shard.nbytes for shard in store.shards()]
    assert max(sizes) <= extraction.SHARD_BYTES
    assert sum(sizes) > (len(sizes) - 1) * extraction.SHARD_BYTES / 2


def test_half_precision_is_rounded_once(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path, dtype="float16")
    utterance = tone_manifest[0]
    expected = PROCESSOR(tone_manifest.audio_path(utterance)).numpy().astype(np.float16)
    np.testing.assert_array_equal(store.read(utterance.id), expected)


def test_progress_counts_utterances(tone_manifest: Manifest, tmp_path: Path) -> None:
    seen = []
    extract_features(tone_manifest, PROCESSOR, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(tone_manifest)) for done in range(1, len(tone_manifest) + 1)]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("stopped_at", [1, 7, 19, 20])
def test_an_extraction_goes_on_where_it_was_stopped(stopped_at: int, tone_manifest: Manifest, tmp_path: Path) -> None:
    whole = extract_features(tone_manifest, PROCESSOR, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        extract_features(tone_manifest, PROCESSOR, tmp_path / "store", progress=interrupted_at(stopped_at))
    with pytest.raises(UserError, match="no features here"):
        FeatureStore(tmp_path / "store")
    executor, seen = Counting(), []
    extract_features(
        tone_manifest, PROCESSOR, tmp_path / "store", executor=executor, progress=lambda *done: seen.append(done)
    )
    # Of the shards before the one in which it was stopped, none is computed again.
    shard = whole.shard_of(tone_manifest[stopped_at - 1].id)
    kept = sum(whole.shard_of(utterance.id) < shard for utterance in tone_manifest)
    assert len(tone_manifest) - executor.extracted == kept
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert seen[-1] == (20, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]


CHANGES = {
    "another processor": lambda manifest: (manifest, AudioDataProcessor(n_mels=8, window="hamming"), "float32"),
    "another type": lambda manifest: (manifest, PROCESSOR, "float16"),
    "one recording": lambda manifest: (changed(manifest), PROCESSOR, "float32"),
    "fewer utterances": lambda manifest: (manifest[:9], PROCESSOR, "float32"),
    "other utterances": lambda manifest: (manifest[5:], PROCESSOR, "float32"),
}


def changed(manifest: Manifest) -> Manifest:
    path = manifest.audio_path(manifest[0])
    samples, rate = soundfile.read(path, dtype="int16")
    soundfile.write(path, samples[::-1], rate)
    return manifest


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_finished_of_anything_else_is_not_taken(change: str, tmp_path: Path) -> None:
    manifest = tone_corpus(tmp_path / "audio", tone_texts(20))
    with pytest.raises(KeyboardInterrupt):
        extract_features(manifest, PROCESSOR, tmp_path / "store", progress=interrupted_at(20))
    manifest, processor, dtype = CHANGES[change](manifest)
    extract_features(manifest, processor, tmp_path / "fresh", dtype=dtype)
    extract_features(manifest, processor, tmp_path / "store", dtype=dtype)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


KILLED = """
import os, signal, sys
from pathlib import Path
from sonosco_mlflow.data import extraction
from sonosco_mlflow.data.executors import Processes
from sonosco_mlflow.data.manifest import Manifest
from toy import PROCESSOR

extraction.SHARD_BYTES = 100 * PROCESSOR.n_mels * 4
def kill(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
manifest = Manifest.read(Path(sys.argv[1]))
extraction.extract_features(manifest, PROCESSOR, Path(sys.argv[2]), executor=Processes(2), progress=kill)
"""


@pytest.mark.usefixtures("small_shards")
def test_a_killed_extraction_is_finished_by_the_next(tone_manifest: Manifest, tmp_path: Path) -> None:
    listed = tmp_path / "tones.jsonl"
    tone_manifest.write(listed)
    whole = extract_features(tone_manifest, PROCESSOR, tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    for last in (3, 8, 14):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, listed, tmp_path / "store", str(last)], env=environment, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "store").exists()
    executor = Counting()
    extract_features(tone_manifest, PROCESSOR, tmp_path / "store", executor=executor)
    assert 0 < executor.extracted < len(tone_manifest)
    assert contents(tmp_path / "store") == contents(whole.directory)


def test_a_store_is_replaced_as_a_whole(tone_manifest: Manifest, tmp_path: Path) -> None:
    extract_features(tone_manifest, PROCESSOR, tmp_path / "store")
    extract_features(tone_manifest[:3], PROCESSOR, tmp_path / "store")
    assert FeatureStore(tmp_path / "store").ids == [utterance.id for utterance in tone_manifest[:3]]


def test_a_folder_of_other_things_is_left_alone(tone_manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}: holds thesis\.tex, which is no part of a featu"):
        extract_features(tone_manifest, PROCESSOR, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_an_utterance_that_cannot_be_read_is_named(tone_manifest: Manifest, tmp_path: Path) -> None:
    elsewhere = Manifest(list(tone_manifest[:2]), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere/tone-000\.wav: cannot be read as audio"):
        extract_features(elsewhere, PROCESSOR, tmp_path / "store", executor=Processes(2))


def test_what_is_put_right_afterwards_is_finished(tone_manifest: Manifest, tmp_path: Path) -> None:
    manifest = tone_corpus(tmp_path / "audio", tone_texts(4))
    missing = manifest.audio_path(manifest[2])
    shutil.move(missing, tmp_path / "elsewhere.wav")
    with pytest.raises(UserError, match="cannot be read as audio"):
        extract_features(manifest, PROCESSOR, tmp_path / "store")
    shutil.move(tmp_path / "elsewhere.wav", missing)
    assert len(extract_features(manifest, PROCESSOR, tmp_path / "store")) == 4


def test_recordings_shorter_than_a_window_are_named_at_once(tone_manifest: Manifest, tmp_path: Path) -> None:
    rows = [replace(row, duration=0.01) if place in (1, 3) else row for place, row in enumerate(tone_manifest[:5])]
    short = Manifest(rows, tone_manifest.root)
    with pytest.raises(UserError, match=r"shorter than one analysis window .*tone-001\.wav \(0\.01 s\), .*data\.skip"):
        extract_features(short, PROCESSOR, tmp_path / "store")
    assert not (tmp_path / "store").exists()
