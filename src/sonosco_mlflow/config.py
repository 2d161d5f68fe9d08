"""The one recipe of a run: strict, frozen, and the same for DVC, MLflow and the command line.

``params.yaml`` holds it; ``--set key=value`` (or MLflow's ``-P key=value``) changes a key for one run. Nothing is
guessed: an unknown key, or a value of the wrong kind, is refused with the nearest valid choice.

>>> config = Config.resolve({"training": {"epochs": 3}}, overrides={"optimizer.lr": "3e-4"})
>>> config.training.epochs, config.optimizer.lr
(3, 0.0003)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.settings import Scalar, flatten, plain_settings, settings_digest, settings_yaml

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Beyond these, what is computed before any data is read takes gigabytes, or breaks off.
Seconds = Annotated[float, Field(gt=0, le=1)]

# A date or a number that is none, bytes that are no UTF-8, and what is nested too deeply, are told by Python's own.
_NOT_YAML = (YAMLError, ValueError, RecursionError)

# `mlflow run -P model=tds` is short for the key that people set most.
ALIASES = {"model": "model.name"}

# Sections whose keys are names of the reader's choice.
_OPEN = ("model.settings.", "data.parts.")


LanguageModelUnit = Literal["tokens", "words"]
"""What the n-grams of a language model are made of."""


class Section(BaseModel):
    """A part of the recipe; unknown keys are refused and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """What to train on and how to load it. ``corpus``, ``source`` and ``parts`` decide the data.

    ``parts`` names, for each split, the parts of a corpus that has any (``data.parts.train=[train-clean-5]``).
    ``sorta_grad`` has the first epoch go from short utterances to long ones. Features are computed in so many
    ``processes``, or on the ``cluster`` of dask's with this address.
    """

    corpus: str = "default"
    source: str | None = None
    parts: dict[str, list[str]] = Field(default_factory=dict)
    frames_per_batch: Positive = 6000
    sorta_grad: bool = False
    workers: NotNegative = 0
    processes: Positive = 2
    cluster: str | None = None


class Features(Section):
    """What is computed of a recording; sizes in seconds.

    ``kind`` is ``log_mel``, ``kaldi_fbank`` (Kaldi's numbers) or ``mfcc``, ``n_mfcc`` coefficients of ``n_mels`` bands.
    """

    kind: Literal["log_mel", "kaldi_fbank", "mfcc"] = "log_mel"
    sample_rate: Annotated[int, Field(gt=0, le=1_000_000)] = 16000
    n_mels: Positive = 80
    n_mfcc: Positive = 40
    window_size: Seconds = 0.025
    window_stride: Seconds = 0.01
    window: Literal["hann", "hamming", "blackman", "povey"] = "hann"
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def size(self) -> int:
        """Numbers in a frame."""
        return self.n_mfcc if self.kind == "mfcc" else self.n_mels

    @property
    def idle(self) -> set[str]:
        """Keys that came later and change nothing here: data from before they were there is the same data."""
        return {"log_mel": {"kind", "n_mfcc"}, "kaldi_fbank": {"n_mfcc"}}.get(self.kind, set())


class Tokenizer(Section):
    """What texts are spelled in: ``characters``, or about ``size`` ``word_pieces`` of the training transcripts.

    In training, each word is spelled with probability ``sampling`` by any of its ten likeliest segmentations.
    """

    kind: Literal["characters", "word_pieces"] = "characters"
    size: Positive = 500
    sampling: Share = 0.0


class Model(Section):
    """Which model, of which size; ``settings`` changes single settings of the preset (``model.settings.dropout``)."""

    name: str = "tds"
    preset: str = "small"
    settings: dict[str, bool | int | float | str | list[int] | list[float] | None] = Field(default_factory=dict)


class Augment(Section):
    """SpecAugment's masks, in frames and mel bands (0 masks switch it off), and what is done to recordings.

    One of ``speeds`` is drawn for each utterance and epoch; noise of ``noise_snr``, lowest and highest in dB, is added
    to ``noise_share`` of them: of the recordings below the folder ``noise_corpus``, or else made up. ``gain`` is in dB,
    ``pitch`` in semitones, lowest and highest; ``shift`` is the most in seconds. ``reverberation_share`` are played in
    one of the rooms whose ``impulse_responses`` lie below that folder. What is empty or 0 is off; if anything of these
    is on, the recordings are read instead of the features.
    """

    time_masks: NotNegative = 2
    time_mask_frames: NotNegative = 20
    time_mask_share: Share = 0.15
    frequency_masks: NotNegative = 2
    frequency_mask_bands: NotNegative = 15
    speeds: list[Rate] = Field(default_factory=list)
    noise_snr: list[float] = Field(default_factory=list)
    noise_share: Share = 0.5
    noise_corpus: str | None = None
    gain: list[float] = Field(default_factory=list)
    pitch: list[float] = Field(default_factory=list)
    shift: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    impulse_responses: str | None = None
    reverberation_share: Share = 0.5

    @property
    def reads_recordings(self) -> bool:
        """Whether training reads the recordings instead of the stored features."""
        return bool(
            self.speeds or self.noise_snr or self.gain or self.pitch or self.shift or self.impulse_responses is not None
        )


class Optimizer(Section):
    """The optimizer and its learning rate after warm-up."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    momentum: Share = 0.9


class Schedule(Section):
    """How the learning rate moves: warm-up in steps, then one kind of reduction, never below ``floor``.

    ``plateau`` reduces after ``patience`` validations without a better loss, ``stepwise`` every ``every_epochs``
    epochs, ``scheduled`` at the listed ``epochs``, ``inverse_square_root`` with each step after warm-up, ``cosine``
    with each step until the last of ``training.epochs``, ``none`` not at all.
    """

    warmup_steps: NotNegative = 100
    reduction: Literal["none", "plateau", "stepwise", "scheduled", "inverse_square_root", "cosine"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    patience: Positive = 2
    every_epochs: Positive = 5
    epochs: list[Positive] = Field(default_factory=list)


class Training(Section):
    """The loop. ``accumulation`` batches make one optimizer step; ``soft_window_epochs`` is for the TDS model.

    ``precision`` is what forward passes compute in where the hardware has units for it. Validation and the final model
    use the weights' exponential average with ``ema_decay``, and the final model the mean of the last or best
    ``average_checkpoints`` with ``average``.
    """

    epochs: Positive = 10
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    accumulation: Positive = 1
    gradient_clip: Rate | None = 5.0
    validate_every_steps: Positive | None = None
    early_stopping_patience: Positive | None = None
    soft_window_epochs: NotNegative = 2
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    device: str = "cpu"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    average: Literal["none", "last", "best"] = "none"
    average_checkpoints: Positive = 5


class Decoding(Section):
    """How the test set is decoded at the end, and what ``evaluate`` and ``transcribe`` do; a beam of 1 is greedy.

    Validation during training is always greedy. :class:`~sonosco_mlflow.decoding.search.Search` explains each key.
    """

    beam: Positive = 1
    language_model: str | None = None
    language_model_unit: LanguageModelUnit = "tokens"
    language_model_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    length_reward: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    length_normalisation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    attention_limit: Positive | None = None
    end_threshold: Rate | None = None
    ctc_weight: Share = 0.0


class Checkpoint(Section):
    """When state is saved, besides at a signal, and which checkpoints are kept: the last, the best, each n-th step."""

    every_steps: Positive | None = None
    every_minutes: Rate | None = None
    every_epochs: Positive | None = 1
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_best: NotNegative = 1
    keep_every_steps: Positive | None = None


class Tracking(Section):
    """Names in the MLflow UI; `mlflow run` chooses the experiment itself (`--experiment-name`).

    ``registered`` makes the trained model a version of the registered model ``speech-<corpus>``.
    """

    experiment: str = "Default"
    run_name: str | None = None
    registered: bool = True


class Config(Section):
    """The whole recipe."""

    data: Data = Field(default_factory=Data)
    features: Features = Field(default_factory=Features)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    model: Model = Field(default_factory=Model)
    augment: Augment = Field(default_factory=Augment)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    training: Training = Field(default_factory=Training)
    decoding: Decoding = Field(default_factory=Decoding)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, str] | None = None) -> "Config":
        """Read a ``params.yaml`` and apply ``overrides`` (dotted key to text).

        Raises:
            UserError: the file is missing or malformed, or a key or value is refused.
        """
        try:
            recipe = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no recipe here; run in the project's folder or pass --params") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a recipe: {error}") from error
        except _NOT_YAML as error:
            raise UserError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: expected sections such as 'model:', found {type(recipe).__name__}")
        plain: dict[str, object] = {}
        for section, keys in recipe.items():
            try:
                plain |= plain_settings({section: keys})
            except RecursionError as error:
                raise UserError(f"{path}: {section}: lies within itself, or is nested too deeply") from error
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
        return cls.resolve(plain, overrides or {}, origin=str(path))

    @classmethod
    def resolve(
        cls, recipe: Mapping[str, object], overrides: Mapping[str, str], origin: str = "the recipe"
    ) -> "Config":
        """Apply ``overrides`` to ``recipe`` and check the whole.

        Raises:
            UserError: a key or value is refused; the message names it, what was found, and the nearest valid choice.
        """
        tree: dict[str, object] = json.loads(json.dumps(recipe))
        for key, text in overrides.items():
            _check_key(ALIASES.get(key, key))
            _set(tree, ALIASES.get(key, key), _parse(key, text))
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            details = error.errors()[0]
            # Below a setting's name pydantic lists the types that it has tried.
            parts = details["loc"][:3] if details["loc"][:2] == ("model", "settings") else details["loc"]
            key = ".".join(str(part) for part in parts)
            names = [ALIASES.get(name, name) for name in overrides]
            overridden = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in names)
            prefix = "" if overridden else f"{origin}: "
            raise UserError(prefix + _explain(key, dict(details))) from error

    def flat(self) -> dict[str, Scalar]:
        """Return the recipe as dotted keys; lists become their JSON text."""
        return dict(flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """Return the recipe as the text of a ``params.yaml``."""
        return settings_yaml(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the recipe."""
        return settings_digest(self.model_dump(mode="json"))

    @property
    def data_recipe(self) -> dict[str, object]:
        """The part of the recipe that the data stages depend on."""
        return {
            "data": self.data.model_dump(mode="json", include={"corpus", "source", "parts"}),
            "features": self.features.model_dump(mode="json", exclude=self.features.idle),
            "tokenizer": self.tokenizer.model_dump(mode="json", include={"kind", "size"}),
        }


def valid_keys() -> list[str]:
    """Return every dotted key of the recipe."""
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]


def _check_key(key: str) -> None:
    section = key.split(".")[0]
    keys = valid_keys()
    if key in keys or key.startswith(_OPEN):
        return
    if section in Config.model_fields:
        keys = [valid for valid in keys if valid.startswith(section + ".")]
    raise UserError(f"{key}: unknown key; {nearest(key, keys) or 'params.yaml shows them all'}")


def _parse(key: str, text: str) -> object:
    try:
        # A bare `key=` means the empty string, not YAML's null.
        return YAML(typ="safe").load(text) if text else ""
    except _NOT_YAML as error:
        raise UserError(f"{key}: the value {text!r} cannot be read: {error}") from error


def _set(tree: dict[str, object], key: str, value: object) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{parent}: found {child!r}, expected a section of keys")
        node = child
    node[last] = value


def _explain(key: str, details: Mapping[str, object]) -> str:
    found = details["input"]
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(key, [*valid_keys(), *Config.model_fields])}".rstrip("; ")
    if details["type"] == "literal_error":
        section, _, name = key.partition(".")
        annotation = Config.model_fields[section].annotation.model_fields[name].annotation  # type: ignore[union-attr]
        return f"{key}: found {found!r}, {nearest(str(found), get_args(annotation))}"
    if key.startswith("model.settings."):
        return f"{key}: found {found!r}, expected a number, a text or a list of numbers"
    # pydantic says "Input should be ..."; for a reader of a recipe, it is the key's value that should be.
    expected = str(details["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: found {found!r}, expected {expected}"
