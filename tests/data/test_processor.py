import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import example, given, settings

from sonosco_mlflow.data.processor import (
    WINDOWS,
    AudioDataProcessor,
    KaldiFilterBankProcessor,
    MelCepstrumProcessor,
    read_audio,
)
from sonosco_mlflow.data.stages import make_processor
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.sections import Features
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(seed)) - 0.5


# Windows of 400, 160 and 441 samples: fewer than are transformed, by an even number and an odd one.
SIZES = [(16000, 0.025, 0.01), (8000, 0.02, 0.0125), (11025, 0.04, 0.016)]


def in_torchaudio(sizes: tuple[int, float, float], window: str) -> tuple[dict[str, Any], tuple[int, int]]:
    """What torchaudio's transforms are to be made with, and what its waveforms are to be padded with."""
    length, hop = round(sizes[0] * sizes[1]), round(sizes[0] * sizes[2])
    transformed = 2 ** math.ceil(math.log2(length))
    settings = {"n_fft": transformed, "win_length": length, "hop_length": hop, "n_mels": 40, "center": False}
    left = (transformed - length) // 2
    return settings | {"window_fn": WINDOWS[window]}, (left, transformed - length - left)


@pytest.mark.parametrize("window", sorted(WINDOWS))
@pytest.mark.parametrize("sizes", SIZES)
def test_features_are_the_logarithm_of_torchaudios_mel_spectrogram(
    window: str, sizes: tuple[int, float, float]
) -> None:
    waveform = noise(5000)
    settings, padding = in_torchaudio(sizes, window)
    transform = torchaudio.transforms.MelSpectrogram(sizes[0], **settings)
    expected = transform(torch.nn.functional.pad(waveform, padding)).clamp_min(1e-10).log().T
    processor = AudioDataProcessor(sizes[0], 40, *sizes[1:], window)
    found = processor.features(waveform)
    assert found.dtype == torch.float32
    assert found.shape == (processor.frames(5000), processor.size)
    assert torch.equal(found, expected)


def test_samples_of_any_type_are_taken_as_float32() -> None:
    waveform = noise(5000)
    assert torch.equal(AudioDataProcessor().features(waveform.double()), AudioDataProcessor().features(waveform))


KALDI_WINDOWS = {"hann": "hanning", "hamming": "hamming", "blackman": "blackman", "povey": "povey"}


@pytest.mark.parametrize("window", sorted(WINDOWS))
@pytest.mark.parametrize("sizes", SIZES)
def test_filter_banks_are_those_of_torchaudios_kaldi(window: str, sizes: tuple[int, float, float]) -> None:
    rate, size, stride = sizes
    processor = KaldiFilterBankProcessor(rate, 40, size, stride, window)
    waveform = noise(5000)
    expected = torchaudio.compliance.kaldi.fbank(
        waveform[None] * 32768,
        num_mel_bins=40,
        sample_frequency=rate,
        frame_length=1000 * size + 0.01,
        frame_shift=1000 * stride + 0.01,
        window_type=KALDI_WINDOWS[window],
        dither=0.0,
    )
    found = processor.features(waveform)
    assert found.shape == expected.shape == (processor.frames(5000), processor.size)
    assert torch.equal(found, expected)


# In milliseconds and back, 354 and 177 samples at this rate come out as less than they were.
@example(353 + 5 * 177, (11025, 354 / 11025, 177 / 11025))
@given(st.integers(1, 3000), st.sampled_from([(16000, 0.025, 0.01), (11025, 354 / 11025, 177 / 11025)]))
@settings(max_examples=60, deadline=None)
def test_kaldi_counts_samples_as_all_others_do(samples: int, sizes: tuple[int, float, float]) -> None:
    rate, size, stride = sizes
    processor = KaldiFilterBankProcessor(rate, 8, size, stride)
    if frames := processor.frames(samples):
        assert processor.features(noise(samples)).shape == (frames, 8)


@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_coefficients_are_torchaudios(loudness: float) -> None:
    waveform = loudness * noise(5000)
    settings, padding = in_torchaudio((16000, 0.025, 0.01), "hann")
    transform = torchaudio.transforms.MFCC(16000, n_mfcc=13, log_mels=True, melkwargs=settings)
    expected = transform(torch.nn.functional.pad(waveform, padding)).T
    processor = MelCepstrumProcessor(n_mels=40, n_mfcc=13)
    found = processor.features(waveform)
    assert found.shape == (processor.frames(5000), processor.size) == (29, 13)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "kind", "size"),
    [
        ({}, AudioDataProcessor, 80),
        ({"kind": "kaldi_fbank", "window": "povey", "n_mels": 40}, KaldiFilterBankProcessor, 40),
        ({"kind": "mfcc"}, MelCepstrumProcessor, 40),
        ({"kind": "mfcc", "n_mfcc": 13, "n_mels": 26}, MelCepstrumProcessor, 13),
    ],
)
def test_a_recipe_names_its_features(settings: dict[str, object], kind: type, size: int) -> None:
    features = Features(**settings)
    processor = make_processor(features)
    assert type(processor) is kind
    assert processor.features(noise(2000)).shape[1] == features.size == processor.size == size


