from pathlib import Path

import pytest
from file_server import FileServer
from tiny import contents, sound, tar, unpack, zipped

from sonosco_mlflow.data.corpora import bring_corpus, voxforge
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError


def visit(name: str, kind: str = "wav", table: str = "PROMPTS", prompts: bytes | None = None) -> dict[str, bytes]:
    """What one user recorded at one time: two prompts."""
    form = "{0}/mfc/a{1:04} TO BUILD  A FIRE\n" if table == "PROMPTS" else "a{1:04} To build a fire.\n"
    text = "".join(form.format(name, number) for number in (1, 2)).encode()
    return {f"{name}/{kind}/a{n:04}.{kind}": sound(kind, 0.1, seed=n) for n in (1, 2)} | {
        f"{name}/etc/{table}": text if prompts is None else prompts,
        f"{name}/etc/README": b"User Name: x",
        f"{name}/LICENSE": b"GPL",
    }


VISITS = {
    "anonymous-20080101-abc": visit("anonymous-20080101-abc", "flac"),
    "anonymous-20080102-def": visit("anonymous-20080102-def"),
    "Ralf-20071220-de1": visit(
        "Ralf-20071220-de1", table="prompts-original", prompts="a0001 Über\na0002 Öl".encode("latin-1")
    ),
    "Ralf-20081220-de2": visit("Ralf-20081220-de2"),
}
ARCHIVES = {f"{name}.tgz": tar(files) for name, files in VISITS.items()}


def everything(manifests: dict[str, Manifest]) -> dict[str, Utterance]:
    return {utterance.id: utterance for manifest in manifests.values() for utterance in manifest}


def check(found: dict[str, Utterance]) -> None:
    assert len(found) == 8
    first = found["anonymous-20080101-abc-a0001"]
    assert (first.text, first.speaker, first.duration) == ("TO BUILD A FIRE", "anonymous-20080101-abc", 0.1)
    assert found["Ralf-20071220-de1-a0001"].text == "Über"
    assert found["Ralf-20071220-de1-a0002"].speaker == found["Ralf-20081220-de2-a0001"].speaker == "Ralf"


def test_archives_in_a_folder(tmp_path: Path) -> None:
    unpack(ARCHIVES, tmp_path / "source")
    manifests = bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source"))
    check(everything(manifests))
    assert all(len(manifest) for manifest in manifests.values())
    path = "wav/anonymous-20080101-abc/a0001.flac"
    assert everything(manifests)["anonymous-20080101-abc-a0001"].audio_filepath == path
    assert (tmp_path / "out" / path).read_bytes() == sound("flac", 0.1, seed=1)
    assert not (tmp_path / "out" / "left-out.txt").exists()


def test_what_archives_hold_in_a_folder(tmp_path: Path) -> None:
    for files in VISITS.values():
        unpack(files, tmp_path / "source")
    found = everything(bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source")))
    check(found)
    path = tmp_path / "source" / "Ralf-20081220-de2" / "wav" / "a0001.wav"
    assert found["Ralf-20081220-de2-a0001"].audio_filepath == str(path)
    assert not (tmp_path / "out" / "wav").exists()


def test_a_page_of_links_is_followed(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    links = "".join(f'<a href="{name}">{name}</a>' for name in ARCHIVES)
    server.files = {"/main/": f'<html><a href="?C=N">Name</a>{links}</html>'.encode()}
    server.files |= {f"/main/{name}": content for name, content in ARCHIVES.items()}
    monkeypatch.setattr(voxforge, "ADDRESS", server.address("/main/"))
    check(everything(bring_corpus("voxforge", tmp_path / "out")))
    server.files["/main/"] = b"<html>Nothing</html>"
    with pytest.raises(UserError, match="links to no archives"):
        bring_corpus("voxforge", tmp_path / "out")


def test_one_archive_may_have_many(tmp_path: Path) -> None:
    (tmp_path / "some.zip").write_bytes(
        zipped({name: content for files in VISITS.values() for name, content in files.items()})
    )
    check(everything(bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "some.zip"))))


def test_what_users_sent_by_mistake_is_left_out_and_named(tmp_path: Path) -> None:
    files = visit("Anna-2010-xyz", prompts=b"*/a0001 YES\n*/a0003 NEVER READ\n*/a0004\n*/a0005 EMPTY\n\n")
    files["Anna-2010-xyz/wav/a0005.wav"] = b""
    unpack(ARCHIVES | {"Anna-2010-xyz.tgz": tar(files)}, tmp_path / "source")
    found = everything(bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source")))
    assert [name for name in found if name.startswith("Anna")] == ["Anna-2010-xyz-a0001"]
    assert (tmp_path / "out" / "left-out.txt").read_text().splitlines() == [
        "Anna-2010-xyz: a0002: has no prompt",
        "Anna-2010-xyz: a0003: has no recording",
        "Anna-2010-xyz: a0004: has no recording",
        "Anna-2010-xyz: a0005: is empty, or cannot be read as audio",
    ]
    assert contents(tmp_path / "out" / "wav" / "Anna-2010-xyz").keys() == {"a0001.wav"}
    unpack(ARCHIVES, tmp_path / "others")
    bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "others"))
    assert not (tmp_path / "out" / "left-out.txt").exists()


def test_a_recording_in_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for files in VISITS.values():
        unpack(files, tmp_path / "source")
    (tmp_path / "source" / "Ralf-20081220-de2" / "wav" / "a0002.wav").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"of no use: \S+a0002\.wav is empty or cannot be read as audio\. Mend"):
        bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source"))


def test_both_tables_are_read_and_the_prepared_one_counts(tmp_path: Path) -> None:
    name = "Anna-2010-xyz"
    both = visit(name, table="prompts-original") | visit(name, prompts=b"x/a0001 TO BUILD A FIRE\n")
    unpack(ARCHIVES | {f"{name}.tgz": tar(both)}, tmp_path / "source")
    found = everything(bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source")))
    assert [found[f"{name}-a000{n}"].text for n in (1, 2)] == ["TO BUILD A FIRE", "To build a fire."]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (ARCHIVES | {"x.tgz": tar(visit("x"))[:300]}, r"x\.tgz: cannot be read as a tar archive"),
        (ARCHIVES | {"x.tgz": ARCHIVES["Ralf-20081220-de2.tgz"]}, r"x\.tgz: \S+ is the second recording of 'a0001'"),
        ({"x.txt": b""}, "found no recordings with texts"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    unpack(files, tmp_path / "source")
    with pytest.raises(UserError, match=message):
        bring_corpus("voxforge", tmp_path / "out", str(tmp_path / "source"))
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".jsonl")]
