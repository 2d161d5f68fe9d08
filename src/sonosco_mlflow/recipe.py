"""From the recipe to objects: loaders, model, optimizer, callbacks, trainer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sonosco_mlflow import metrics
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.augment import Noise, SpecAugment, SpeedPerturbation, WaveformAugmentation
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.features import FeatureStatistics, UtteranceStatistics
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder, make_processor
from sonosco_mlflow.data.waveforms import Gain, Pitch, RecordedNoise, Reverberation, Shift, Sounds
from sonosco_mlflow.decoding.ngram import TokenLanguageModel
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.decoding.words import WordLanguageModel
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models import build_model, model_settings
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.sections import Augment, Decoding, Optimizer, Schedule
from sonosco_mlflow.text import Tokenizer
from sonosco_mlflow.tracking.secrecy import require_no_secrets
from sonosco_mlflow.training.callbacks import (
    Callback,
    CheckpointAverage,
    CosineDecay,
    EarlyStopping,
    ExponentialAverage,
    InverseSquareRootDecay,
    LinearWarmUp,
    ModelCheckpoint,
    PlateauLearningRateReduction,
    ScheduledLearningRateReduction,
    SoftWindow,
    StepwiseLearningRateReduction,
    TextComparison,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.vocabulary import read_tokenizer

_STATISTICS = {"corpus": FeatureStatistics, "utterance": UtteranceStatistics}


@dataclass(frozen=True)
class Loaders:
    """The three splits of a recipe's data; only training is shuffled and augmented."""

    train: AudioDataLoader
    validation: AudioDataLoader
    test: AudioDataLoader


def check_recipe(config: Config) -> dict[str, object]:
    """Return all settings of the recipe's model, after trying what can be tried without data.

    Raises:
        UserError: the recipe holds credentials, or the model, its settings, the features, the device, an augmentation,
            the sampling or the averaging cannot be; the message names the key.
    """
    require_no_secrets(config.model_dump(mode="json"))
    settings = model_settings(config.model.name, config.model.preset, config.model.settings)
    make_processor(config.features)
    require_device(config.training.device)
    waveform_augmentations(config.augment, config.features.sample_rate)
    if config.tokenizer.sampling and config.tokenizer.kind == "characters":
        raise UserError(
            f"tokenizer.sampling: found {config.tokenizer.sampling} beside tokenizer.kind 'characters', which spell a "
            "word in one way; expected 0, or tokenizer.kind 'word_pieces'"
        )
    if config.training.ema_decay is not None and config.training.average != "none":
        raise UserError(
            f"training.ema_decay: found {config.training.ema_decay} beside training.average "
            f"'{config.training.average}'; expected one of the two: set the other to null or none"
        )
    # The vocabulary is not known yet; on the meta device its size costs nothing, and no generator is drawn from.
    with torch.device("meta"):
        build_model(config.model.name, config.model.preset, config.features.size, 32, config.model.settings)
    return settings


def require_device(name: str) -> None:
    """Return if something can be computed on the device of that name.

    Raises:
        UserError: there is none here.
    """
    try:
        # Read back: the meta device makes tensors without content.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"training.device: found '{name}', expected cpu, or cuda where there is a GPU ({reason})"
        ) from error


def build_loaders(config: Config, folder: DataFolder) -> Loaders:
    """Return loaders over the data in ``folder``.

    Raises:
        UserError: the data is missing or incomplete.
    """
    return Loaders(
        train=build_loader(config, folder, "train", training=True),
        validation=build_loader(config, folder, "dev"),
        test=build_loader(config, folder, "test"),
    )


def build_loader(config: Config, folder: DataFolder, split: str, *, training: bool = False) -> AudioDataLoader:
    """Return the loader of one split."""
    dataset = AudioDataset(
        Manifest.read(folder.manifest(split)),
        make_processor(config.features),
        read_tokenizer(folder.vocabulary),
        store=folder.store(split),
        statistics=_STATISTICS[config.data.normalisation].read(folder.statistics),
        augmentation=_augmentation(config.augment) if training else None,
        waveform_augmentations=waveform_augmentations(config.augment, config.features.sample_rate) if training else (),
        word_sampling=config.tokenizer.sampling if training else 0.0,
        seed=config.training.seed,
    )
    return AudioDataLoader(
        dataset,
        frames_per_batch=config.data.frames_per_batch,
        seed=config.training.seed if training else None,
        workers=config.data.workers,
        sorta_grad=training and config.data.sorta_grad,
        curriculum_epochs=config.data.curriculum_epochs if training else 0,
    )


def build_trainer(config: Config, loaders: Loaders) -> ModelTrainer:
    """Return the trainer of a recipe, with a model initialised from the recipe's seed."""
    torch.manual_seed(config.training.seed)
    model = build_model(
        config.model.name,
        config.model.preset,
        n_mels=config.features.size,
        vocabulary_size=loaders.train.tokenizer.vocabulary_size,
        settings=config.model.settings,
    )
    return ModelTrainer(
        model,
        optimizer=_optimizer(config.optimizer, model),
        train_loader=loaders.train,
        val_loader=loaders.validation,
        metrics=[metrics.word_error_rate, metrics.character_error_rate],
        callbacks=_callbacks(config, model),
        epochs=config.training.epochs,
        seed=config.training.seed,
        accumulation=config.training.accumulation,
        gradient_clip=config.training.gradient_clip,
        validate_every_steps=config.training.validate_every_steps,
        device=config.training.device,
        precision=config.training.precision,
    )


