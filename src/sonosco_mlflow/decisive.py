"""Which settings decide the bits of a training's state: in these a run that goes on must not differ."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from sonosco_mlflow.config import Config
from sonosco_mlflow.settings import Scalar, flatten

# What decides how a run goes on, but not a single bit of where it ends; the data's content has digests of its own.
# Names of keys, and of sections; a star stands for any name.
NOT_DECISIVE: tuple[str, ...] = (
    "data.corpora.*.source",
    "data.corpora.*.hold_out",
    "data.workers",
    "data.processes",
    "data.cluster",
    "augment.noise_corpus",
    "augment.impulse_responses",
    "checkpoint",
    "tracking",
    "training.epochs",
    "decoding",
)

# What came into the recipe later: at its default it leaves every result as it was, and does not count, so that a run
# from before goes on. Names of keys, and of sections.
LATER = (
    *("tokenizer", "augment.speeds", "augment.noise_snr", "augment.noise_share", "data.sorta_grad", "decoding"),
    "data.curriculum_epochs",
    *("augment.gain", "augment.pitch", "augment.shift", "augment.reverberation_share"),
    *("features.kind", "features.n_mfcc", "data.skip", "data.normalisation"),
    *("training.precision", "training.ema_decay", "training.average", "training.average_checkpoints"),
)


def decisive(settings: Mapping[str, object], *, is_recipe: bool) -> dict[str, Scalar]:
    """Return the flat settings without those that change no bit of a state on its way (:data:`NOT_DECISIVE`).

    What came later (:data:`LATER`) and stands at its default is left out as well. Of settings that are no recipe, but a
    program's own, nobody here knows which these are: all of them are returned.
    """
    flat = dict(flatten(settings))
    if not is_recipe:
        return flat
    idle = NOT_DECISIVE
    if flat.get("training.average", "none") != "none":
        # Which checkpoints there are decides what their mean is.
        idle = tuple(name for name in idle if name != "checkpoint")
    defaults = Config().flat()
    return {
        key: value
        for key, value in flat.items()
        if not _is_among(key, idle) and not (_is_among(key, LATER) and value == defaults.get(key))
    }


def _is_among(key: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(key, name) or f"{key}.".startswith(f"{name}.") for name in names)
