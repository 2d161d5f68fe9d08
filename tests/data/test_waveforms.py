import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from sonosco_mlflow.data import waveforms
from sonosco_mlflow.data.augment import WaveformAugmentation
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.waveforms import Gain, Pitch, RecordedNoise, Reverberation, Shift, Sounds
from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.recipe import waveform_augmentations
from sonosco_mlflow.sections import Augment
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from toy import PROCESSOR, TOKENIZER

RATE = 16000
TIME = torch.arange(RATE) / RATE
TONE = torch.sin(2 * math.pi * 400 * TIME)


def power(waveform: Tensor) -> float:
    return float(waveform.double().square().mean())


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def frequency(waveform: Tensor) -> float:
    """The strongest frequency, in Hz."""
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return float(spectrum.argmax()) * RATE / len(waveform)


@pytest.fixture
def noises(tmp_path: Path) -> Sounds:
    """A short hum and a long hiss, at two rates and in two folders."""
    folder = tmp_path / "noises"
    (folder / "hiss").mkdir(parents=True)
    soundfile.write(folder / "hum.wav", 0.3 * np.sin(2 * np.pi * 50 * np.arange(4000) / 8000), 8000)
    soundfile.write(folder / "hiss" / "long.flac", np.random.default_rng(0).uniform(-0.2, 0.2, 40_000), RATE)
    (folder / "README.txt").write_text("recorded by nobody")
    return Sounds(folder, "augment.noise_corpus")


