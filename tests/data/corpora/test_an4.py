import hashlib
import io
import os
import subprocess
import sys
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from file_server import FileServer

from sonosco_mlflow.data.corpora import an4, bring_corpus
from sonosco_mlflow.data.corpora.base import Request
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "corpora" / "an4.tar.gz"
SOURCES = Path(an4.__file__).parents[3]
SAMPLES = np.arange(-800, 800, dtype=np.int16)
SPEAKERS = tuple("abcdefghijklmn")  # held out: the fifth and the fourteenth


def encoded(kind: str) -> bytes:
    if kind == "raw":
        return SAMPLES.astype(">i2").tobytes()
    buffer = io.BytesIO()
    soundfile.write(buffer, SAMPLES, 16_000, subtype="PCM_16", format="NIST" if kind == "sph" else "WAV")
    return buffer.getvalue()


def layout(kind: str = "wav") -> dict[str, bytes]:
    """An4's layout in small: 14 training speakers and one for testing, two utterances each."""
    train = [f"an4_clstk/{speaker}/an{n}-{speaker}" for speaker in SPEAKERS for n in (1, 2)]
    test = [f"an4test_clstk/z/an{n}-z" for n in (1, 2)]
    stems = {"train": [name.split("/")[-1] for name in train], "test": [name.split("/")[-1] for name in test]}
    files = {
        "an4/etc/an4_train.fileids": "\n".join(train),
        "an4/etc/an4_test.fileids": "\n".join(test),
        "an4/etc/an4_train.transcription": "\n".join(f"<s> YES  NO </s> ({stem})" for stem in stems["train"]),
        "an4/etc/an4_test.transcription": "\n".join(f"RUBOUT G ({stem})" for stem in stems["test"]),
    }
    return {name: text.encode() for name, text in files.items()} | {
        f"an4/wav/{name}.{kind}": encoded(kind) for name in train + test
    }


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read(source: Path, directory: Path, counts: dict[str, int] | None = None) -> dict[str, Manifest]:
    request = Request(directory, None, None, 1, lambda done, everything: None)
    return {split: Manifest(found, directory) for split, found in an4._read(source, request, counts).splits.items()}


@pytest.mark.parametrize("kind", ["wav", "sph", "raw"])
def test_every_kind_of_recording_becomes_the_same_wave(tmp_path: Path, kind: str) -> None:
    manifests = read(archive(tmp_path / "an4.tar.gz", layout(kind)), tmp_path)
    assert {split: len(manifest) for split, manifest in manifests.items()} == {
        "train": 24,
        "dev": 4,
        "test": 2,
    }
    assert manifests["dev"].speakers == ("e", "n")
    first = manifests["test"][0]
    assert (first.id, first.text, first.speaker, first.duration) == ("an1-z", "RUBOUT G", "z", 0.1)
    assert manifests["train"][0].text == "YES NO"
    with wave.open(str(tmp_path / "wav" / "z" / "an1-z.wav")) as file:
        assert file.getframerate() == 16_000
        assert file.readframes(1600) == SAMPLES.astype("<i2").tobytes()


def test_wave_files_keep_their_bytes_and_a_folder_is_an_archive(tmp_path: Path) -> None:
    for name, content in layout().items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    from_folder = read(tmp_path / "source", tmp_path / "a")
    from_inside = read(tmp_path / "source" / "an4", tmp_path / "b")
    assert [*from_folder["train"]] == [*from_inside["train"]]
    assert (tmp_path / "a" / "wav" / "z" / "an1-z.wav").read_bytes() == encoded("wav")


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    files = layout()
    files["an4/etc/an4_test.fileids"] = b"an4test_clstk/../../../escaped"
    with pytest.raises(UserError, match=r"found 'an4test_clstk/\.\./\.\./\.\./escaped'"):
        read(archive(tmp_path / "an4.tar.gz", files), tmp_path)


def test_members_that_no_list_names_are_not_written(tmp_path: Path) -> None:
    files = layout() | {"../escaped.wav": b"", "an4/wav/../../escaped.wav": b"", "an4/wav/x/y.wav": b""}
    (tmp_path / "out").mkdir()
    read(archive(tmp_path / "an4.tar.gz", files), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["an4.tar.gz", "out"]
    assert not (tmp_path / "out" / "wav" / "x").exists()


def without(name: str) -> dict[str, bytes]:
    return {other: content for other, content in layout().items() if other != name}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (without("an4/etc/an4_test.fileids"), r"found no etc/an4_test\.fileids"),
        (without("an4/wav/an4_clstk/a/an1-a.wav"), r"no recording .* for an4_clstk/a/an1-a"),
        (layout() | {"an4/etc/an4_test.transcription": b"G (an1-z)"}, "has no text for 'an2-z'"),
        (
            layout() | {"an4/etc/an4_test.transcription": b"G an1-z"},
            r"an4_test\.transcription:1: found 'G an1-z'",
        ),
        (layout("sph") | {"an4/wav/an4_clstk/a/an1-a.sph": b"x"}, r"an1-a\.sph: cannot be read as audio"),
    ],
)
def test_what_is_missing_or_broken_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(archive(tmp_path / "an4.tar.gz", files), tmp_path)


