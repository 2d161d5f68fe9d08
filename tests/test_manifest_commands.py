"""`sonosco manifest ...` as it is typed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sonosco_mlflow import cli
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.text import CharacterTokenizer
from sonosco_mlflow.word_pieces import WordPieceTokenizer

RATE = 16_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recordings of 24 speakers, in which the test stands."""
    stream = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "audio" / f"s{i:02d}" / f"{i}.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, stream.normal(0, 0.1, RATE // 4 + 100 * i), RATE)
        path.with_suffix(".txt").write_text("yes no" if i % 2 else "yes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sonosco(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["sonosco", "manifest", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.fixture
def manifest(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    assert sonosco(monkeypatch, "create", "audio", "--into", "all.jsonl") == 0
    assert capsys.readouterr().out == "all.jsonl: 24 utterances, 0.00 h, 24 speakers\n"
    return folder / "all.jsonl"


def test_a_created_manifest_has_no_findings(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "validate", "all.jsonl", "--processes", "2") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "recordings: 24 of 24" in shown.err
    assert shown.err.endswith("no findings\n")


def test_findings_are_lines_and_status_1(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (manifest.parent / "audio/s03/3.wav").unlink()
    soundfile.write(manifest.parent / "audio/s05/5.wav", np.zeros(RATE), RATE)
    CharacterTokenizer.of(["yes"]).write(Path("vocabulary.json"))
    arguments = ("validate", "all.jsonl", "--vocabulary", "vocabulary.json")
    assert sonosco(monkeypatch, *arguments, "--rows-only") == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 12
    assert shown.out.splitlines()[0].startswith("all.jsonl:2: s01-1: the vocabulary lacks ' ', 'n', 'o' in 'yes no'; ")
    assert shown.err == "findings: 12 characters\n"
    assert sonosco(monkeypatch, *arguments, "--json") == 1
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert [(f["line"], f["check"]) for f in found[12:]] == [(4, "file"), (6, "duration"), (6, "silence")]
    assert shown.err.endswith("findings: 12 characters, 1 file, 1 duration, 1 silence\n")


def test_a_vocabulary_of_word_pieces_has_characters_too(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WordPieceTokenizer(["▁", *"yesno", "▁yes"], [-1.0] * 7).write(Path("vocabulary.json"))
    assert sonosco(monkeypatch, "validate", "all.jsonl", "--rows-only", "--vocabulary", "vocabulary.json") == 0
    WordPieceTokenizer(["▁", *"yesn", "▁no"], [-1.0] * 6).write(Path("vocabulary.json"))
    assert sonosco(monkeypatch, "validate", "all.jsonl", "--rows-only", "--vocabulary", "vocabulary.json") == 1


def test_split_and_merged_again_it_is_the_same(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sonosco(monkeypatch, "split", "all.jsonl", "--into", "splits", "--ratios", "dev=0.3,train=0.7") == 0
    assert sonosco(monkeypatch, "validate", "splits/dev.jsonl", "splits/train.jsonl") == 0
    assert sonosco(monkeypatch, "merge", "splits/dev.jsonl", "splits/train.jsonl", "--into", "again.jsonl") == 0
    assert Path("again.jsonl").read_bytes() == manifest.read_bytes()


def test_filter_says_what_it_dropped(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "filter", "all.jsonl", "--into", "some.jsonl", "--max-rate", "13") == 0
    assert "h: above 13 characters a second\n" in capsys.readouterr().out
    assert 0 < len(Manifest.read(Path("some.jsonl"))) < 24
    assert sonosco(monkeypatch, "filter", "all.jsonl", "--into", "all.jsonl", "--max-rate", "13") == 1
    assert "something else stands there already" in capsys.readouterr().err
    assert len(Manifest.read(manifest)) == 24


def test_stats_are_shown_and_drawn(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sonosco(monkeypatch, "stats", "all.jsonl", "--picture", "pictures/stats.png") == 0
    shown = capsys.readouterr().out
    assert "speakers    24" in shown
    assert "utterances by characters a second" in shown
    assert Path("pictures/stats.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("verb", "option", "path"), [("report", "--into", "all.jsonl"), ("stats", "--picture", "audio/s00/0.wav")]
)
def test_pages_and_pictures_take_the_place_of_nothing_else(
    manifest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    option: str,
    path: str,
) -> None:
    before = (manifest.parent / path).read_bytes()
    assert sonosco(monkeypatch, verb, "all.jsonl", option, path) == 1
    assert f"{option}: found '{path}', expected the name of a ." in capsys.readouterr().err
    assert (manifest.parent / path).read_bytes() == before


@pytest.mark.parametrize("verb", ["validate", "merge", "filter", "split", "stats", "report"])
def test_a_missing_manifest_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    into = [] if verb in ("validate", "stats") else ["--into", "x.html"]
    assert sonosco(monkeypatch, verb, "none.jsonl", *into) == 1
    error = capsys.readouterr().err
    assert "none.jsonl: there is no such manifest" in error
    assert len(error.splitlines()) == 1


class Page(HTMLParser):
    """What a browser would fetch, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        self.open.append(tag)


def test_the_report_is_one_page_with_sounds_that_needs_nothing_else(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clipped = np.ones(RATE)
    soundfile.write(manifest.parent / "audio/s05/5.wav", clipped, RATE)
    (manifest.parent / "audio/s00/0.wav").unlink()
    manifest.write_text(manifest.read_text().replace('"yes no"', '"<b>yes</b> & no"', 1) + "{}\n")
    assert sonosco(monkeypatch, "report", "all.jsonl", "--into", "pages/all.html") == 0
    text = Path("pages/all.html").read_text()
    page = Page(text)
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "data:audio/flac;base64,")) for source in page.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "&lt;b&gt;yes&lt;/b&gt; &amp; no" in text
    for kind in ("most characters a second", "fewest", "longest", "shortest", "clipped"):
        assert f"<h3>{kind}" in text
    assert "<b>4</b>findings" in text  # clipping, another duration, a file that is gone, a line that is no row
    assert "cannot be read" in text


def test_sounds_that_would_make_the_page_too_large_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 12 * RATE)
    for i in range(3):
        soundfile.write(folder / f"audio/s0{i}/{i}.wav", noise, RATE)
    assert sonosco(monkeypatch, "create", "audio", "--into", "all.jsonl") == 0
    for megabytes, complete in ((1, False), (8, True)):
        assert sonosco(monkeypatch, "report", "all.jsonl", "--into", "m.html", "--most-megabytes", str(megabytes)) == 0
        page = Path("m.html").read_text()
        assert len(page) < megabytes * 1e6
        assert ("left out: 12 s would make the page too large" not in page) == complete
        assert page.count("<audio") == 20 if complete else 0 < page.count("<audio") < 20
