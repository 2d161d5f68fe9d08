import hashlib
from pathlib import Path

import pytest
from file_server import FileServer
from tiny import contents, sound, tar, unpack, zipped

from sonosco_mlflow.data.corpora import bring_corpus, librispeech
from sonosco_mlflow.data.corpora.librispeech import _Release
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError

PARTS = {"train": ["tiny-train"], "dev": ["tiny-dev"], "test": ["tiny-test"]}


def part(name: str, speakers: int = 2, utterances: int = 2) -> dict[str, bytes]:
    """A part's files as they are published: two chapters a speaker, of as many utterances each."""
    first = {"tiny-train": 100, "tiny-dev": 200, "tiny-test": 300}.get(name, 400)
    files = {"LibriSpeech/README.TXT": b"about", f"LibriSpeech/{name}/notes.txt": b"more"}
    for speaker in range(first, first + speakers):
        for chapter in (7, 8):
            folder, stem = f"LibriSpeech/{name}/{speaker}/{chapter}", f"{speaker}-{chapter}"
            ids = [f"{stem}-{number:04}" for number in range(utterances)]
            files |= {f"{folder}/{i}.flac": sound("flac", 0.1, seed=speaker + chapter) for i in ids}
            files[f"{folder}/{stem}.trans.txt"] = "".join(f"{i} DO YOU  HEAR\n" for i in ids).encode()
    return files


ARCHIVES = {name: tar(part(name)) for name in ("tiny-train", "tiny-dev", "tiny-test")}


def sizes(manifests: dict[str, Manifest]) -> dict[str, int]:
    return {split: len(manifest) for split, manifest in manifests.items()}


def test_archives_in_a_folder_become_recordings_with_their_own_bytes(tmp_path: Path) -> None:
    unpack({f"{name}.tar.gz": content for name, content in ARCHIVES.items()}, tmp_path / "archives")
    manifests = bring_corpus("librispeech", tmp_path / "corpus", str(tmp_path / "archives"), PARTS)
    assert sizes(manifests) == {"train": 8, "dev": 8, "test": 8}
    assert manifests["train"][0] == Utterance("100-7-0000", "wav/100/100-7-0000.flac", 0.1, "DO YOU HEAR", "100")
    assert manifests["train"].speakers == ("100", "101")
    made = (tmp_path / "corpus" / "wav" / "100" / "100-7-0000.flac").read_bytes()
    assert made == sound("flac", 0.1, seed=107)


@pytest.mark.parametrize("place", [".", "LibriSpeech"])
def test_an_unpacked_folder_stays_where_it_is(tmp_path: Path, place: str) -> None:
    source = unpack({**part("tiny-train"), **part("tiny-dev"), **part("tiny-test")}, tmp_path / "source") / place
    manifests = bring_corpus("librispeech", tmp_path / "corpus", str(source), PARTS)
    path = tmp_path / "source" / "LibriSpeech" / "tiny-train" / "100" / "7" / "100-7-0000.flac"
    assert manifests["train"][0] == Utterance("100-7-0000", str(path), 0.1, "DO YOU HEAR", "100")
    assert not (tmp_path / "corpus" / "wav").exists()


def test_some_parts_may_be_packed_and_others_not(tmp_path: Path) -> None:
    source = unpack({**part("tiny-dev"), **part("tiny-train")}, tmp_path / "source")
    (source / "tiny-train.zip").write_bytes(zipped(part("tiny-train")))
    manifests = bring_corpus(
        "librispeech", tmp_path / "corpus", str(source), {"train": ["tiny-train"], "dev": ["tiny-dev"]}
    )
    assert manifests["train"][0].audio_filepath.startswith("wav/")
    assert manifests["dev"][0].audio_filepath.startswith("/")


def test_a_split_without_parts_is_cut_by_speaker(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(part("tiny-train", speakers=20), "w"))
    manifests = bring_corpus("librispeech", tmp_path / "corpus", str(tmp_path / "x.tar"), {"train": ["tiny-train"]})
    speakers = [set(manifest.speakers) for manifest in manifests.values()]
    assert all(speakers)
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20


