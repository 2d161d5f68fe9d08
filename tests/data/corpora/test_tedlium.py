import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from file_server import FileServer
from tiny import contents, samples, sound, tar, unpack

from sonosco_mlflow.data.corpora import bring_corpus, tedlium
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError

ROOT = "TEDLIUM_release-3"


def stm(talk: str) -> bytes:
    return (
        f";; a comment\n"
        f"{talk} 1 {talk.partition('_')[0]} 0.10 0.30 <o,f0,male> and it 's\t <unk> there\n"
        f"{talk} 1 inter_segment_gap 0.30 0.50 <o,,unknown> ignore_time_segment_in_scoring\n"
        f"{talk} 1 {talk.partition('_')[0]} 0.50 1.04 <NA> thank you\n"
    ).encode()


def talk(folder: str, name: str, seed: int) -> dict[str, bytes]:
    return {f"{folder}/stm/{name}.stm": stm(name), f"{folder}/sph/{name}.sph": sound("sph", 1.0, seed)}


def layout(talks: int = 3) -> dict[str, bytes]:
    """The third release in small."""
    files = {f"{ROOT}/README": b"about"}
    for number in range(talks):
        files |= talk(f"{ROOT}/data", f"Speaker{number}_2010", number)
    files |= talk(f"{ROOT}/legacy/dev", "Dev_2011", 50) | talk(f"{ROOT}/legacy/test", "Test_2012X", 51)
    files |= talk(f"{ROOT}/legacy/train", "Speaker0_2010", 0)
    return files | talk(f"{ROOT}/speaker-adaptation/train", "Other_2013", 99)


def sizes(manifests: dict[str, Manifest]) -> dict[str, int]:
    return {split: len(manifest) for split, manifest in manifests.items()}


def test_talks_are_cut_by_their_times_from_an_archive_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "ted.tgz").write_bytes(tar(layout()))
    unpack(layout(), tmp_path / "ted")
    packed = bring_corpus("tedlium", tmp_path / "packed", str(tmp_path / "ted.tgz"), processes=3)
    unpacked = bring_corpus("tedlium", tmp_path / "unpacked", str(tmp_path / "ted"), processes=1)
    assert sizes(packed) == {"train": 6, "dev": 2, "test": 2}
    assert {split: [*manifest] for split, manifest in packed.items()} == {
        split: [*manifest] for split, manifest in unpacked.items()
    }
    assert contents(tmp_path / "packed") == contents(tmp_path / "unpacked")
    first, second = packed["train"][:2]
    assert (first.id, first.text, first.speaker) == (
        "Speaker0_2010-0000100-0000300",
        "and it 's <unk> there",
        "Speaker0",
    )
    assert (second.id, second.duration) == ("Speaker0_2010-0000500-0001040", 0.5)
    cut, _ = soundfile.read(packed["train"].audio_path(first), dtype="int16")
    assert cut.tolist() == samples(1.0)[1600:4800].tolist()
    assert packed["test"].speakers == ("Test",)


def test_the_first_two_releases_have_their_splits_in_the_root(tmp_path: Path) -> None:
    files = talk("TEDLIUM_release2/train", "A_1", 0) | talk("TEDLIUM_release2/dev", "B_1", 1)
    unpack(files | talk("TEDLIUM_release2/test", "C_1", 2), tmp_path / "ted")
    assert sizes(bring_corpus("tedlium", tmp_path / "out", str(tmp_path / "ted"))) == {"train": 2, "dev": 2, "test": 2}


def test_it_is_downloaded_by_its_digest(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/ted.tgz"] = archive = tar(layout())
    digest = hashlib.sha256(archive).hexdigest()
    monkeypatch.setattr(tedlium, "ADDRESS", server.address(f"/ted.tgz#sha256={digest}"))
    server.faults.cut = 2
    assert sizes(bring_corpus("tedlium", tmp_path / "out")) == {"train": 6, "dev": 2, "test": 2}
    for path in (tmp_path / "cache" / "sonosco-mlflow").iterdir():
        path.unlink()
    server.files["/ted.tgz"] = tar(layout(2))
    with pytest.raises(UserError, match="the sha256 of what arrived"):
        bring_corpus("tedlium", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def without(name: str) -> dict[str, bytes]:
    return {other: content for other, content in layout().items() if not other.endswith(name)}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (without("data/sph/Speaker1_2010.sph"), r"Speaker1_2010"),
        (without("data/stm/Speaker1_2010.stm"), r"has talks without a transcript \(stm/\*\.stm\): Speaker1_2010"),
        (layout() | {f"{ROOT}/data/sph/Speaker1_2010.sph": b"x"}, r"Speaker1_2010.stm:2: \S+: cannot be read as audio"),
        (
            layout() | {f"{ROOT}/data/stm/Speaker1_2010.stm": b"a b c"},
            r"Speaker1_2010.stm:1: found 'a b c'\. Expected the",
        ),
        (
            layout() | {f"{ROOT}/data/stm/Speaker1_2010.stm": b"a 1 a 3 2 <NA> yes"},
            r"Speaker1_2010.stm:1: found 'a 1 a 3 2 <NA> yes'",
        ),
        (
            layout() | {f"{ROOT}/data/stm/Speaker1_2010.stm": b"a 1 a 1 9 <NA> yes"},
            r"Speaker1_2010.stm:1: the segment \S+ ends at 9\.0 s\. Expected an end within",
        ),
        ({"x/y.txt": b""}, r"has no talks\. Expected TED-LIUM in its original layout"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path: Path, files: dict[str, bytes], message: str, packed: bool) -> None:
    if packed:
        (tmp_path / "ted").write_bytes(tar(files))
    else:
        unpack(files, tmp_path / "ted")
    with pytest.raises(UserError, match=message):
        bring_corpus("tedlium", tmp_path / "out", str(tmp_path / "ted"))
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_an_archive_that_breaks_off_among_the_talks_is_no_corpus(tmp_path: Path) -> None:
    files = dict(sorted(layout().items(), key=lambda item: item[0].endswith(".sph")))
    whole = tar(files, "w")
    (tmp_path / "ted.tar").write_bytes(whole[: -len(whole) // 4])
    with pytest.raises(UserError, match=r"ted\.tar: cannot be read as a tar archive .*delete it and fetch it anew"):
        bring_corpus("tedlium", tmp_path / "out", str(tmp_path / "ted.tar"))
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_kill_leaves_no_corpus_and_the_next_call_makes_it(tmp_path: Path) -> None:
    (tmp_path / "ted.tgz").write_bytes(tar(layout(8)))
    code = (
        "import os, pathlib, signal, sys\n"
        "from sonosco_mlflow.data.corpora import bring_corpus\n"
        "kill = lambda done, everything: done == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "bring_corpus('tedlium', pathlib.Path(sys.argv[1]), sys.argv[2], progress=kill)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(tmp_path / "ted.tgz")]
    environment = os.environ | {"PYTHONPATH": str(Path(tedlium.__file__).parents[3])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert {name.partition("/")[0] for name in contents(tmp_path / "killed")} == {"wav"}
    for name in ("killed", "whole"):
        bring_corpus("tedlium", tmp_path / name, str(tmp_path / "ted.tgz"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
