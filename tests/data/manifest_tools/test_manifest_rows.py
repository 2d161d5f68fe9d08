import json
from pathlib import Path
from unittest import mock

import pytest

from sonosco_mlflow.data import columns
from sonosco_mlflow.data.manifest_tools.findings import CHECKS, Finding
from sonosco_mlflow.data.manifest_tools.rows import check_rows, numbered_rows
from sonosco_mlflow.data.utterances import Utterance
from sonosco_mlflow.errors import UserError


def row(identifier: str, **changes: object) -> str:
    entry = {
        "id": identifier,
        "audio_filepath": f"{identifier}.wav",
        "duration": 1.0,
        "text": "YES",
        "speaker": "x",
    }
    return json.dumps({**entry, **changes}) + "\n"


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    return path


def found(*paths: Path, characters: str | None = None) -> list[tuple[str, int, str, str]]:
    findings = list(check_rows(paths, None if characters is None else frozenset(characters)))
    assert {finding.check for finding in findings} <= CHECKS.keys()
    return [(Path(f.manifest).name, f.line, f.id, f.check) for f in findings]


def test_a_manifest_that_is_right_has_no_findings(tmp_path: Path) -> None:
    assert found(write(tmp_path / "m.jsonl", row("a"), row("b")), characters="YES") == []


def test_everything_is_found_and_nothing_stops_at_the_first(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl",
        row("a"),
        row("b", text=" \t"),
        "{\n",
        row("c", text="YÖS"),
        "\n",
        row("a", audio_filepath="d.wav"),
        row("e", audio_filepath="./a.wav"),
        row("f", duration=0),
        row("g", text="NO", audio_filepath=str(tmp_path / "b.wav")),
    )
    assert found(path, characters="YES \t") == [
        ("m.jsonl", 2, "b", "text"),
        ("m.jsonl", 3, "", "row"),
        ("m.jsonl", 4, "c", "characters"),
        ("m.jsonl", 6, "a", "id"),
        ("m.jsonl", 7, "e", "same-audio"),
        ("m.jsonl", 8, "", "row"),
        ("m.jsonl", 9, "g", "characters"),
        ("m.jsonl", 9, "g", "same-audio"),
    ]


def test_splits_share_no_id_recording_or_known_speaker(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row("a"), row("b", speaker="y"), row("c", speaker="unknown"))
    empty = write(tmp_path / "empty.jsonl", "\n\n")
    dev = write(
        tmp_path / "lists" / "dev.jsonl",
        row("d"),
        row("e"),
        row("b", audio_filepath="../c.wav", speaker="z"),
        row("f", speaker="unknown"),
    )
    findings = list(check_rows([train, empty, dev]))
    assert [(finding.line, finding.id, finding.check) for finding in findings] == [
        (1, "d", "speaker"),
        (3, "b", "id"),
        (3, "b", "same-audio"),
    ]
    assert findings[0].found == f"the speaker 'x' stands in {train}, too"
    assert findings[1].found == f"the id stands already in {train}:2"
    assert findings[2].found.endswith(f"{train}:3")
    more = write(tmp_path / "more.jsonl", row("g", speaker="w"), row("e", speaker="w", audio_filepath="g.wav"))
    found_in_more = [finding.found for finding in check_rows([train, empty, dev, more])][3:]
    assert found_in_more == [f"the id stands already in {dev}:2", f"g.wav stands already in {more}:1"]


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_lines_are_counted_as_ever_whatever_stands_in_them(tmp_path: Path, block: int) -> None:
    content = ["\ufeff" + row("a"), row("b").replace("\n", "\r\n"), "\n", row("c").replace("\n", "\r"), "[]\n"]
    content += [row("d"), row("e", text="\ud800"), row("f"), row("g").rstrip()]
    path = tmp_path / "m.jsonl"
    path.write_bytes("".join(content).encode() + b' \n{"text": "\xff"}\n' + row("h").encode())
    with mock.patch.object(columns, "_BLOCK", block):
        rows = list(numbered_rows(path))
    assert [(line, made.id if isinstance(made, Utterance) else made) for line, made in rows] == [
        (1, "a"),
        (2, "b"),
        (4, "c"),
        (5, "found []. Expected a JSON object"),
        (6, "d"),
        (7, "key 'text': found the escape of half a character, which no text can hold. Write it out"),
        (8, "f"),
        (9, "g"),
        (10, "found bytes that are not UTF-8"),
        (11, "h"),
    ]


@pytest.mark.parametrize("block", [100, 500, 1 << 24])
def test_lines_are_counted_from_block_to_block(tmp_path: Path, block: int) -> None:
    path = write(tmp_path / "m.jsonl", *(row(f"{i:03d}") for i in range(100)))
    with mock.patch.object(columns, "_BLOCK", block):
        assert [line for line, _ in numbered_rows(path)] == list(range(1, 101))


def test_a_line_can_always_be_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", row("a", duration="\ud800"))
    (finding,) = check_rows([path])
    assert "\\ud800" in str(finding).encode().decode()


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such manifest"):
        list(check_rows([tmp_path / "none.jsonl"]))


def test_a_finding_says_where_what_and_what_to_do() -> None:
    finding = Finding("m.jsonl", 3, "a", "text", "the text is empty")
    assert str(finding) == "m.jsonl:3: a: the text is empty; write what is said, or take the row out"
    assert json.loads(finding.to_json()) == {
        "manifest": "m.jsonl",
        "line": 3,
        "id": "a",
        "check": "text",
        "found": "the text is empty",
        "mend": "write what is said, or take the row out",
    }


def test_what_is_too_short_for_any_word_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", row("a", duration=0.049), row("b", duration=0.05))
    assert [(finding.line, finding.check) for finding in check_rows([path])] == [(1, "short")]