def test_the_parts_are_downloaded_by_their_digests(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/12/{name}.tar.gz": content for name, content in ARCHIVES.items()}
    releases = {
        name: _Release(server.address("/12/"), f"md5={hashlib.md5(content).hexdigest()}", 8)
        for name, content in ARCHIVES.items()
    }
    monkeypatch.setattr(librispeech, "_RELEASES", releases)
    monkeypatch.setattr(librispeech, "_OWN_CHOICE", PARTS)
    server.faults.cut = 3
    assert sizes(bring_corpus("librispeech", tmp_path / "corpus")) == {"train": 8, "dev": 8, "test": 8}
    mirrored = bring_corpus("librispeech", tmp_path / "mirrored", server.address("/12/"), PARTS)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "mirrored")
    assert sizes(mirrored) == {"train": 8, "dev": 8, "test": 8}
    server.files["/12/tiny-dev.tar.gz"] = tar(part("tiny-dev", speakers=3))
    for path in (tmp_path / "cache" / "sonosco-mlflow").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"tiny-dev\.tar\.gz#md5=\w+: the md5 of what arrived"):
        bring_corpus("librispeech", tmp_path / "corpus")
    assert not list((tmp_path / "corpus").glob("*.jsonl"))


@pytest.mark.parametrize("fault", ["short", "corrupt", "empty"])
def test_a_damaged_archive_from_a_mirror_is_no_corpus(tmp_path: Path, server: FileServer, fault: str) -> None:
    content = bytearray(ARCHIVES["tiny-train"])
    if fault == "corrupt":
        content[len(content) // 2] ^= 8
    server.files["/tiny-train.tar.gz"] = bytes(content) if fault != "empty" else b""
    server.faults.length_error = -100 if fault == "short" else 0
    with pytest.raises(UserError, match=r"tiny-train\.tar\.gz: cannot be read as a tar archive .* delete it"):
        bring_corpus("librispeech", tmp_path / "corpus", server.address("/"), {"train": ["tiny-train"]})
    assert not list((tmp_path / "corpus").glob("*.jsonl"))


def test_a_published_part_must_be_whole(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(part("dev-clean-2"), "w"))
    with pytest.raises(UserError, match=r"dev-clean-2 has 8 utterances\. Expected 1089: this is not the whole part"):
        bring_corpus("librispeech", tmp_path / "corpus", str(tmp_path / "x.tar"), {"train": ["dev-clean-2"]})


def without(name: str) -> dict[str, bytes]:
    return {other: content for other, content in part("tiny-train").items() if not other.endswith(name)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (without("100-7-0001.flac"), r"these utterances of tiny-train are without a recording: 100-7-0001\."),
        (without("100-7.trans.txt"), r"these utterances of tiny-train are without a text: 100-7-0000, 100-7-0001\."),
        (
            part("tiny-train") | {"LibriSpeech/tiny-train/100/7/100-7.trans.txt": b"100-7-0000\n"},
            r"100-7\.trans\.txt:1: found '100-7-0000'\. Expected an id and what is said",
        ),
        (part("tiny-dev"), r"has no part 'tiny-train'\. Expected tiny-train/<speaker>/"),
        (
            part("tiny-train") | {"again/tiny-train/100/7/100-7-0000.flac": b""},
            r"again/\S+ is the second recording of '100-7-0000'",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "x.tar.gz").write_bytes(tar(files))
    with pytest.raises(UserError, match=message):
        bring_corpus("librispeech", tmp_path / "corpus", str(tmp_path / "x.tar.gz"), {"train": ["tiny-train"]})
    assert not list((tmp_path / "corpus").glob("*.jsonl"))


def test_nothing_of_a_hostile_archive_leaves_the_corpus(tmp_path: Path) -> None:
    hostile = {
        f"{start}LibriSpeech/tiny-train/100/7/100-7-0009.flac": b"x"
        for start in ("../", "/", "/etc/", "LibriSpeech/../../")
    }
    hostile |= {
        "LibriSpeech/tiny-train/../../../9/7/9-7-0009.flac": b"x",
        "LibriSpeech/tiny-train/1/../1-..-0009.flac": b"x",
    }
    (tmp_path / "x.tar").write_bytes(tar(part("tiny-train") | hostile, "w"))
    before = contents(tmp_path).keys()
    with pytest.raises(UserError, match=r"second recording|without a text"):
        bring_corpus("librispeech", tmp_path / "corpus", str(tmp_path / "x.tar"), {"train": ["tiny-train"]})
    assert all(name.startswith("corpus/wav/") for name in contents(tmp_path).keys() - before)


def test_an_unknown_part_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.parts: found 'train-clean-50'.*did you mean 'train-clean-5'"):
        bring_corpus("librispeech", tmp_path / "corpus", parts={"train": ["train-clean-50"]})