@pytest.fixture
def rooms(tmp_path: Path) -> Sounds:
    """A room with one echo after 0.1 s, whose direct sound comes late."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    response = np.zeros(4000)
    response[500], response[500 + 1600] = 0.5, 0.25
    soundfile.write(folder / "hall.wav", response, RATE, subtype="FLOAT")
    return Sounds(folder, "augment.impulse_responses")


MAKERS: dict[str, Callable[[Sounds, Sounds], WaveformAugmentation]] = {
    "gain": lambda noises, rooms: Gain(-20, 10),
    "pitch": lambda noises, rooms: Pitch(-3, 3),
    "shift": lambda noises, rooms: Shift(0.2, RATE),
    "noise": lambda noises, rooms: RecordedNoise(noises, RATE, 0, 20, share=0.8),
    "room": lambda noises, rooms: Reverberation(rooms, RATE, share=0.8),
}


@pytest.fixture(params=MAKERS)
def augment(request: pytest.FixtureRequest, noises: Sounds, rooms: Sounds) -> WaveformAugmentation:
    return MAKERS[request.param](noises, rooms)


def test_it_is_a_function_of_waveform_and_stream_that_keeps_the_length(augment: WaveformAugmentation) -> None:
    before = TONE.clone()
    for key in range(8):
        changed = augment(TONE, random_stream(key))
        assert torch.equal(changed, augment(TONE, random_stream(key)))
        assert changed.shape == TONE.shape
        assert changed.dtype == torch.float32
        assert changed.isfinite().all()
        assert augment.samples(len(TONE), random_stream(key)) == len(TONE)
    assert len({float(augment(TONE, random_stream(key)).sum()) for key in range(8)}) > 1
    assert torch.equal(TONE, before), "the input is left as it is"


@pytest.mark.parametrize("length", [1, 2, 100, 513])
def test_it_survives_short_and_silent_recordings(augment: WaveformAugmentation, length: int) -> None:
    for waveform in (TONE[:length], torch.zeros(length)):
        for key in range(4):
            changed = augment(waveform, random_stream(key))
            assert changed.shape == (length,)
            assert changed.isfinite().all()


def test_it_travels_to_another_process(augment: WaveformAugmentation) -> None:
    again = pickle.loads(pickle.dumps(augment))
    assert torch.equal(again(TONE, random_stream(5)), augment(TONE, random_stream(5)))


def test_gain_is_between_its_bounds_in_decibels() -> None:
    changes = [decibels(power(Gain(-20, 10)(TONE, random_stream(key))) / power(TONE)) for key in range(300)]
    assert (min(changes), max(changes)) == pytest.approx((-20, 10), abs=0.5)
    assert np.mean(changes) == pytest.approx(-5, abs=1)


@pytest.mark.parametrize("semitones", [-7, -2, 0, 1, 5])
def test_pitch_moves_and_speed_stays(semitones: int) -> None:
    chirps = torch.sin(2 * math.pi * 400 * TIME) * (TIME % 0.25 < 0.1)
    changed = Pitch(semitones, semitones)(TONE, random_stream(0))
    assert frequency(changed) == pytest.approx(400 * 2 ** (semitones / 12), rel=0.01)
    assert power(changed[2000:14000]) == pytest.approx(power(TONE), rel=0.1)
    # Sounds begin when they began: the envelope of four bursts is where it was.
    envelopes = [
        part.abs().unfold(0, 400, 400).mean(dim=1)
        for part in (chirps, Pitch(semitones, semitones)(chirps, random_stream(0)))
    ]
    assert float(torch.corrcoef(torch.stack(envelopes))[0, 1]) > 0.8


def test_a_shift_moves_by_up_to_its_seconds_either_way() -> None:
    click = torch.zeros(RATE)
    click[8000] = 1.0
    moves = [int(Shift(0.1, RATE)(click, random_stream(key)).argmax()) - 8000 for key in range(400)]
    assert -1600 <= min(moves) < -1550
    assert 1550 < max(moves) <= 1600
    later = Shift(0.5, RATE)(TONE, random_stream(1))
    assert later[0] == 0.0 or later[-1] == 0.0


def test_noise_is_a_piece_of_a_recording_at_the_ratio_that_was_drawn(noises: Sounds) -> None:
    ratios, heard = [], set()
    for key in range(200):
        noise = RecordedNoise(noises, RATE, 5, 15, share=1.0)(TONE, random_stream(key)) - TONE
        ratios.append(decibels(power(TONE) / power(noise)))
        heard.add("hum" if frequency(noise) == pytest.approx(50, abs=2) else "hiss")
    assert (min(ratios), max(ratios)) == pytest.approx((5, 15), abs=0.3)
    assert heard == {"hum", "hiss"}
    left = [torch.equal(RecordedNoise(noises, RATE, 5, 15, 0.25)(TONE, random_stream(key)), TONE) for key in range(400)]
    assert sum(left) / 400 == pytest.approx(0.75, abs=0.06)


def test_silence_is_no_noise_and_no_room(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(100), RATE)
    sounds = Sounds(tmp_path, "key")
    for augment in (RecordedNoise(sounds, RATE, 5, 15, share=1.0), Reverberation(sounds, RATE, share=1.0)):
        assert torch.equal(augment(TONE, random_stream(0)), TONE)


def test_a_room_echoes_without_delay_at_the_same_level(rooms: Sounds) -> None:
    click = torch.zeros(RATE)
    click[1000] = 1.0
    changed = Reverberation(rooms, RATE, share=1.0)(click, random_stream(0))
    assert int(changed.argmax()) == 1000
    assert float(changed[2600] / changed[1000]) == pytest.approx(0.5, abs=1e-4)
    assert power(changed) == pytest.approx(power(click), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gain": [1.0]}, r"augment\.gain: found \[1\.0\], expected the lowest and the highest, in dB"),
        ({"gain": [5.0, -5.0]}, r"augment\.gain: found \[5\.0, -5\.0\], expected the lower number first"),
        ({"pitch": [-20.0, 0.0]}, r"augment\.pitch: found \[-20\.0, 0\.0\], .* from -12 to 12"),
        ({"noise_snr": [0.0, 500.0], "noise_corpus": "HERE"}, r"augment\.noise_snr: .* from -100 to 100"),
        ({"noise_corpus": "HERE"}, r"augment\.noise_corpus: expected augment\.noise_snr beside it"),
        (
            {"noise_snr": [0.0, 5.0], "noise_corpus": "empty"},
            r"augment\.noise_corpus: found 'empty', expected a folder",
        ),
        ({"impulse_responses": "empty"}, r"augment\.impulse_responses: found 'empty', expected a folder with recordi"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str, noises: Sounds) -> None:
    settings = {key: str(noises.paths[0].parent) if value == "HERE" else value for key, value in settings.items()}
    with pytest.raises(UserError, match=message):
        waveform_augmentations(Augment(**settings), RATE)


def test_a_recipe_names_all_of_them(noises: Sounds, rooms: Sounds) -> None:
    settings = Augment(
        speeds=[0.9, 1.1],
        pitch=[-1.0, 1.0],
        shift=0.1,
        impulse_responses=str(rooms.paths[0].parent),
        noise_snr=[5.0, 20.0],
        noise_corpus=str(noises.paths[0].parent),
        gain=[-3.0, 3.0],
    )
    names = [type(augment).__name__ for augment in waveform_augmentations(settings, RATE)]
    assert names == ["SpeedPerturbation", "Pitch", "Shift", "Reverberation", "RecordedNoise", "Gain"]
    assert settings.reads_recordings


def dataset(tone_manifest: Manifest, *augmentations: WaveformAugmentation) -> AudioDataset:
    return AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, waveform_augmentations=augmentations)


def test_a_dataset_is_another_with_other_sounds_but_not_in_another_place(
    tone_manifest: Manifest, noises: Sounds, tmp_path: Path
) -> None:
    first = dataset(tone_manifest, RecordedNoise(noises, RATE, 5, 20)).digest
    folder = noises.paths[0].parent.parent if noises.paths[0].parent.name == "hiss" else noises.paths[0].parent
    moved = folder.rename(tmp_path / "elsewhere")
    assert dataset(tone_manifest, RecordedNoise(Sounds(moved, "key"), RATE, 5, 20)).digest == first
    assert dataset(tone_manifest, RecordedNoise(Sounds(moved, "key"), RATE, 5, 21)).digest != first
    soundfile.write(moved / "hum.wav", np.zeros(100), 8000)
    assert dataset(tone_manifest, RecordedNoise(Sounds(moved, "key"), RATE, 5, 20)).digest != first


@pytest.mark.parametrize("augment_", [Gain(-3, 4), Pitch(-1, 1), Shift(0.1, 8000)])
def test_it_comes_back_from_its_description(augment_: WaveformAugmentation) -> None:
    again = Deserializer().build(Serializer().describe(augment_))
    assert vars(again) == vars(augment_)


def test_each_utterance_of_each_epoch_is_heard_in_its_own_way(tone_manifest: Manifest, noises: Sounds) -> None:
    def heard() -> list[Tensor]:
        data = dataset(tone_manifest, Pitch(-2, 2), RecordedNoise(noises, RATE, 5, 20, 1.0), Gain(-6, 6))
        return [data.sample(place, epoch).features for epoch in (0, 1) for place in (3, 4)]

    once, again = heard(), heard()
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert not torch.equal(once[0], once[2])


def test_sounds_that_are_none_are_named_before_training(noises: Sounds) -> None:
    folder = noises.paths[0].parent.parent if noises.paths[0].parent.name == "hiss" else noises.paths[0].parent
    (folder / "._hum.wav").write_bytes(b"x")
    assert Sounds(folder, "key").paths == noises.paths
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(UserError, match=r"augment\.noise_corpus: \S+empty\.wav holds no samples; take it out"):
        Sounds(folder, "augment.noise_corpus")
    (folder / "empty.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"augment\.noise_corpus: \S+empty\.wav cannot be read as audio"):
        Sounds(folder, "augment.noise_corpus")


def test_no_more_sounds_stay_in_memory_than_there_is_room_for(noises: Sounds, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path, sample_rate: int) -> Tensor:
        read.append(path.name)
        return torch.zeros(1000)

    monkeypatch.setattr(waveforms, "read_audio", counted)
    monkeypatch.setattr(waveforms, "KEPT_BYTES", 8000)
    kept = waveforms._KeptSounds()
    for name in ("a", "b", "a", "c", "a", "b"):
        kept.read(Path(name), RATE)
    # Of two that fit, the one that was asked for last stays.
    assert read == ["a", "b", "c", "b"]
    monkeypatch.setattr(waveforms, "KEPT_BYTES", 1)
    assert len(kept.read(Path("d"), RATE)) == 1000
