import hashlib
from pathlib import Path

import pytest
from file_server import FileServer
from tiny import contents, sound, tar, unpack

from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError

ROOT = "cv-corpus-17.0-2024-03-15/cy"
COLUMNS = ("client_id", "path", "sentence_id", "sentence", "up_votes", "locale")
CLIPS = {"train": range(12), "dev": range(20, 22), "test": range(30, 33), "other": range(40, 42)}


def name(number: int) -> str:
    return f"common_voice_cy_{number}"


def table(numbers: range, suffix: str = ".mp3", text: str = 'Dwedodd "na"  wrth') -> bytes:
    rows = [COLUMNS] + [(f"speaker{n // 2}", name(n) + suffix, "0", f"{text} {n}", "2", "cy") for n in numbers]
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def layout(kind: str = "mp3", suffix: str = ".mp3") -> dict[str, bytes]:
    files = {f"{ROOT}/{part}.tsv": table(numbers, suffix) for part, numbers in CLIPS.items()}
    clips = {n for numbers in CLIPS.values() for n in numbers} | {99}
    return files | {f"{ROOT}/clips/{name(n)}.{kind}": sound(kind, 0.2, seed=n) for n in sorted(clips)}


def sizes(manifests: dict[str, Manifest]) -> dict[str, int]:
    return {split: len(manifest) for split, manifest in manifests.items()}


@pytest.mark.parametrize(("kind", "suffix"), [("mp3", ".mp3"), ("opus", ""), ("mp3", "")])
def test_clips_keep_their_bytes_from_an_archive(tmp_path: Path, kind: str, suffix: str) -> None:
    (tmp_path / "cy.tar.gz").write_bytes(tar(layout(kind, suffix)))
    manifests = bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"))
    assert sizes(manifests) == {"train": 12, "dev": 2, "test": 3}
    expected = Utterance(name(0), f"wav/{name(0)}.{kind}", 0.2, 'Dwedodd "na" wrth 0', "speaker0")
    assert manifests["train"][0] == expected
    assert (tmp_path / "out" / "wav" / f"{name(0)}.{kind}").read_bytes() == sound(kind, 0.2, seed=0)
    assert not (tmp_path / "out" / "wav" / f"{name(99)}.{kind}").exists()


def test_an_unpacked_folder_stays_where_it_is(tmp_path: Path) -> None:
    source = unpack(layout(), tmp_path / "source")
    manifests = bring_corpus("common-voice", tmp_path / "out", str(source / ROOT))
    assert manifests["dev"][0].audio_filepath == str(source / ROOT / "clips" / f"{name(20)}.mp3")
    assert not (tmp_path / "out" / "wav").exists()


def test_its_parts_are_its_tables(tmp_path: Path) -> None:
    (tmp_path / "cy.tar.gz").write_bytes(tar(layout()))
    parts = {"train": ["train", "other"], "dev": ["dev"], "test": ["test"]}
    manifests = bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"), parts)
    assert sizes(manifests) == {"train": 14, "dev": 2, "test": 3}
    with pytest.raises(UserError, match=r"data\.parts: \S+cy\.tar\.gz has no validated\.tsv\. Expected"):
        bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"), {"train": ["validated"]})


def test_splits_that_are_absent_are_cut(tmp_path: Path) -> None:
    source = unpack({name: content for name, content in layout().items() if "dev.tsv" not in name}, tmp_path / "source")
    manifests = bring_corpus("common-voice", tmp_path / "out", str(source))
    assert (len(manifests["test"]), len(manifests["train"]) + len(manifests["dev"])) == (3, 12)


def test_it_is_downloaded_with_a_digest(tmp_path: Path, server: FileServer) -> None:
    server.files["/cy.tar.gz"] = archive = tar(layout())
    server.faults.cut = 1
    source = server.address(f"/cy.tar.gz#md5={hashlib.md5(archive).hexdigest()}")
    assert sizes(bring_corpus("common-voice", tmp_path / "out", source))["train"] == 12
    with pytest.raises(UserError, match=r"Common Voice needs one: the archive of a language"):
        bring_corpus("common-voice", tmp_path / "out")


def test_an_empty_clip_of_an_archive_is_left_out_and_one_of_a_folder_refused(tmp_path: Path) -> None:
    files = layout() | {f"{ROOT}/clips/{name(3)}.mp3": b""}
    (tmp_path / "cy.tar.gz").write_bytes(tar(files))
    assert len(bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"))["train"]) == 11
    assert (tmp_path / "out" / "left-out.txt").read_text() == f"{name(3)}: is empty, or cannot be read as audio\n"
    unpack(files, tmp_path / "source")
    with pytest.raises(UserError, match=rf"of no use: \S+{name(3)}\.mp3 is empty or cannot be read as audio\. Mend"):
        bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "source"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"{ROOT}/train.tsv": table(range(60, 62))}, rf"not in clips/: {name(60)}, {name(61)}\. Fetch it anew"),
        (
            {f"{ROOT}/train.tsv": b"a\tb\n"},
            r"train\.tsv:1: found the columns \['a', 'b'\]\. Expected client_id, path, sen",
        ),
        ({f"{ROOT}/train.tsv": table(range(1)) + b"x\ty\n"}, r"train\.tsv:3: found 'x\\ty'\. Expected 6 columns"),
        ({f"{ROOT}/train.tsv": table(range(1))[:-6]}, r"train\.tsv:2: found .* Expected 6 columns"),
        ({f"{ROOT}/train.tsv": table(range(1), "/../x")}, r"train\.tsv:2: found "),
        ({f"{ROOT}/train.tsv": table(range(1), text="").replace(b" 0\t2", b"\t2")}, r"0\.mp3 has an empty text"),
        ({"cv-corpus-17.0-2024-03-15/de/train.tsv": table(range(1))}, r"has train\.tsv in \S+/cy/ and in \S+/de/"),
        ({f"{ROOT}/dev.tsv": table(range(1))}, r"these ids stand in train and in dev"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "cy.tar.gz").write_bytes(tar(layout() | files))
    with pytest.raises(UserError, match=message):
        bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"))
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".jsonl")]


def test_an_archive_that_is_cut_off_after_its_tables_is_no_corpus(tmp_path: Path) -> None:
    whole = tar(layout())
    (tmp_path / "cy.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cy\.tar\.gz: cannot be read as a tar archive"):
        bring_corpus("common-voice", tmp_path / "out", str(tmp_path / "cy.tar.gz"))