def build_search(decoding: Decoding, tokenizer: Tokenizer, file: Path | None, n_best: int = 1) -> Search:
    """Return the search of a recipe.

    Args:
        decoding: its settings.
        tokenizer: of the model.
        file: where the language model lies that they name.
        n_best: hypotheses that are wanted of each utterance.

    Raises:
        UserError: the language model is missing, broken, or over other tokens.
    """
    kind = TokenLanguageModel if decoding.language_model_unit == "tokens" else WordLanguageModel
    settings = decoding.model_dump(exclude={"language_model", "language_model_unit"})
    return Search(**settings, n_best=n_best, language_model=None if file is None else kind.read(file, tokenizer))


def build_checkpoints(config: Config) -> ModelCheckpoint:
    """Return what keeps a recipe's checkpoints: as many as it asks for, and at least those that are averaged."""
    options = config.checkpoint.model_dump()
    if config.training.average != "none":
        option = f"keep_{config.training.average}"
        options[option] = max(options[option], config.training.average_checkpoints)
    return ModelCheckpoint(**options)


def _augmentation(augment: Augment) -> SpecAugment | None:
    if augment.time_masks == 0 and augment.frequency_masks == 0:
        return None
    masks = {"time_masks", "time_mask_frames", "time_mask_share", "frequency_masks", "frequency_mask_bands"}
    return SpecAugment(**augment.model_dump(include=masks))


def waveform_augmentations(augment: Augment, sample_rate: int) -> list[WaveformAugmentation]:
    """Return what a recipe has happen to recordings, in the order in which it happens.

    Raises:
        UserError: a setting is out of its range, or a folder has no recordings.
    """
    found: list[WaveformAugmentation] = []
    if augment.speeds:
        found.append(SpeedPerturbation(augment.speeds))
    if augment.pitch:
        found.append(Pitch(*_two("augment.pitch", augment.pitch, "semitones")))
    if augment.shift:
        found.append(Shift(augment.shift, sample_rate))
    if augment.impulse_responses is not None:
        rooms = Sounds(Path(augment.impulse_responses), "augment.impulse_responses")
        found.append(Reverberation(rooms, sample_rate, augment.reverberation_share))
    if augment.noise_snr:
        lowest, highest = _two("augment.noise_snr", augment.noise_snr, "dB")
        if augment.noise_corpus is None:
            found.append(Noise(lowest, highest, augment.noise_share))
        else:
            sounds = Sounds(Path(augment.noise_corpus), "augment.noise_corpus")
            found.append(RecordedNoise(sounds, sample_rate, lowest, highest, augment.noise_share))
    elif augment.noise_corpus is not None:
        raise UserError("augment.noise_corpus: expected augment.noise_snr beside it, such as [10, 30]")
    if augment.gain:
        found.append(Gain(*_two("augment.gain", augment.gain, "dB")))
    return found


def _two(key: str, values: list[float], unit: str) -> tuple[float, float]:
    if len(values) != 2:
        raise UserError(f"{key}: found {values}, expected the lowest and the highest, in {unit}")
    return values[0], values[1]


def _optimizer(recipe: Optimizer, model: SpeechModel) -> torch.optim.Optimizer:
    parameters = model.parameters()
    match recipe.name:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _callbacks(config: Config, model: SpeechModel) -> list[Callback]:
    callbacks: list[Callback] = [TextComparison()]
    if config.schedule.warmup_steps:
        callbacks.append(LinearWarmUp(config.schedule.warmup_steps))
    callbacks += _reduction(config.schedule)
    if hasattr(model, "soft_window"):
        callbacks.append(SoftWindow(config.training.soft_window_epochs))
    if config.training.ema_decay is not None:
        callbacks.append(ExponentialAverage(config.training.ema_decay))
    if config.training.average != "none":
        callbacks.append(CheckpointAverage(config.training.average, config.training.average_checkpoints))
    if config.training.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.training.early_stopping_patience))
    return callbacks


def _reduction(schedule: Schedule) -> list[Callback]:
    match schedule.reduction:
        case "plateau":
            return [PlateauLearningRateReduction(schedule.patience, schedule.factor, schedule.floor)]
        case "stepwise":
            return [StepwiseLearningRateReduction(schedule.every_epochs, schedule.factor, schedule.floor)]
        case "scheduled":
            return [ScheduledLearningRateReduction(schedule.epochs, schedule.factor, schedule.floor)]
        case "inverse_square_root":
            return [InverseSquareRootDecay(schedule.warmup_steps, schedule.floor)]
        case "cosine":
            return [CosineDecay(schedule.warmup_steps, schedule.floor)]
        case "none":
            return []
