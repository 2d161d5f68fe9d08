"""What the recipe's augmentation makes of some utterances: sounds to listen to, and a picture of each."""

from collections.abc import Sequence
from pathlib import Path

import soundfile

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.evaluation import compared_features
from sonosco_mlflow.recipe import build_loader


def preview_augmentation(
    config: Config, folder: DataFolder, into: Path, *, count: int, epochs: int, ids: Sequence[str] = ()
) -> list[Path]:
    """Write how training hears some utterances, in its first epochs, and return what was written.

    ``<id>.wav`` is the recording as it is and ``<id>-epoch-<n>.wav`` as an epoch hears it; ``<id>.png`` shows the
    features of all of them, masks too, to one scale.

    Args:
        config: the recipe.
        folder: the data; it must be there.
        into: folder for the files, made if need be.
        count: utterances, from the first of the training manifest on, where ``ids`` names none.
        epochs: from the first on.
        ids: the utterances, by their ids.

    Raises:
        UserError: there is no data, or no such utterance.
    """
    dataset = build_loader(config, folder, "train", training=True).dataset
    places = {utterance.id: place for place, utterance in enumerate(dataset.manifest)}
    for name in ids:
        if name not in places:
            raise UserError(f"{folder.manifest('train')}: no utterance '{name}'; {nearest(name, places)}")
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ids or list(places)[:count]:
        written += _preview(dataset, places[name], epochs, into / name.replace("/", "-"))
    return written


def _preview(dataset: AudioDataset, place: int, epochs: int, stem: Path) -> list[Path]:
    plain = dataset.without_augmentation()
    heard = {"as it is": (plain.waveform(place, 0), plain[place].features)}
    for epoch in range(epochs):
        heard[f"epoch {epoch}"] = dataset.waveform(place, epoch), dataset.sample(place, epoch).features
    written = []
    for title, (waveform, _) in heard.items():
        suffix = "" if title == "as it is" else f"-{title.replace(' ', '-')}"
        written.append(stem.with_name(f"{stem.name}{suffix}.wav"))
        # Sums may be beyond full scale, which 16 bits cannot hold; a copy to listen to is cut off there.
        samples = waveform.clamp(-1.0, 1.0).numpy()
        soundfile.write(written[-1], samples, dataset.processor.sample_rate, subtype="PCM_16")
    written.append(stem.with_name(f"{stem.name}.png"))
    utterance = dataset.manifest[place]
    pictures = {title: features for title, (_, features) in heard.items()}
    written[-1].write_bytes(compared_features(pictures, f"{utterance.id}: {utterance.text}"))
    return written
