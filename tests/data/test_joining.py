"""Several corpora as one manifest and one store."""

from pathlib import Path

import pytest

from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.features import FeatureStore
from sonosco_mlflow.data.joining import JoinedFeatures, joined_manifest, prefixes
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Manifest, Utterance
from sonosco_mlflow.errors import UserError
from toy import PROCESSOR, tone_corpus, tone_texts


def of(folder: Path, name: str, speaker: str) -> Manifest:
    return Manifest([Utterance(name, "wav/a.wav", 1.0, "A", speaker)], folder)


def test_what_is_named_alike_stays_apart(tmp_path: Path) -> None:
    one, other = of(tmp_path / "one", "a", "mary"), of(tmp_path / "other", "a", UNKNOWN_SPEAKER)
    joined = joined_manifest({"one-": one, "other-": other}, tmp_path / "dataset")
    assert list(joined) == [
        Utterance("one-a", "../one/wav/a.wav", 1.0, "A", "one-mary"),
        # Who is not known, is known by no name.
        Utterance("other-a", "../other/wav/a.wav", 1.0, "A", UNKNOWN_SPEAKER),
    ]
    assert [joined.audio_path(row).resolve() for row in joined] == [
        tmp_path / "one" / "wav" / "a.wav",
        tmp_path / "other" / "wav" / "a.wav",
    ]


def test_one_corpus_keeps_its_names(tmp_path: Path) -> None:
    assert prefixes(["one"]) == {"one": ""}
    manifest = of(tmp_path / "one", "a", "mary")
    assert joined_manifest({"": manifest}, tmp_path / "dataset").digest == manifest.digest


def test_ids_that_meet_all_the_same_are_refused(tmp_path: Path) -> None:
    parts = {"a-": of(tmp_path, "b-c", "x"), "a-b-": of(tmp_path, "c", "x")}
    with pytest.raises(UserError, match="two utterances have the id 'a-b-c'"):
        joined_manifest(parts, tmp_path)


def test_each_id_leads_to_its_own_store(tmp_path: Path) -> None:
    stores = {}
    for name, seed in (("a-", 1), ("a-tone-", 2)):
        corpus = tone_corpus(tmp_path / name, tone_texts(3, seed))
        stores[name] = extract_features(corpus, PROCESSOR, tmp_path / f"{name}features")
    joined = JoinedFeatures(stores)
    for prefix, store in stores.items():
        for item in store.ids:
            assert joined.read(prefix + item).tobytes() == store.read(item).tobytes()
    assert "tone-000" not in joined
    assert joined.digest not in {store.digest for store in stores.values()}
    assert JoinedFeatures({"": stores["a-"]}).digest == stores["a-"].digest
    assert [len(shard) for shard in joined.shards()] == [
        len(shard) for one in stores.values() for shard in one.shards()
    ]


def test_a_store_of_nothing_is_passed_over(tmp_path: Path) -> None:
    empty = extract_features(Manifest([], tmp_path), PROCESSOR, tmp_path / "none")
    full = extract_features(tone_corpus(tmp_path / "a", tone_texts(2)), PROCESSOR, tmp_path / "features")
    joined = JoinedFeatures({"a-": empty, "b-": full})
    assert (len(joined), joined.n_mels) == (2, 8)
    assert len(FeatureStore(tmp_path / "none")) == 0
