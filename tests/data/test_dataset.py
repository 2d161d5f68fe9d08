import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from sonosco_mlflow.data.augment import Noise, SpecAugment, SpeedPerturbation
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.features import FeatureStatistics
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor, read_audio, resampled, resampled_length
from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.word_pieces import WordPieceTokenizer
from toy import PROCESSOR, TOKENIZER

STATISTICS = FeatureStatistics([-5.0] * 8, [2.0] * 8)


def test_with_a_store_and_without_the_samples_are_equal(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    with_store = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, store=store, statistics=STATISTICS)
    without = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, statistics=STATISTICS)
    assert with_store.frames == without.frames
    assert len(with_store) == len(without) == len(tone_manifest)
    for position in range(len(tone_manifest)):
        one, other = with_store[position], without[position]
        assert (one.id, one.text) == (other.id, other.text)
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.tokens, other.tokens)
        assert one.features.shape == (without.frames[position], 8)


def test_a_sample_is_what_was_said(tone_manifest: Manifest) -> None:
    sample = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER)[2]
    utterance = tone_manifest[2]
    assert (sample.id, sample.text) == (utterance.id, utterance.text)
    assert sample.tokens.dtype == torch.int64
    assert TOKENIZER.decode(sample.tokens.tolist()) == utterance.text
    assert torch.equal(sample.features, PROCESSOR(tone_manifest.audio_path(utterance)))


def test_features_are_normalised_by_the_statistics_given(tone_manifest: Manifest) -> None:
    plain = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER)[0].features
    normalised = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, statistics=STATISTICS)[0].features
    torch.testing.assert_close(normalised, (plain + 5.0) / 2.0)


def test_a_half_precision_store_gives_single_precision_samples(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path, dtype="float16")
    assert AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, store=store)[0].features.dtype == torch.float32


def test_augmentation_is_keyed_by_seed_epoch_and_utterance(tone_manifest: Manifest) -> None:
    augment = SpecAugment(2, 10, 0.5, 2, 4)
    datasets = [
        AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, augmentation=augment, seed=seed) for seed in (0, 0, 1)
    ]
    datasets[1].sample(5, epoch=0)  # what was loaded before does not matter
    one, same, other = (dataset.sample(0, epoch=3).features for dataset in datasets)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, datasets[0].sample(0, epoch=4).features)
    plain = datasets[0][0]
    assert torch.equal(one, augment(plain.features, random_stream(0, "augment", 3, plain.id)))
    assert torch.equal(plain.features, AudioDataset(tone_manifest, PROCESSOR, TOKENIZER)[0].features)


def test_the_spelling_is_keyed_by_seed_epoch_and_utterance(tone_manifest: Manifest) -> None:
    pieces = WordPieceTokenizer(["▁", *"ABCDE", "AB", "BC", "CD", "DE", "EA"], [-3.0] * 6 + [-5.0] * 5)
    datasets = [AudioDataset(tone_manifest, PROCESSOR, pieces, word_sampling=0.5, seed=seed) for seed in (0, 0, 1)]
    datasets[1].sample(5, epoch=0)  # what was loaded before does not matter
    spelled = [
        [dataset.sample(position, epoch).tokens.tolist() for position in range(20) for epoch in range(3)]
        for dataset in datasets
    ]
    assert spelled[0] == spelled[1] != spelled[2]
    position = max(range(20), key=lambda position: len(tone_manifest[position].text))
    text = tone_manifest[position].text
    assert datasets[0].sample(position, 2).tokens.tolist() == pieces.sampled(
        text, 0.5, random_stream(0, "word pieces", 2, tone_manifest[position].id)
    )
    # Read without a key, it is the likeliest; and all are the same text.
    assert datasets[0][position].tokens.tolist() == pieces.encode(text)
    assert len({tuple(datasets[0].sample(position, epoch).tokens.tolist()) for epoch in range(20)}) > 1
    assert {pieces.decode(datasets[0].sample(position, epoch).tokens.tolist()) for epoch in range(20)} == {text}


def test_no_word_is_sampled_of_an_empty_text(tone_manifest: Manifest) -> None:
    manifest = Manifest([replace(tone_manifest[0], text="")], tone_manifest.root)
    pieces = WordPieceTokenizer(["▁", "A"], [-1.0, -2.0])
    tokens = AudioDataset(manifest, PROCESSOR, pieces, word_sampling=0.5).sample(0, epoch=0).tokens
    assert (tokens.dtype, tokens.shape) == (torch.int64, (0,))


def test_sampling_counts_in_the_digest_and_without_it_nothing_new_does(tone_manifest: Manifest) -> None:
    pieces = WordPieceTokenizer(["▁", *"ABCDE"], [-3.0] * 6)
    plain, sampling = (AudioDataset(tone_manifest, PROCESSOR, pieces, word_sampling=p) for p in (0.0, 0.1))
    assert plain.digest != sampling.digest
    parts = [tone_manifest.digest, pieces.digest, Serializer().describe(PROCESSOR), None, None, 0]
    assert plain.digest == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def test_a_tokenizer_of_one_spelling_cannot_be_sampled(tone_manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"word_sampling is 0\.1, but a CharacterTokenizer spells a word in one way"):
        AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, word_sampling=0.1)


