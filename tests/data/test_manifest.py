import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError


def utterance(identifier: str, **changes: object) -> Utterance:
    values: dict[str, object] = {
        "id": identifier,
        "audio_filepath": f"wav/{identifier}.wav",
        "duration": 1.5,
        "text": "YES",
        "speaker": "fash",
    }
    return Utterance(**{**values, **changes})  # type: ignore[arg-type]


def write_line(path: Path, **entry: object) -> Path:
    path.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    return path


def test_lines_are_sorted_by_id_with_keys_in_a_fixed_order(tmp_path: Path) -> None:
    Manifest([utterance("b"), utterance("a", text="ÄPFEL")], tmp_path).write(tmp_path / "train.jsonl")
    assert (tmp_path / "train.jsonl").read_bytes().decode() == (
        '{"id": "a", "audio_filepath": "wav/a.wav", "duration": 1.5, "text": "ÄPFEL", "speaker": "fash"}\n'
        '{"id": "b", "audio_filepath": "wav/b.wav", "duration": 1.5, "text": "YES", "speaker": "fash"}\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.builds(
            Utterance,
            id=names,
            audio_filepath=st.from_regex(r"[a-z]{1,5}\.wav", fullmatch=True),
            duration=st.floats(min_value=1e-9, max_value=1e9),
            text=names,
            speaker=names,
        ),
        unique_by=lambda made: made.id,
        max_size=5,
    )
)
def test_what_is_written_is_read_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, made: list[Utterance]
) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    manifest = Manifest(made, folder)
    manifest.write(folder / "one.jsonl")
    again = Manifest.read(folder / "one.jsonl")
    again.write(folder / "two.jsonl")
    assert list(again) == list(manifest)
    assert again.digest == manifest.digest
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()


def test_relative_paths_follow_the_manifest_and_absolute_ones_stay(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere" / "b.wav")
    manifest = Manifest([utterance("a"), utterance("b", audio_filepath=elsewhere)], tmp_path / "corpus")
    manifest.write(tmp_path / "manifests" / "train.jsonl")
    moved = Manifest.read(tmp_path / "manifests" / "train.jsonl")
    assert [made.audio_filepath for made in moved] == ["../corpus/wav/a.wav", elsewhere]
    assert moved.audio_path(moved[0]).resolve() == tmp_path / "corpus" / "wav" / "a.wav"


def test_the_digest_says_what_is_learnt_from_and_not_where_it_lies() -> None:
    here = Manifest([utterance("a"), utterance("b")], Path("here"))
    there = Manifest([utterance("b", audio_filepath="/x/b.wav"), utterance("a")], Path("there"))
    assert here.digest == there.digest
    assert len(here.digest) == 64
    for key, value in {"text": "NO", "duration": 2.0, "speaker": "x"}.items():
        assert Manifest([utterance("a", **{key: value}), utterance("b")], Path()).digest != here.digest


def test_a_plain_nemo_manifest_is_read(tmp_path: Path) -> None:
    path = write_line(tmp_path / "nemo.jsonl", audio_filepath="/audio/x1.wav", duration=2, text="hi", offset=0)
    assert list(Manifest.read(path)) == [Utterance("x1", "/audio/x1.wav", 2.0, "hi", "unknown")]


def test_hours_speakers_and_slices() -> None:
    manifest = Manifest(
        [utterance("c", speaker="z", duration=1800.0), utterance("a", duration=3600.0), utterance("b")],
        Path(),
    )
    assert manifest[1:].hours == pytest.approx((1800 + 1.5) / 3600)
    assert manifest.speakers == ("fash", "z")
    assert [made.id for made in manifest[:2]] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"', r"m.jsonl:2: found no valid JSON"),
        ("[1]", r"m.jsonl:2: found \[1\]. Expected a JSON object"),
        ('{"duration": 1, "text": ""}', r"m.jsonl:2: key 'audio_filepath': found no such key in \['dur"),
        ('{"audio_filepath": "", "duration": 1, "text": ""}', r":2: key 'audio_filepath': found \"\""),
        ('{"audio_filepath": "b", "duration": "1", "text": ""}', r":2: key 'duration': found \"1\""),
        ('{"audio_filepath": "b", "duration": true, "text": ""}', r":2: key 'duration': found true"),
        ('{"audio_filepath": "b", "duration": 0, "text": ""}', r":2: key 'duration': found 0.*above 0"),
        ('{"audio_filepath": "b", "duration": NaN, "text": ""}', r":2: key 'duration': found NaN"),
        ('{"audio_filepath": "b", "duration": 1, "text": 5}', r":2: key 'text': found 5. Expected a string"),
        ('{"audio_filepath": "b", "duration": 1, "text": "", "speaker": 5}', r":2: key 'speaker': found 5"),
        ('{"audio_filepath": "b", "duration": 1, "text": "", "offset": 2.5}', r":2: key 'offset': found 2.5"),
        ('{"audio_filepath": "c/a.wav", "duration": 1, "text": ""}', r":2: id 'a' stands already in line 1"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_found(tmp_path: Path, line: str, message: str) -> None:
    path = write_line(tmp_path / "m.jsonl", audio_filepath="a.wav", duration=1, text="")
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        Manifest.read(path)


def test_a_missing_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such manifest"):
        Manifest.read(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl: found bytes that are not UTF-8 at offset 10"):
        Manifest.read(tmp_path / "latin.jsonl")


def test_two_utterances_of_one_id_are_refused() -> None:
    with pytest.raises(UserError, match=r"id 'a': wav/a.wav and wav/other.wav"):
        Manifest([utterance("a"), utterance("a", audio_filepath="wav/other.wav")], Path())
