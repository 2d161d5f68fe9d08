import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sonosco_mlflow.data.augment import Noise, SpeedPerturbation
from sonosco_mlflow.data.dataset import AudioDataset, Sample
from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.loader import AudioDataLoader, collate
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError, describe_failure
from sonosco_mlflow.text import SpecialToken
from toy import PROCESSOR, TOKENIZER, batch_digest, tone_loader


def test_any_number_of_workers_gives_the_same_batches(tone_manifest: Manifest, tmp_path: Path) -> None:
    digests = {
        workers: [
            [batch_digest(batch) for batch in tone_loader(tone_manifest, workers=workers).epoch(epoch)]
            for epoch in (0, 1)
        ]
        for workers in (0, 1, 2)
    }
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][0] != digests[0][1]


def moving_loader(manifest: Manifest, workers: int = 0, seed: int = 0) -> AudioDataLoader:
    """A loader whose utterances have other lengths in each epoch."""
    changes = (SpeedPerturbation([0.5, 1.0, 2.0]), Noise())
    dataset = AudioDataset(manifest, PROCESSOR, TOKENIZER, waveform_augmentations=changes, seed=seed)
    return AudioDataLoader(dataset, frames_per_batch=120, seed=seed, workers=workers)


def test_batches_are_planned_by_the_lengths_of_their_epoch(tone_manifest: Manifest) -> None:
    loader = moving_loader(tone_manifest)
    for epoch in (0, 3):
        batches = list(loader.epoch(epoch))
        assert len(batches) == loader.batches_in(epoch)
        assert sorted(name for batch in batches for name in batch.ids) == sorted(item.id for item in tone_manifest)
        assert all(batch.features[..., 0].numel() <= 120 or len(batch) == 1 for batch in batches)
        later = list(map(batch_digest, loader.epoch(epoch, start=3)))
        assert later == list(map(batch_digest, batches))[3:]
        assert list(map(batch_digest, moving_loader(tone_manifest, workers=2).epoch(epoch))) == list(
            map(batch_digest, batches)
        )
    # Were they planned by the recordings, a batch of slowed ones would be larger than is allowed.
    frames = loader.dataset.frames_in(0)
    planned = loader.plan.batches(0)
    assert any(len(batch) > 1 and len(batch) * max(frames[position] for position in batch) > 120 for batch in planned)


