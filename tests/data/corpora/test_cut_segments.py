import io
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import RATE, contents, samples, sound

from sonosco_mlflow.data.corpora.base import Request
from sonosco_mlflow.data.corpora.segments import (
    Segment,
    cut_recording,
    file_name,
    lay_segments,
    segment_id,
    with_unique_ids,
)
from sonosco_mlflow.data.corpora.unusable import UNREADABLE
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError


def lay(directory: Path, *segments: Segment, processes: int = 2) -> dict[str, Utterance]:
    laid, why = lay_all(directory, *segments, processes=processes)
    assert why == {}
    return laid


def lay_all(directory: Path, *segments: Segment, processes: int = 2) -> tuple[dict[str, Utterance], dict[str, str]]:
    directory.mkdir(exist_ok=True)
    return lay_segments(segments, Request(directory, None, None, processes, lambda done, total: None))


def record(path: Path, kind: str = "wav", seconds: float = 1.0, channels: int = 1) -> Path:
    path.write_bytes(sound(kind, seconds, channels=channels))
    return path


def segment(recording: Path, start: float = 0.0, end: float | None = None, **others: object) -> Segment:
    name = segment_id(recording.stem, start, end or 0)
    return replace(Segment(name, recording, "yes", "anna", "list:1", start, end), **others)


@pytest.mark.parametrize("kind", ["wav", "flac", "sph"])
def test_a_part_has_the_samples_of_the_recording(tmp_path: Path, kind: str) -> None:
    talk = record(tmp_path / f"talk.{kind}", kind)
    (utterance,) = lay(tmp_path / "out", segment(talk, 0.25, 0.5)).values()
    assert utterance == Utterance("talk-0000250-0000500", "wav/talk/talk-0000250-0000500.wav", 0.25, "yes", "anna")
    cut, rate = soundfile.read(tmp_path / "out" / utterance.audio_filepath, dtype="int16")
    assert (rate, cut.tolist()) == (RATE, samples(1.0)[4000:8000].tolist())
    (from_bytes,) = cut_recording(io.BytesIO(talk.read_bytes()), [segment(talk, 0.25, 0.5)], tmp_path / "out")
    assert from_bytes == utterance


@pytest.mark.parametrize("end", [None, 1.0, 1.4])
def test_a_whole_recording_stays_where_it_lies(tmp_path: Path, end: float | None) -> None:
    talk = record(tmp_path / "talk.wav")
    (utterance,) = lay(tmp_path / "out", segment(talk, 0.0, end, channel=0)).values()
    assert (utterance.audio_filepath, utterance.duration) == (str(talk), 1.0)
    assert contents(tmp_path / "out") == {}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(marks=st.sets(st.integers(1, 15_999), min_size=1, max_size=6))
def test_parts_put_together_are_the_recording(tmp_path: Path, marks: set[int]) -> None:
    talk = record(tmp_path / "talk.wav")
    edges = [0, *sorted(marks), RATE]
    parts = [
        segment(talk, first / RATE, last / RATE, id=str(number)) for number, (first, last) in enumerate(pairwise(edges))
    ]
    laid = lay(tmp_path / "out", *parts)
    cut = [soundfile.read(tmp_path / "out" / laid[part.id].audio_filepath, dtype="int16")[0] for part in parts]
    assert np.concatenate(cut).tolist() == samples(1.0).tolist()
    for path in (tmp_path / "out" / "wav").rglob("*.wav"):
        path.unlink()
    (tmp_path / "out" / "wav" / "talk").rmdir()
    (tmp_path / "out" / "wav" / "MADE-BY-SONOSCO").unlink()


def test_channels_are_taken_or_averaged(tmp_path: Path) -> None:
    talk = record(tmp_path / "talk.wav", channels=2)
    both = samples(1.0, channels=2)
    laid = lay(
        tmp_path / "out",
        segment(talk, 0.0, 0.5, id="mean"),
        segment(talk, 0.0, None, id="second", channel=1),
        segment(talk, id="whole"),
    )
    read = {
        name: soundfile.read(tmp_path / "out" / laid[name].audio_filepath, dtype="int16")[0]
        for name in ("mean", "second")
    }
    assert read["second"].tolist() == both[:, 1].tolist()
    assert read["mean"].tolist() == np.rint(both[:8000].mean(axis=1)).tolist()
    assert laid["whole"].audio_filepath == str(talk)


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_24"])
def test_finer_samples_are_rounded_and_none_runs_over(tmp_path: Path, subtype: str) -> None:
    finer = np.array([0.0, 0.5, -0.25, 1.0, -1.0, 3 / 65536 + 1e-6, 0.0, 0.0])
    soundfile.write(tmp_path / "talk.wav", finer, RATE, subtype=subtype)
    (utterance,) = lay(tmp_path / "out", segment(tmp_path / "talk.wav", 0.0, 7 / RATE)).values()
    cut, _ = soundfile.read(tmp_path / "out" / utterance.audio_filepath, dtype="int16")
    assert cut.tolist() == [0, 16384, -8192, 32767, -32768, 2, 0]


