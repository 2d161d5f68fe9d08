import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.manifest_tools import recordings
from sonosco_mlflow.data.manifest_tools.findings import CHECKS, Finding
from sonosco_mlflow.data.manifest_tools.recordings import Expected, check_recordings

RATE = 16_000


def tone(seconds: float = 1.0, level: float = 0.5, pitch: int = 440) -> np.ndarray:
    return level * np.sin(2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE)


def write(folder: Path, **sounds: np.ndarray) -> Path:
    """A manifest of sounds that says of each how long it is."""
    for name, samples in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE)
    made = [Utterance(name, f"{name}.wav", len(samples) / RATE, "YES", "x") for name, samples in sounds.items()]
    path = folder / "m.jsonl"
    Manifest(made, folder).write(path)
    return path


def check(*paths: Path, expected: Expected | None = None, processes: int = 2) -> list[Finding]:
    counted: list[tuple[int, int]] = []
    found = list(
        check_recordings(paths, expected or Expected(), processes, lambda done, total: counted.append((done, total)))
    )
    assert counted == [(i + 1, len(counted)) for i in range(len(counted))]
    assert {finding.check for finding in found} <= CHECKS.keys()
    return found


def names(found: list[Finding]) -> list[tuple[int, str, str]]:
    return [(finding.line, finding.id, finding.check) for finding in found]


def test_recordings_that_are_right_have_no_findings(tmp_path: Path) -> None:
    assert check(write(tmp_path, a=tone(), b=tone(0.7), c=tone(level=0.99))) == []


def test_a_recording_that_is_missing_or_none_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, a=tone(), b=tone(pitch=300), c=tone(pitch=200), d=tone(pitch=100))
    (tmp_path / "a.wav").unlink()
    (tmp_path / "b.wav").write_bytes(b"no sound")
    (tmp_path / "c.wav").unlink()
    (tmp_path / "c.wav").mkdir()
    found = check(path)
    assert names(found) == [(1, "a", "file"), (2, "b", "audio"), (3, "c", "file")]
    assert found[0].found == f"{tmp_path / 'a.wav'} cannot be opened (No such file or directory)"


def test_a_name_that_nobody_can_open_is_a_finding_like_any(tmp_path: Path) -> None:
    made = [Utterance(name, path, 1.0, "YES", "x") for name, path in (("a", "a.raw"), ("b", "b\0.wav"), ("c", "c.wav"))]
    (tmp_path / "a.raw").write_bytes(bytes(100))
    soundfile.write(tmp_path / "c.wav", tone(), RATE)
    Manifest(made, tmp_path).write(tmp_path / "m.jsonl")
    found = check(tmp_path / "m.jsonl")
    assert names(found) == [(1, "a", "audio"), (2, "b", "file")]
    assert "a.raw cannot be read as audio (samplerate must be specified)" in found[0].found


@pytest.mark.parametrize(("off", "right"), [(0.009, True), (0.011, False), (-0.011, False)])
def test_a_duration_that_differs_from_the_header_is_found(tmp_path: Path, off: float, right: bool) -> None:
    write(tmp_path, a=tone())
    Manifest([Utterance("a", "a.wav", 1 + off, "YES", "x")], tmp_path).write(tmp_path / "m.jsonl")
    found = check(tmp_path / "m.jsonl")
    assert names(found) == ([] if right else [(1, "a", "duration")])
    assert right or "has 1 s" in found[0].found


def test_another_rate_and_more_channels_are_found(tmp_path: Path) -> None:
    path = write(tmp_path, a=np.stack([tone(), tone()], axis=1))
    assert names(check(path)) == [(1, "a", "channels")]
    assert names(check(path, expected=Expected(sample_rate=8000, channels=2))) == [(1, "a", "sample-rate")]
    assert check(path, expected=Expected(channels=2)) == []


@pytest.mark.parametrize("run", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [3, 7, 1 << 20])
def test_three_samples_in_a_row_at_full_scale_are_clipping(
    tmp_path: Path, run: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each triple counts once, wherever the recording is cut into blocks.
    monkeypatch.setattr(recordings, "_SAMPLES", samples)
    sound = tone(0.01)
    sound[20 : 20 + run] = -1.0
    sound[50] = 1.0
    found = check(write(tmp_path, a=sound))
    assert names(found) == ([(1, "a", "clipping")] if run > 2 else [])
    assert run < 3 or f"at full scale, {run - 2} times" in found[0].found


def test_silence_is_found(tmp_path: Path) -> None:
    found = check(write(tmp_path, a=np.zeros(RATE), b=tone(level=0.0005), c=tone(level=0.002)))
    assert names(found) == [(1, "a", "silence"), (2, "b", "silence")]


def test_a_recording_without_samples_is_found(tmp_path: Path) -> None:
    write(tmp_path, a=tone(0))
    Manifest([Utterance("a", "a.wav", 1, "YES", "x")], tmp_path).write(tmp_path / "m.jsonl")
    assert names(check(tmp_path / "m.jsonl")) == [(1, "a", "duration"), (1, "a", "audio")]


def test_a_recording_that_was_cut_off_is_found(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 4 * RATE), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    Manifest([Utterance("a", "a.flac", 4.0, "YES", "x")], tmp_path).write(tmp_path / "m.jsonl")
    assert [finding.check for finding in check(tmp_path / "m.jsonl")] == ["audio"]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_same_bytes_under_two_ids_are_found_in_one_manifest_or_two(tmp_path: Path, processes: int) -> None:
    (tmp_path / "other").mkdir()
    one = write(tmp_path, a=tone(), b=tone(pitch=300))
    other = write(tmp_path / "other", c=tone(pitch=200), d=tone(pitch=100))
    shutil.copy(tmp_path / "a.wav", tmp_path / "other" / "d.wav")
    found = check(one, other, processes=processes)
    assert names(found) == [(2, "d", "same-audio")]
    assert found[0].found.endswith(f"has the bytes of {one}:1")


def test_the_same_path_twice_is_left_to_the_check_of_rows(tmp_path: Path) -> None:
    write(tmp_path, a=tone())
    made = [Utterance("a", "a.wav", 1.0, "YES", "x"), Utterance("b", "./a.wav", 1.0, "YES", "x")]
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(
            f'{{"id": "{u.id}", "audio_filepath": "{u.audio_filepath}", "duration": 1, "text": "Y"}}\n' for u in made
        )
    )
    assert check(path) == []


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, a=tone())
    path.write_text("{}\n" + path.read_text())
    assert check(path) == []


PROGRAM = """
import signal, sys, time
from pathlib import Path
from sonosco_mlflow.data.manifest_tools.recordings import Expected, check_recordings

# A shell that starts commands in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def progress(done, total):
    print(done, flush=True)
    time.sleep(60)

list(check_recordings([Path(sys.argv[1])], Expected(), 2, progress))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_one_that_was_killed(tmp_path: Path, number: signal.Signals) -> None:
    path = write(tmp_path, **{f"n{i}": tone(pitch=100 + i) for i in range(20)})
    command = [sys.executable, "-c", PROGRAM, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(60)
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive
