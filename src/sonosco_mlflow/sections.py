"""The sections of a recipe: each key, the kind of its value, and its default.

:mod:`sonosco_mlflow.config` reads them from ``params.yaml``.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Beyond these, what is computed before any data is read takes gigabytes, or breaks off.
Seconds = Annotated[float, Field(gt=0, le=1)]
# It names a folder, a stage of DVC's, and begins the ids of utterances.
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

Skippable = Literal["text", "short", "same-audio", "file", "audio", "duration", "clipping", "silence"]
"""The checks of ``sonosco manifest validate`` that find each row that is bad, whatever it is to be used for."""

LanguageModelUnit = Literal["tokens", "words"]
"""What the n-grams of a language model are made of."""


class Section(BaseModel):
    """A part of the recipe; unknown keys are refused and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Corpus(Section):
    """One corpus: its ``kind`` (docs/corpora.md), and where it comes from.

    ``parts`` names, for each split, the parts of a corpus that has any (``{train: [train-clean-5]}``). With
    ``hold_out``, splits that it does not have are cut from its training part; else others of the corpora have them.
    """

    kind: str = "default"
    source: str | None = None
    parts: dict[str, list[str]] = Field(default_factory=dict)
    hold_out: bool = True

    @property
    def idle(self) -> set[str]:
        """Keys that came later and change nothing here: data from before they were there is the same data."""
        return {"hold_out"} if self.hold_out else set()


class Data(Section):
    """What to train on and how to load it. ``corpora`` decide the data, each under a name of its own.

    Utterances in which one of the checks in ``skip`` finds something are left out; nothing is where it is empty.
    ``normalisation`` is by the statistics of the training split (``corpus``), or each ``utterance``'s own after that.
    ``sorta_grad`` has the first epoch go from short utterances to long ones; the first ``curriculum_epochs`` have only
    the shortest utterances, more from one to the next. Features are computed in so many ``processes``, or on the
    ``cluster`` of dask's with this address.
    """

    corpora: Annotated[dict[CorpusName, Corpus], Field(min_length=1)] = Field(
        default_factory=lambda: {"default": Corpus()}
    )
    skip: list[Skippable] = Field(default_factory=list)
    normalisation: Literal["corpus", "utterance"] = "corpus"
    frames_per_batch: Positive = 6000
    sorta_grad: bool = False
    curriculum_epochs: NotNegative = 0
    workers: NotNegative = 0
    processes: Positive = 2
    cluster: str | None = None

    @property
    def corpus(self) -> str:
        """The names of the corpora."""
        return "+".join(self.corpora)


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
