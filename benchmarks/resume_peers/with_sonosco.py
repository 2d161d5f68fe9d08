"""One segment of the toy training by sonosco_mlflow's ModelTrainer and ModelCheckpoint."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from sonosco_mlflow import (
    AudioDataLoader,
    AudioDataProcessor,
    AudioDataset,
    Batch,
    Callback,
    CharacterTokenizer,
    Deserializer,
    FeatureStatistics,
    Manifest,
    ModelCheckpoint,
    ModelTrainer,
    SpecAugment,
    serializable,
)
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.text import SpecialToken
from sonosco_mlflow.training.callbacks.learning_rate import LinearWarmUp
from toy import CLASSES, FRAMES, Segment, StepLog, ToyModel, augmented

SAMPLE_RATE = 16000
LETTERS = "ABCDEF"[:CLASSES]
serializable(ToyModel)  # as a decorator does it, but the peers know nothing of it


class GlobalAugmentation:
    """The peers' augmentation: passes over the stream that it is given and draws from torch's global generator."""

    def __call__(self, features: Tensor, stream: np.random.Generator) -> Tensor:
        return augmented(features)


class StepLogger(Callback):
    """Tells the loss below at which step it is computed."""

    position = (0, 1)

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        self.on_safe_point(trainer)

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        StepLogger.position = (trainer.progress.epoch, trainer.progress.step + 1)


@serializable
def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch.features), batch.tokens[:, 0] - len(SpecialToken))
    log.step(*StepLogger.position, [int(identity.removeprefix("tone-")) for identity in batch.ids], loss)
    return loss


def corpus(folder: Path, processor: AudioDataProcessor) -> Manifest:
    """Noisy tones of equal length, each of one of six pitches."""
    folder.mkdir(exist_ok=True)
    samples = next(count for count in range(SAMPLE_RATE) if processor.frames(count) == FRAMES)
    time = np.arange(samples) / SAMPLE_RATE
    utterances = []
    for number in range(segment.samples):
        noise = np.random.default_rng(number).uniform(-0.2, 0.2, samples)
        path = folder / f"tone-{number:03d}.wav"
        soundfile.write(path, 0.3 * np.sin(2 * np.pi * 500 * (1 + number % CLASSES) * time) + noise, SAMPLE_RATE)
        utterances.append(Utterance(path.stem, path.name, samples / SAMPLE_RATE, LETTERS[number % CLASSES], "tone"))
    return Manifest(utterances, folder)


segment = Segment.from_command_line()
log = StepLog(segment, lambda step: (segment.checkpoints / f"step-{step:08d}" / "manifest.json").exists())
processor = AudioDataProcessor(n_mels=8)
augmentation = GlobalAugmentation() if segment.variant == "global" else SpecAugment(1, 5, 0.3, 1, 2)
manifest = corpus(Path(segment.folder) / "corpus", processor)
frames = torch.cat([processor(manifest.audio_path(utterance)) for utterance in manifest])
dataset = AudioDataset(
    manifest,
    processor,
    CharacterTokenizer(LETTERS),
    statistics=FeatureStatistics(frames.mean(dim=0).tolist(), frames.std(dim=0).tolist()),
    augmentation=augmentation if segment.augment else None,
    seed=0,
)
loader = AudioDataLoader(dataset, frames_per_batch=FRAMES * segment.batch_size, seed=0, workers=segment.workers)
checkpoint = ModelCheckpoint(segment.checkpoints, every_steps=segment.checkpoint_every)
if segment.resume:
    trainer = Deserializer().deserialize(segment.checkpoints, train_loader=loader, val_loader=None)
    trainer.callbacks[-1].directory = segment.checkpoints
else:
    torch.manual_seed(0)
    model = ToyModel()
    trainer = ModelTrainer(
        model,
        loss_of,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loader,
        callbacks=[LinearWarmUp(segment.steps), checkpoint],
        epochs=segment.epochs,
        seed=0,
    )
trainer.attach(StepLogger())
trainer.continue_training()
segment.write_weights(trainer.model)
