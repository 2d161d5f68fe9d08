import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.features import FeatureStatistics, FeatureStore, UtteranceStatistics
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from toy import PROCESSOR


@pytest.mark.usefixtures("small_shards")
def test_what_is_read_is_what_the_processor_gives(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    assert len(store) == len(tone_manifest)
    assert store.n_mels == PROCESSOR.n_mels
    for utterance in tone_manifest:
        expected = PROCESSOR(tone_manifest.audio_path(utterance)).numpy()
        assert utterance.id in store
        assert store.frames(utterance.id) == len(expected)
        np.testing.assert_array_equal(store.read(utterance.id), expected)
    assert "nobody" not in store


@pytest.mark.usefixtures("small_shards")
def test_no_shard_that_was_read_stays_an_open_file(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [store.read(utterance.id) for utterance in tone_manifest]
    assert len(list(tmp_path.glob("shard-*.npy"))) > 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(len(features) for features in kept)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", None])
def test_a_broken_shard_is_named(content: bytes | None, tone_manifest: Manifest, tmp_path: Path) -> None:
    extract_features(tone_manifest[:2], PROCESSOR, tmp_path)
    path = tmp_path / "shard-00000.npy"
    path.write_bytes(path.read_bytes()[:-64] if content is None else content)
    with pytest.raises(UserError, match=r"shard-00000\.npy: no shard of features .*`dvc repro features` makes it"):
        FeatureStore(tmp_path).read(tone_manifest[0].id)


def test_what_a_reader_does_with_its_features_never_reaches_the_file(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    before = store.digest
    store.read(tone_manifest[0].id)[:] = 0.0
    assert FeatureStore(tmp_path).digest == before


def test_a_store_travels_to_another_process(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read(tone_manifest[3].id), store.read(tone_manifest[3].id))
    assert len(pickle.dumps(store)) < 500


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', "3"])
def test_a_broken_index_is_named_by_line(line: str, tone_manifest: Manifest, tmp_path: Path) -> None:
    extract_features(tone_manifest[:2], PROCESSOR, tmp_path)
    path = tmp_path / "index.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"index\.jsonl:3: not a row of a feature index"):
        FeatureStore(tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_statistics_centre_and_scale_every_band(tone_manifest: Manifest, tmp_path: Path) -> None:
    store = extract_features(tone_manifest, PROCESSOR, tmp_path)
    everything = np.concatenate([store.read(utterance.id) for utterance in tone_manifest]).astype(np.float64)
    statistics = FeatureStatistics.of(store)
    np.testing.assert_allclose(statistics.mean, everything.mean(0))
    np.testing.assert_allclose(statistics.standard_deviation, everything.std(0))
    normalised = statistics.normalise(torch.from_numpy(everything.astype(np.float32)))
    torch.testing.assert_close(normalised.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std(0), torch.ones(8), atol=1e-3, rtol=0)


def test_a_band_that_never_varies_is_left_unscaled(tmp_path: Path) -> None:
    np.save(tmp_path / "shard-00000.npy", np.full((5, 2), [3.0, -23.0], dtype=np.float32))
    (tmp_path / "index.jsonl").write_text('{"id": "a", "shard": 0, "first": 0, "frames": 5}\n')
    statistics = FeatureStatistics.of(FeatureStore(tmp_path))
    assert statistics.standard_deviation == [1.0, 1.0]
    assert statistics.normalise(torch.full((1, 2), 3.0)).tolist() == [[0.0, 26.0]]


def test_statistics_come_back_from_their_file_and_their_description(tmp_path: Path) -> None:
    statistics = FeatureStatistics([0.1, -3.0], [1 / 3, 2.0])
    statistics.write(tmp_path / "statistics.json")
    for again in (
        FeatureStatistics.read(tmp_path / "statistics.json"),
        Deserializer().build(Serializer().describe(statistics)),
    ):
        assert (again.mean, again.standard_deviation) == (statistics.mean, statistics.standard_deviation)


def test_each_utterance_is_normalised_by_its_own_statistics_on_top() -> None:
    statistics = UtteranceStatistics([1.0, -3.0], [2.0, 0.5])
    features = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 3 + torch.tensor([5.0, -7.0])
    whole = FeatureStatistics([1.0, -3.0], [2.0, 0.5]).normalise(features)
    normalised = statistics.normalise(features)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, (whole - whole.mean(0)) / (whole.std(0, correction=0) + 0.1))
    # Louder, or behind another microphone, is the same; a band that does not vary is centred.
    torch.testing.assert_close(statistics.normalise(features + torch.tensor([4.0, 2.0])), normalised, atol=1e-4, rtol=0)
    assert (statistics.normalise(features[:1]) == 0).all()
    assert type(Deserializer().build(Serializer().describe(statistics))) is UtteranceStatistics


def test_sums_are_not_split_by_the_number_of_threads() -> None:
    statistics = UtteranceStatistics([0.0] * 80, [1.0] * 80)
    features = torch.randn(3000, 80, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(statistics.normalise(features))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_statistics_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    with pytest.raises(UserError, match=r"statistics\.json: no feature statistics"):
        FeatureStatistics.read(path)
    for content in ("{", json.dumps({"mean": [1.0]}), "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"statistics\.json: not feature statistics"):
            FeatureStatistics.read(path)
