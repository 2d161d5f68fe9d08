import hashlib
import wave
from pathlib import Path

import numpy as np
import pytest

from sonosco_mlflow.data.corpora.audio import (
    duration_of,
    resampling_filter,
    to_sixteen_kilohertz,
    trim_and_level,
    write_wave,
)
from sonosco_mlflow.errors import UserError


def tone(hertz: float, seconds: float = 0.5, amplitude: float = 10_000) -> np.ndarray:
    time = np.arange(int(22_050 * seconds)) / 22_050
    return np.rint(amplitude * np.sin(2 * np.pi * hertz * time)).astype(np.int16)


def test_the_filter_is_the_one_that_made_the_corpus_everywhere_else() -> None:
    digest = hashlib.sha256(resampling_filter().astype("<i4").tobytes()).hexdigest()
    assert digest.startswith("d1b9d3ab8795")


@pytest.mark.parametrize("hertz", [100, 1000, 4000, 6500])
def test_what_is_below_the_new_limit_is_kept(hertz: float) -> None:
    resampled = to_sixteen_kilohertz(tone(hertz)) / (1 << 15)
    expected = 10_000 * np.sin(2 * np.pi * hertz * np.arange(8_000) / 16_000)
    assert len(resampled) == 8_000
    assert np.abs(resampled - expected)[200:-200].max() < 10


@pytest.mark.parametrize("hertz", [8500, 10_000])
def test_what_is_above_the_new_limit_is_gone(hertz: float) -> None:
    resampled = to_sixteen_kilohertz(tone(hertz)) / (1 << 15)
    assert np.abs(resampled)[200:-200].max() < 10


def test_the_sums_are_exact_integers() -> None:
    samples = np.random.default_rng(0).integers(-32_768, 32_767, 2_000).astype(np.int16)
    matrix = resampling_filter().astype(np.int64)
    padded = np.concatenate([np.zeros(48, np.int64), samples.astype(np.int64), np.zeros(2 * 441, np.int64)])
    by_hand = np.concatenate([padded[441 * block :][: 441 + 96] @ matrix for block in range(4)])
    assert np.array_equal(to_sixteen_kilohertz(samples)[:1280], by_hand)


def test_silence_is_trimmed_to_a_margin_and_the_peak_levelled() -> None:
    samples = np.zeros(16_000, np.int64)
    samples[8_000:9_000] = 5
    samples[8_500] = -300
    finished = trim_and_level(samples)
    assert len(finished) == 1_000 + 2 * 960
    assert finished.min() == -20_000
    assert finished[960] == 333


def test_a_wave_file_is_mono_sixteen_bit(tmp_path: Path) -> None:
    samples = np.arange(-400, 400, dtype=np.int16)
    write_wave(tmp_path / "a.wav", samples, 16_000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        assert file.readframes(800) == samples.astype("<i2").tobytes()
    assert duration_of(tmp_path / "a.wav") == 0.05


def test_audio_without_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"broken\.wav: cannot be read as audio"):
        duration_of(tmp_path / "broken.wav")
    write_wave(tmp_path / "empty.wav", np.zeros(0, np.int16), 16_000)
    with pytest.raises(UserError, match=r"empty\.wav: holds no samples"):
        duration_of(tmp_path / "empty.wav")