def test_a_part_of_an4_is_not_an4(tmp_path: Path) -> None:
    small = archive(tmp_path / "an4.tar.gz", layout())
    with pytest.raises(UserError, match=r"names 28 utterances\. Expected 948"):
        bring_corpus("an4", tmp_path / "corpus", source=str(small))
    assert not list((tmp_path / "corpus").glob("*.jsonl"))


@pytest.mark.parametrize("length", [0, 100, 1000])
def test_a_broken_archive_is_named(tmp_path: Path, length: int) -> None:
    whole = archive(tmp_path / "whole.tar.gz", layout()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"cut\.tar\.gz: cannot be read as a tar archive"):
        read(tmp_path / "cut.tar.gz", tmp_path)
    with pytest.raises(UserError, match=r"none\.tar\.gz is not there"):
        read(tmp_path / "none.tar.gz", tmp_path)


def test_a_kill_leaves_no_corpus_and_the_next_call_makes_it(tmp_path: Path) -> None:
    source = archive(tmp_path / "an4.tar.gz", layout())
    code = (
        "import pathlib, sys, os, signal\n"
        "from sonosco_mlflow.data.corpora import an4, bring_corpus\n"
        "an4._COUNTS = None\n"
        "kill = lambda done, everything: done == 7 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "progress = kill if sys.argv[1] == 'kill' else None\n"
        "bring_corpus('an4', pathlib.Path(sys.argv[2]), source=sys.argv[3], progress=progress)\n"
    )

    def bring(mode: str, name: str) -> int:
        command = [sys.executable, "-c", code, mode, str(tmp_path / name), str(source)]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SOURCES)}, check=False).returncode

    assert bring("kill", "corpus") == -9
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["wav"]
    assert bring("finish", "corpus") == 0
    assert bring("finish", "whole") == 0
    contents = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("corpus", "whole")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 33


@pytest.fixture
def address(tmp_path: Path, server: FileServer) -> str:
    server.files["/an4.tar.gz"] = archive(tmp_path / "an4.tar.gz", layout("sph")).read_bytes()
    return server.address("/an4.tar.gz")


def test_a_download_with_its_digest_is_a_corpus_and_is_kept(tmp_path: Path, address: str, server: FileServer) -> None:
    server.faults.cut = 2
    source = f"{address}#sha256={hashlib.sha256(server.files['/an4.tar.gz']).hexdigest()}"
    manifests = bring_corpus("an4", tmp_path / "corpus", source=source)
    assert {split: len(manifest) for split, manifest in manifests.items()} == {
        "train": 24,
        "dev": 4,
        "test": 2,
    }
    assert server.ranges == [None, "bytes=500-", "bytes=1000-"]
    bring_corpus("an4", tmp_path / "again", source=source)
    assert len(server.asked) == 3


def test_without_a_digest_the_number_of_utterances_is_checked(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"Expected 948"):
        bring_corpus("an4", tmp_path / "corpus", source=address)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://127.0.0.1/an4.tar.gz", "Expected an http or https address"),
        ("{address}.nothing", "answered 404"),
    ],
)
def test_an_address_that_cannot_be_is_named(tmp_path: Path, address: str, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bring_corpus("an4", tmp_path / "corpus", source=source.format(address=address))


@pytest.mark.corpora
@pytest.mark.skipif(not SHARED.is_file(), reason="no ../shared/corpora/an4.tar.gz beside this checkout")
def test_the_whole_of_an4(tmp_path: Path) -> None:
    manifests = bring_corpus("an4", tmp_path, source=str(SHARED))
    assert {split: (len(manifest), len(manifest.speakers)) for split, manifest in manifests.items()} == {
        "train": (848, 66),
        "dev": (100, 8),
        "test": (130, 10),
    }
    assert sum(manifest.hours for manifest in manifests.values()) == pytest.approx(0.8, abs=0.05)
    assert sum(len(utterance.text.split()) for utterance in manifests["test"]) == 773