@pytest.mark.parametrize("kind", ["mp3", "opus"])
def test_parts_of_what_was_packed_with_losses(tmp_path: Path, kind: str) -> None:
    talk = record(tmp_path / f"talk.{kind}", kind)
    (utterance,) = lay(tmp_path / "out", segment(talk, 0.25, 0.5)).values()
    cut, rate = soundfile.read(tmp_path / "out" / utterance.audio_filepath)
    whole, rate_of_whole = soundfile.read(talk)
    assert rate == rate_of_whole
    assert np.abs(cut - whole[rate // 4 : rate // 2]).max() < 1 / 32768


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    talks = [record(tmp_path / f"talk{n}.flac", "flac", 1 + n / 10) for n in range(8)]
    parts = [segment(talk, start / 10, start / 10 + 0.15) for start in range(8) for talk in talks]
    one = lay(tmp_path / "one", *parts, processes=1)
    assert lay(tmp_path / "five", *parts, processes=5) == one
    assert contents(tmp_path / "one") == contents(tmp_path / "five")
    assert len(contents(tmp_path / "one")) == 65


@pytest.mark.parametrize(
    ("start", "end", "others", "message"),
    [
        (
            0.5,
            1.6,
            {},
            r"list:1: the segment 'x' ends at 1\.6 s\. Expected an end within \S+talk\.wav, which lasts 1 s",
        ),
        (0.5, 0.5, {}, r"list:1: 'x' holds no samples: it goes from 0\.5 s to 0\.5 s"),
        (1.2, 1.4, {}, r"'x' holds no samples"),
        (1.0, None, {}, r"'x' holds no samples: it goes from 1\.0 s to the end"),
        (0.0, 0.5, {"channel": 1}, r"'x' is in channel 1\. Expected one below 1"),
    ],
)
def test_what_cannot_be_cut_is_named(
    tmp_path: Path, start: float, end: float | None, others: dict[str, object], message: str
) -> None:
    talk = record(tmp_path / "talk.wav")
    wrong = replace(segment(talk, start, end, id="x"), **others)
    with pytest.raises(UserError, match=message):
        lay(tmp_path / "out", segment(talk, 0.1, 0.2), wrong)
    assert contents(tmp_path / "out") == {}


def test_a_recording_that_ends_before_its_header_says_is_told_and_the_rest_of_it_is_cut(tmp_path: Path) -> None:
    for kind, message in {"mp3": r"ends after \d+ samples of the 48000", "flac": "cannot be read as audio"}.items():
        talk = record(tmp_path / f"talk.{kind}", kind, 3.0)
        talk.write_bytes(talk.read_bytes()[: len(talk.read_bytes()) * 2 // 3])
        good, bad = segment(talk, 0.1, 0.2, id="good"), segment(talk, 0.5, 2.9, id="bad")
        laid, why = lay_all(tmp_path / kind, good, bad)
        assert why.keys() == {"bad"}
        assert re.match(rf"list:1: \S+talk\.{kind}: {message}", why["bad"])
        assert (laid["good"].duration, laid["bad"].duration) == (0.1, UNREADABLE)
        assert contents(tmp_path / kind / "wav" / "talk").keys() == {"good.wav"}


def test_what_cannot_be_opened_is_told_for_each_utterance(tmp_path: Path) -> None:
    (tmp_path / "talk.flac").write_bytes(b"no audio")
    parts = [segment(tmp_path / "talk.flac", 2.0, 2.9, id="a"), segment(tmp_path / "talk.flac", 3.0, 3.9, id="b")]
    gone = segment(tmp_path / "gone.wav", id="c", place="list:3")
    silent = segment(record(tmp_path / "x.wav"), 0.1, 0.2, id="d", place="list:4", text="")
    laid, why = lay_all(tmp_path / "out", *parts, gone, silent)
    assert {utterance.duration for utterance in laid.values()} == {UNREADABLE}
    assert why["a"] == why["b"]
    assert re.match(r"list:1: \S+talk\.flac: cannot be read as audio \(", why["a"])
    assert why["c"] == f"list:3: names a recording that is not there: {tmp_path}/gone.wav"
    assert why["d"] == "list:4: 'd' has an empty text"
    assert contents(tmp_path / "out") == {}


def test_two_with_one_id_are_refused_before_anything_is_cut(tmp_path: Path) -> None:
    talk = record(tmp_path / "talk.wav")
    parts = [segment(talk, 0.1, 0.2, id="x"), segment(talk, 0.2, 0.3, id="x", place="list:2")]
    with pytest.raises(UserError, match="list:2: the id 'x' stands already in list:1"):
        lay(tmp_path / "out", *parts)
    assert contents(tmp_path / "out") == {}


def test_ids_that_several_have_begin_with_their_folder() -> None:
    listed = [segment(Path(name), id="1") for name in ("/a/1.wav", "/b/1.wav")] + [segment(Path("/a/2.wav"), id="2")]
    assert [part.id for part in with_unique_ids(listed)] == ["a-1", "b-1", "2"]


@given(name=st.text(min_size=1, max_size=300))
@example(name="ä" * 150)
def test_any_name_becomes_that_of_a_file_in_its_folder(name: str) -> None:
    made = file_name(name)
    assert Path(made).name == made
    assert len(made.encode()) <= 255
    assert made not in (".", "..")
    assert file_name(made) == made
