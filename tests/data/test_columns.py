"""The quick way into a long manifest says what the exact one says, of whatever stands there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sonosco_mlflow.data import columns as columns_module
from sonosco_mlflow.data import manifest as manifest_module
from sonosco_mlflow.data.columns import read_columns
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError


def read_exactly(path: Path) -> Manifest:
    with mock.patch.object(manifest_module, "read_columns", return_value=None):
        return Manifest.read(path)


def outcome(path: Path, read: Callable[[Path], Manifest]) -> object:
    """What reading comes to: the rows and all that is derived from them, or the message."""
    try:
        manifest = read(path)
    except UserError as error:
        return str(error)
    rows = list(manifest)
    assert [manifest[i] for i in range(len(manifest))] == rows
    try:
        with mock.patch("os.fsync"):
            manifest.write(path.with_name("again.jsonl"))
        derived: object = (manifest.digest, path.with_name("again.jsonl").read_bytes(), manifest.hours)
    except (UnicodeEncodeError, OverflowError) as error:
        derived = type(error)
    return rows, list(map(repr, rows)), derived, manifest.speakers


def assert_the_same(folder: Path, content: bytes, block: int = 1 << 24) -> object:
    path = folder / "m.jsonl"
    path.write_bytes(content)
    with mock.patch.object(columns_module, "_BLOCK", block):
        quick = outcome(path, Manifest.read)
    assert quick == outcome(path, read_exactly)
    return quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("columns")


whole = st.characters(exclude_categories=("Cs",))
entries = st.fixed_dictionaries(
    {
        "id": st.text(whole, min_size=1, max_size=4),
        "audio_filepath": st.text(whole, min_size=1, max_size=8),
        "duration": st.one_of(
            st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.integers(1, 10**30), st.just(5e-324)
        ),
        "text": st.text(whole, max_size=8),
        "speaker": st.text(whole, min_size=1, max_size=4),
    },
    optional={"offset": st.sampled_from([0, 0.0, None]), "more": st.recursive(st.none() | st.text(whole), st.lists)},
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(entries, st.booleans(), st.booleans()), min_size=1, max_size=6, unique_by=lambda e: e[0]["id"]),
    st.booleans(),
    st.sampled_from([1, 50, 1 << 24]),
)
def test_regular_lines_are_read_quickly_and_alike(
    folder: Path, made: list[tuple[dict[str, object], bool, bool]], ends: bool, block: int
) -> None:
    lines = [
        json.dumps(entry, ensure_ascii=ascii_only, separators=(",", ":") if tight else None)
        for entry, ascii_only, tight in made
    ]
    content = ("\n".join(lines) + ("\n" if ends else "")).encode()
    assert isinstance(assert_the_same(folder, content, block), tuple)
    assert read_columns(folder / "m.jsonl") is not None


tokens = st.one_of(
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "1" * 400, "1" * 5000, "01", "1.", ".5", "+1", "true", "null"]),
    st.text(max_size=4).map(json.dumps),
    st.sampled_from(
        [
            *('"\\ud800"', '"\\udc00"', '"\\ud83d\\ude00"', '"\\ude00\\ud83d"', '"\\u0000"', '"\\x"', '"\t"', '"\x7f"'),
            *("", "[]", "{}"),
            *('"a\nb"', '"}\n{"', "{\n}", '{"id": 1}', '[{"id": 1}]', '"\ufeff"', '"\u2028"', '"unterminated'),
        ]
    ),
)
keys = st.sampled_from(
    ['"id"', '"audio_filepath"', '"duration"', '"text"', '"speaker"', '"offset"', '"i\\u0064"', '"more"', '"Id"', '""']
)
good = '{"id": "%s", "audio_filepath": "a", "duration": 1, "text": "", "speaker": "x"}'
lines = st.one_of(
    st.sampled_from("abcdefgh").map(lambda name: good % name),
    st.sampled_from("abcdefgh").map(lambda name: good.replace(", ", ",\n") % name),
    st.sampled_from("abcdefgh").map(lambda name: good.replace(", ", ",\r") % name),
    st.lists(st.tuples(keys, tokens), max_size=7).map(
        lambda pairs: "{" + ", ".join(f"{key}: {token}" for key, token in pairs) + "}"
    ),
    st.tuples(tokens, keys).map(
        lambda odd: (good % "o")[:-1] + f", {odd[1]}: {odd[0]}" + "}",
    ),
    tokens,
    st.sampled_from(
        ["", " ", "\t", "\x0b", "\u00a0", "[1]", "{", "}", (good % "k") * 2, (good % "k") + " " + (good % "l")]
    ),
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(lines, max_size=6),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n"]),
    st.booleans(),
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff"]),
    st.sampled_from([1, 60, 1 << 24]),
)
@example([good % "a", good % "b"], "\n", True, b"", 1 << 24)
@example([good.replace(", ", ",\r") % "a"], "\n", True, b"", 1 << 24)
@example([(good % "a").replace(": 1", ": 0")], "\n", True, b"", 1 << 24)
@example([(good % "a").replace(": 1", ": true")], "\n", True, b"", 1 << 24)
@example([(good % "a").replace(": 1", ": 1e400")], "\n", True, b"", 1 << 24)
@example([(good % "a").replace(": 1", ": " + "1" * 400)], "\n", True, b"", 1 << 24)
@example([(good % "a")[:-1] + ', "offset": 1.5}'], "\n", True, b"", 1 << 24)
@example([good % "b", good % "a"], "\n", True, b"", 1 << 24)
@example([good % "a", good % "a"], "\n", True, b"", 1)
@example([good % "a", (good % "b") * 2, "", good % "d"], "\n", True, b"", 1 << 24)
@example([(good % "a") + (good % "b"), '{"id":', (good % "c")[7:]], "\n", True, b"", 1 << 24)
def test_any_lines_are_read_alike_or_refused_in_the_same_words(
    folder: Path, made: list[str], end: str, ends: bool, before: bytes, block: int
) -> None:
    text = end.join(made) + (end if ends else "")
    assert_the_same(folder, before + text.encode("utf-8", "surrogatepass"), block)


def written(path: Path, count: int) -> Path:
    utterances = [Utterance(f"{i:04d}", f"wav/{i}.wav", 1 + i / 7, f"N {i}", f"s{i % 9}") for i in range(count)]
    Manifest(utterances, path.parent).write(path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Manifest, Manifest]:
    """A manifest of columns, and the same of objects."""
    path = written(tmp_path / "m.jsonl", 5000)
    quick, exact = Manifest.read(path), read_exactly(path)
    assert type(quick._utterances) is not type(exact._utterances)
    return quick, exact


def test_rows_and_slices_are_those_of_objects(pair: tuple[Manifest, Manifest]) -> None:
    quick, exact = pair
    assert list(quick) == list(exact)
    for index in (0, 17, 4999, -1, -5000):
        assert quick[index] == exact[index]
    for index in (5000, -5001):
        with pytest.raises(IndexError):
            quick[index]
    for chosen in (slice(3), slice(4990, None), slice(None, None, 7), slice(None, None, -1), slice(10, 5)):
        assert list(quick[chosen]) == list(exact[chosen])
        assert quick[chosen].digest == exact[chosen].digest
    assert list(quick._values("text")) == list(exact._values("text"))
    assert exact[3] in quick
    assert list(reversed(quick)) == list(reversed(exact))


def test_an_irregular_line_far_down_is_named_as_ever(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", 60_000)
    with path.open("a") as file:
        file.write('{"id": "0007", "audio_filepath": "x", "duration": 1, "text": "", "speaker": "x"}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:60001: id '0007' stands already in line 8"):
        Manifest.read(path)


@pytest.mark.parametrize("number", ["1" * 400, "1" * 5000])
def test_a_number_that_no_float_holds_is_named(tmp_path: Path, number: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"audio_filepath": "a", "duration": {number}, "text": ""}}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:1: (key 'duration': found 111|found no valid JSON)"):
        Manifest.read(path)


parts = st.sampled_from(["a", "b", "c d", "..", ".", "", "a.wav"])
folders = st.lists(st.sampled_from(["a", "b", ".."]), max_size=4).map("/".join)


@settings(max_examples=500)
@given(folders, folders, st.lists(parts, min_size=1, max_size=5).map("/".join), st.booleans())
@example("", "a", "a/b.wav", True)
@example("a", "a", "/b.wav", False)
def test_audio_paths_are_expressed_as_the_library_does(root: str, folder: str, audio: str, absolute: bool) -> None:
    origin = Path("/top/" + root if absolute else root)
    target = Path("/top/" + folder if absolute else folder)
    expected = audio if audio.startswith("/") else Path(os.path.relpath(origin / audio, target)).as_posix()
    assert manifest_module._from_folder(origin, target)(audio) == expected