def moving(manifest: Manifest, seed: int = 0, stride: float = 0.0001) -> AudioDataset:
    """A dataset whose frames tell of single samples."""
    processor = AudioDataProcessor(n_mels=8, window_stride=stride)
    changes = (SpeedPerturbation(), Noise(10, 20))
    return AudioDataset(manifest, processor, TOKENIZER, waveform_augmentations=changes, seed=seed)


def test_the_frames_of_an_epoch_are_known_without_its_audio(tone_manifest: Manifest) -> None:
    dataset = moving(tone_manifest)
    for epoch in (0, 1, 7):
        frames = dataset.frames_in(epoch)
        assert frames == [len(dataset.sample(position, epoch).features) for position in range(len(dataset))]
    assert dataset.frames_in(0) != dataset.frames_in(1)
    assert dataset.frames_in(0) == moving(tone_manifest).frames_in(0) != moving(tone_manifest, seed=1).frames_in(0)
    assert set(dataset.frames_in(2)) - set(dataset.frames)
    assert dataset.frames == [len(dataset[position].features) for position in range(len(dataset))]


def test_a_recording_is_changed_by_seed_epoch_and_utterance(tone_manifest: Manifest) -> None:
    datasets = [moving(tone_manifest, seed, 0.01) for seed in (0, 0, 1)]
    datasets[1].sample(5, epoch=0)
    one, same, other = (dataset.sample(0, epoch=3).features for dataset in datasets)
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)
    utterance = tone_manifest[0]
    waveform = read_audio(tone_manifest.audio_path(utterance), 16000)
    for number, change in enumerate(datasets[0].waveform_augmentations):
        waveform = change(waveform, random_stream(0, f"waveform {number}", 3, utterance.id))
    assert torch.equal(one, datasets[0].processor.features(waveform))


def test_recordings_are_read_in_training_alone_and_normalised_alike(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    dataset = AudioDataset(
        *(tone_manifest, PROCESSOR, TOKENIZER),
        store=store,
        statistics=STATISTICS,
        waveform_augmentations=[SpeedPerturbation([1.0])],
    )
    plain = AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, store=store, statistics=STATISTICS)
    assert torch.equal(dataset.sample(4, 0).features, plain[4].features)
    # What its numbers are of is the recordings, then.
    assert plain.content_digest == store.digest
    assert dataset.content_digest == AudioDataset(tone_manifest, PROCESSOR, TOKENIZER).content_digest
    assert len({plain.digest, dataset.digest, moving(tone_manifest).digest}) == 3


def test_a_recording_that_becomes_too_short_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(410), 16000)
    manifest = Manifest([Utterance("a", "a.wav", 410 / 16000, "A", "s")], tmp_path)
    dataset = AudioDataset(manifest, PROCESSOR, TOKENIZER, waveform_augmentations=[SpeedPerturbation([1.1])])
    with pytest.raises(UserError, match=r"a\.wav: 373 samples are shorter .* as epoch 2 plays it; leave it out"):
        dataset.sample(0, 2)


def test_a_long_recording_has_the_samples_that_its_header_promises() -> None:
    # In single precision, as torchaudio counts, it would be one less.
    lengths = range(2_000_000, 2_000_060)
    assert any(_torchaudios_length(length) != resampled_length(length, 44100, 16000) for length in lengths)
    worst = next(length for length in lengths if _torchaudios_length(length) != resampled_length(length, 44100, 16000))
    assert len(resampled(torch.zeros(worst), 44100, 16000)) == resampled_length(worst, 44100, 16000)


def _torchaudios_length(samples: int) -> int:
    return len(torchaudio.functional.resample(torch.zeros(samples), 44100, 16000))


def test_a_store_that_lacks_an_utterance_is_refused(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest[:18], PROCESSOR, tmp_path)
    with pytest.raises(UserError, match="2 utterances of the manifest have no features, the first is 'tone-018'"):
        AudioDataset(tone_manifest, PROCESSOR, TOKENIZER, store=store)


@pytest.mark.parametrize(("rate", "samples"), [(8000, 4001), (22050, 11111), (44100, 9999), (16000, 5000)])
def test_the_frames_of_audio_at_another_rate_are_known_from_its_header(rate: int, samples: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(samples), rate)
    manifest = Manifest([Utterance("a", "a.wav", samples / rate, "A", "s")], tmp_path)
    dataset = AudioDataset(manifest, AudioDataProcessor(n_mels=8, window_stride=0.0001), TOKENIZER)
    assert dataset.frames == [len(dataset[0].features)]


def test_missing_audio_is_named(tmp_path: Path) -> None:
    manifest = Manifest([Utterance("a", "a.wav", 1.0, "A", "s")], tmp_path)
    with pytest.raises(UserError, match=r"a\.wav: cannot be read as audio"):
        AudioDataset(manifest, PROCESSOR, TOKENIZER)