def test_features_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"features\.n_mfcc is 41, expected at most 40, the number of mel bands"):
        MelCepstrumProcessor(n_mels=40, n_mfcc=41)
    with pytest.raises(UserError, match=r"features\.n_mels is 3, expected at least 4 for Kaldi's filter banks"):
        KaldiFilterBankProcessor(n_mels=3)


@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_each_frame_covers_its_own_samples_only(window: str) -> None:
    processor = AudioDataProcessor(n_mels=20, window=window)
    waveform = noise(4000)
    features = processor.features(waveform)
    changed = waveform.clone()
    changed[1600:2000] += 0.3
    touched = (processor.features(changed) != features).any(dim=1).nonzero().flatten()
    first, last = 1 + (1600 - 400) // 160, (2000 - 1) // 160
    # A window's ends weigh little or nothing.
    assert first <= touched[0] <= first + 1
    assert last - 1 <= touched[-1] <= last


def test_a_tone_is_loudest_in_its_band() -> None:
    time = torch.arange(16000) / 16000
    for frequency in (300.0, 3000.0):
        features = AudioDataProcessor(n_mels=40).features(torch.sin(2 * torch.pi * frequency * time))
        mel = 2595 * np.log10(1 + frequency / 700)
        edges = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42)
        assert features.mean(0).argmax().item() == np.abs(edges[1:-1] - mel).argmin()


@given(st.integers(1, 3000), st.sampled_from([(16000, 0.025, 0.01), (8000, 0.02, 0.0125), (11025, 0.032, 0.016)]))
@settings(max_examples=60, deadline=None)
def test_the_number_of_frames_is_known_beforehand(samples: int, sizes: tuple[int, float, float]) -> None:
    rate, size, stride = sizes
    processor = AudioDataProcessor(rate, 8, size, stride)
    if processor.frames(samples) == 0:
        with pytest.raises(UserError, match="shorter than one analysis window"):
            processor.features(torch.zeros(samples))
    else:
        assert processor.features(torch.zeros(samples)).shape == (processor.frames(samples), 8)


def test_silence_is_finite() -> None:
    assert AudioDataProcessor().features(torch.zeros(1000)).isfinite().all()


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.flac", "PCM_24"), ("a.wav", "FLOAT")])
def test_audio_is_read_as_mono_float(name: str, subtype: str, tmp_path: Path) -> None:
    left, right = noise(800, 1).numpy(), noise(800, 2).numpy()
    soundfile.write(tmp_path / name, np.stack([left, right], axis=1), 16000, subtype=subtype)
    waveform = read_audio(tmp_path / name, 16000)
    assert waveform.shape == (800,)
    np.testing.assert_allclose(waveform.numpy(), (left + right) / 2, atol=2 / 2**15)


def test_audio_at_another_rate_is_resampled(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 8000)
    waveform = read_audio(tmp_path / "a.wav", 16000).numpy()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(waveform[200:-200], expected[200:-200], atol=0.01)


def test_a_file_that_is_no_audio_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(UserError, match=r"a\.wav: cannot be read as audio"):
        read_audio(path, 16000)
    path.write_bytes(b"RIFF and then nothing")
    with pytest.raises(UserError, match=r"a\.wav: cannot be read as audio"):
        read_audio(path, 16000)
    soundfile.write(path, np.zeros(100), 16000)
    with pytest.raises(UserError, match=r"a\.wav: 100 samples are shorter than one analysis window of 400"):
        AudioDataProcessor()(path)


def test_an_unknown_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"features\.window is 'hanning', expected one of hann, hamming"):
        AudioDataProcessor(window="hanning")


@pytest.mark.parametrize("kind", [AudioDataProcessor, KaldiFilterBankProcessor, MelCepstrumProcessor])
def test_a_processor_comes_back_from_its_description(kind: type) -> None:
    processor = kind(8000, 40, 0.02, 0.01, "hamming")
    again = Deserializer().build(Serializer().describe(processor))
    assert type(again) is kind
    assert torch.equal(again.features(noise(2000)), processor.features(noise(2000)))
