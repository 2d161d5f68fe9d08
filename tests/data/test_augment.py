import math

import numpy as np
import pytest
import torch

from sonosco_mlflow.data.augment import Noise, SpecAugment, SpeedPerturbation
from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError

FEATURES = torch.ones(200, 80)


def masks(augmented: torch.Tensor) -> tuple[list[int], list[int]]:
    """The frames and the bands that are wholly masked."""
    masked = augmented == 0
    return masked.all(1).nonzero().flatten().tolist(), masked.all(0).nonzero().flatten().tolist()


def test_it_is_a_function_of_features_and_stream() -> None:
    augment = SpecAugment()
    assert torch.equal(augment(FEATURES, random_stream(1)), augment(FEATURES, random_stream(1)))
    assert not torch.equal(augment(FEATURES, random_stream(1)), augment(FEATURES, random_stream(2)))
    assert torch.equal(FEATURES, torch.ones(200, 80)), "the input is left as it is"


def test_masks_are_whole_spans_within_their_bounds() -> None:
    frames, bands = set(), set()
    for key in range(300):
        augmented = SpecAugment(1, 30, 0.1, 1, 27)(FEATURES, random_stream(key))
        masked_frames, masked_bands = masks(augmented)
        for masked, seen in ((masked_frames, frames), (masked_bands, bands)):
            assert masked == list(range(masked[0], masked[-1] + 1) if masked else [])
            seen.add(len(masked))
        kept = augmented[[i not in masked_frames for i in range(200)]][:, [i not in masked_bands for i in range(80)]]
        assert (kept == 1).all()
    assert frames == set(range(21)), "a mask is bounded by its share of the utterance, and every width occurs"
    assert bands == set(range(28))


@pytest.mark.parametrize("where", ["first", "last"])
def test_masks_reach_both_ends(where: str) -> None:
    position = 0 if where == "first" else -1
    augmented = [SpecAugment(1, 10, 1.0, 0, 0)(FEATURES[:20], random_stream(key))[position, 0] for key in range(200)]
    assert 0 in augmented
    assert 1 in augmented


def test_it_can_be_switched_off_and_survives_short_features() -> None:
    assert torch.equal(SpecAugment(0, 40, 0.2, 0, 27)(FEATURES, random_stream(0)), FEATURES)
    for key in range(20):
        assert SpecAugment(5, 40, 1.0, 5, 27)(torch.ones(1, 2), random_stream(key)).shape == (1, 2)


# ------------------------------------------------------------------ of recordings

TONE = torch.sin(2 * math.pi * 400 * torch.arange(16000) / 16000)


def pitch(waveform: torch.Tensor) -> float:
    """The strongest frequency, in Hz at 16 kHz."""
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return float(spectrum.argmax()) * 16000 / len(waveform)


def signal_to_noise(waveform: torch.Tensor, noisy: torch.Tensor) -> float:
    noise = (noisy - waveform).double()
    return 10 * math.log10(float(waveform.double().square().mean() / noise.square().mean()))


@pytest.mark.parametrize(("speed", "samples"), [(0.9, 17778), (1.0, 16000), (1.1, 14546), (1.25, 12800)])
def test_a_recording_is_played_faster_or_slower_pitch_and_all(speed: float, samples: int) -> None:
    augment = SpeedPerturbation([speed])
    played = augment(TONE, random_stream(0))
    assert len(played) == augment.samples(len(TONE), random_stream(0)) == samples
    assert pitch(played) == pytest.approx(400 * speed, abs=2)
    assert played.square().mean().item() == pytest.approx(0.5, abs=0.01)


def test_each_speed_is_drawn_alike_and_the_length_is_of_the_same_draw() -> None:
    augment = SpeedPerturbation()
    short = TONE[:900]
    lengths = []
    for key in range(600):
        lengths.append(len(augment(short, random_stream(key))))
        assert lengths[-1] == augment.samples(900, random_stream(key))
    shares = {length: lengths.count(length) / 600 for length in lengths}
    assert shares == pytest.approx({1000: 1 / 3, 900: 1 / 3, 819: 1 / 3}, abs=0.06)


@pytest.mark.parametrize("speeds", [[], [0.4], [1.0, 3.0], [float("nan")]])
def test_a_speed_out_of_range_is_refused(speeds: list[float]) -> None:
    with pytest.raises(UserError, match=r"augment\.speeds: found .* expected numbers from 0\.5 to 2"):
        SpeedPerturbation(speeds)


def test_noise_has_the_ratio_that_was_drawn() -> None:
    augment = Noise(5.0, 15.0, share=1.0)
    ratios = [signal_to_noise(TONE, augment(TONE, random_stream(key))) for key in range(300)]
    assert min(ratios) == pytest.approx(5, abs=0.2)
    assert max(ratios) == pytest.approx(15, abs=0.2)
    assert np.mean(ratios) == pytest.approx(10, abs=0.6)
    exact = Noise(7.0, 7.0, share=1.0)(TONE, random_stream(3))
    assert signal_to_noise(TONE, exact) == pytest.approx(7.0, abs=1e-3)


def test_noise_comes_to_its_share_and_leaves_the_rest_and_the_input_alone() -> None:
    augment = Noise(10, 20, share=0.25)
    before = TONE.clone()
    left = [torch.equal(augment(TONE, random_stream(key)), TONE) for key in range(400)]
    assert sum(left) / 400 == pytest.approx(0.75, abs=0.06)
    assert torch.equal(TONE, before)
    assert torch.equal(augment(TONE, random_stream(9)), augment(TONE, random_stream(9)))
    assert augment.samples(123, random_stream(0)) == 123


def test_noise_is_of_every_colour_between_white_and_brown() -> None:
    slopes = []
    for key in range(100):
        noise = (Noise(10, 10, share=1.0)(TONE, random_stream(key)) - TONE).double()
        power = torch.fft.rfft(noise).abs().square()
        # Frequencies of 100 to 200 Hz against 3,200 to 6,400: five octaves.
        slopes.append(math.log2(float(power[100:200].mean() / power[3200:6400].mean())) / 5)
    assert min(slopes) == pytest.approx(0, abs=0.15)
    assert max(slopes) == pytest.approx(2, abs=0.15)
    assert np.mean(slopes) == pytest.approx(1, abs=0.2)


def test_silence_stays_silent_and_short_recordings_survive() -> None:
    silence = torch.zeros(500)
    assert torch.equal(Noise(10, 10, share=1.0)(silence, random_stream(0)), silence)
    for samples in (1, 2, 3):
        noisy = Noise(10, 10, share=1.0)(TONE[1 : samples + 1], random_stream(0))
        assert noisy.isfinite().all()
        assert len(noisy) == samples


def test_a_higher_ratio_first_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.noise_snr: found \[20, 10\], expected the lower ratio first"):
        Noise(20, 10)


@pytest.mark.parametrize(("lowest", "highest"), [(math.inf, math.inf), (-1e4, 0), (0, 1e4), (math.nan, 3)])
def test_a_ratio_that_is_none_is_refused(lowest: float, highest: float) -> None:
    with pytest.raises(UserError, match=r"augment\.noise_snr: found .*, both from -100 to 100"):
        Noise(lowest, highest)


def test_a_speed_that_no_resampling_can_afford_is_refused() -> None:
    assert SpeedPerturbation([0.951]).samples(951, random_stream(0)) == 1000
    with pytest.raises(UserError, match=r"augment\.speeds: found \[1\.0, 0\.95111\], expected .* three decimals"):
        SpeedPerturbation([1.0, 0.95111])