def test_batches_do_not_depend_on_the_number_of_threads_that_training_has(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(noise.integers(3_000, 60_000, 20)):
        samples = noise.uniform(-1, 1, length)
        soundfile.write(tmp_path / f"{number}.wav", samples, PROCESSOR.sample_rate)
        rows.append(Utterance(f"{number}", f"{number}.wav", len(samples) / PROCESSOR.sample_rate, "A", "noise"))
    dataset = AudioDataset(
        Manifest(rows, tmp_path), PROCESSOR, TOKENIZER, waveform_augmentations=[SpeedPerturbation([0.9, 1.1])]
    )
    loader = AudioDataLoader(dataset, frames_per_batch=2000, seed=0)
    threads, found = torch.get_num_threads(), []
    for count in (1, 8):
        torch.set_num_threads(count)
        try:
            found.append(list(map(batch_digest, loader.epoch(0))))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_workers_read_a_store_alike(tone_manifest: Manifest, tmp_path: Path) -> None:
    loader = tone_loader(tone_manifest)
    expected = [batch_digest(batch) for batch in loader.epoch(0)]
    loader.dataset.store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    assert [batch_digest(batch) for batch in loader.epoch(0)] == expected
    loader.workers = 2
    assert [batch_digest(batch) for batch in loader.epoch(0)] == expected


def test_an_epoch_begins_at_any_batch_without_those_before(
    tone_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = tone_loader(tone_manifest)
    expected = [batch_digest(batch) for batch in loader.epoch(1)]
    assert loader.batches_in(1) == len(expected) > 4
    loaded: list[int] = []
    original = type(loader.dataset).sample

    def counting(self: object, position: int, epoch: int) -> Sample:
        loaded.append(position)
        return original(self, position, epoch)  # type: ignore[arg-type]

    monkeypatch.setattr(type(loader.dataset), "sample", counting)
    for start in range(len(expected) + 1):
        loaded.clear()
        assert [batch_digest(batch) for batch in loader.epoch(1, start)] == expected[start:]
        assert len(loaded) == sum(map(len, loader.plan.batches(1)[start:]))


def test_sorta_grad_begins_with_short_utterances_and_may_be_continued_anywhere(tone_manifest: Manifest) -> None:
    plain = tone_loader(tone_manifest)
    loader = AudioDataLoader(plain.dataset, frames_per_batch=120, seed=0, sorta_grad=True)
    assert loader.digest != plain.digest
    longest = [int(batch.feature_lengths.max()) for batch in loader.epoch(0)]
    assert longest == sorted(longest)
    assert [batch.ids for batch in loader.epoch(1)] == [batch.ids for batch in plain.epoch(1)]
    expected = [batch_digest(batch) for batch in loader.epoch(0)]
    assert [batch_digest(batch) for batch in loader.epoch(0, start=3)] == expected[3:]


def test_a_curriculum_begins_with_the_shortest_and_may_be_continued_anywhere(tone_manifest: Manifest) -> None:
    plain = tone_loader(tone_manifest)
    loader = AudioDataLoader(plain.dataset, frames_per_batch=60, seed=0, curriculum_epochs=3)
    assert loader.digest != tone_loader(tone_manifest, frames_per_batch=60).digest
    ids = [{name for batch in loader.epoch(epoch) for name in batch.ids} for epoch in range(4)]
    assert [len(seen) for seen in ids] == [10, 15, 18, 20]
    expected = list(map(batch_digest, loader.epoch(1)))
    for start in range(len(expected) + 1):
        assert list(map(batch_digest, loader.epoch(1, start))) == expected[start:]


def test_a_curriculum_goes_by_the_lengths_of_its_epoch(tone_manifest: Manifest) -> None:
    moving = moving_loader(tone_manifest)
    loader = AudioDataLoader(moving.dataset, frames_per_batch=120, seed=0, curriculum_epochs=1)
    frames = moving.dataset.frames_in(0)
    names = {row.id: length for row, length in zip(tone_manifest, frames, strict=True)}
    seen = {name: names.pop(name) for batch in loader.epoch(0) for name in batch.ids}
    assert max(seen.values()) <= min(names.values())
    padded = sum(batch.features[..., 0].numel() for batch in loader.epoch(0))
    assert loader.padding_in(0) == pytest.approx(1 - sum(seen.values()) / padded)


def test_loading_draws_from_no_global_generator(tone_manifest: Manifest) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(tone_loader(tone_manifest, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_every_utterance_once_within_the_budget(tone_manifest: Manifest) -> None:
    batches = list(tone_loader(tone_manifest, frames_per_batch=150).epoch(0))
    assert sorted(identifier for batch in batches for identifier in batch.ids) == [u.id for u in tone_manifest]
    assert all(batch.features.shape[0] * batch.features.shape[1] <= 150 for batch in batches)
    assert any(len(batch) > 1 for batch in batches)


def test_evaluation_gives_the_same_batches_in_every_epoch(tone_manifest: Manifest) -> None:
    loader = tone_loader(tone_manifest, seed=None)
    assert [batch_digest(batch) for batch in loader] == [batch_digest(batch) for batch in loader.epoch(3)]


def test_a_batch_is_padded_with_zeros_and_the_padding_token() -> None:
    samples = [
        Sample("a", "AB", torch.ones(3, 8), torch.tensor([5, 6])),
        Sample("b", "ABA", torch.ones(5, 8), torch.tensor([5, 6, 5])),
    ]
    batch = collate(samples)
    assert (batch.ids, batch.texts, len(batch)) == (["a", "b"], ["AB", "ABA"], 2)
    assert batch.features.shape == (2, 5, 8)
    assert batch.features[0, 3:].abs().sum() == 0
    assert batch.features[0, :3].min() == 1
    assert batch.feature_lengths.tolist() == [3, 5]
    assert batch.tokens.tolist() == [[5, 6, SpecialToken.PAD], [5, 6, 5]]
    assert batch.tokens.dtype == batch.token_lengths.dtype == batch.feature_lengths.dtype == torch.int64
    assert batch.token_lengths.tolist() == [2, 3]
    assert batch.frames == 8


def test_a_batch_moves_with_all_its_tensors() -> None:
    moved = collate([Sample("a", "A", torch.ones(3, 8), torch.tensor([5]))]).to(torch.device("meta"))
    tensors = (moved.features, moved.feature_lengths, moved.tokens, moved.token_lengths)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.ids == ["a"]


def test_the_loader_knows_its_tokenizer(tone_manifest: Manifest) -> None:
    loader = tone_loader(tone_manifest)
    assert isinstance(loader, AudioDataLoader)
    assert loader.tokenizer is loader.dataset.tokenizer


def test_a_broken_recording_is_told_alike_whichever_process_reads_it(tone_manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(tone_manifest.root, tmp_path / "tones")
    manifest = Manifest(tone_manifest, tmp_path / "tones")
    loaders = [moving_loader(manifest, workers) for workers in (0, 1)]
    path = manifest.audio_path(manifest[3])
    path.write_bytes(b"garbage")
    told = []
    for loader in loaders:
        with pytest.raises(UserError) as found:
            list(loader.epoch(0))
        told.append(describe_failure(found.value))
    assert told[0] == told[1]
    assert told[0].startswith(str(path))
