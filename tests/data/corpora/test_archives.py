import io
import re
import struct
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import contents, tar, unpack, zipped

from sonosco_mlflow.data.corpora.archives import members
from sonosco_mlflow.errors import UserError

FILES = {"c/a.txt": b"first" * 100, "c/b.txt": b"second", "c/deep/c.txt": b"", "c/other.bin": bytes(2000)}
TEXT = re.compile(r"(?:^|/)([\w-]+)\.txt$")
KINDS = {"tar": tar(FILES, "w"), "tar.gz": tar(FILES), "tar.xz": tar(FILES, "w:xz"), "zip": zipped(FILES)}
EXPECTED = {"a": FILES["c/a.txt"], "b": b"second", "c": b""}


def read(source: Path) -> dict[str, bytes]:
    return {member.match[1]: member.read() for member in members(source, TEXT, "a test")}


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_every_kind_of_source_has_the_same_files(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "folder":
        unpack(FILES, source)
    else:
        source.write_bytes(KINDS[kind])
    assert read(source) == EXPECTED
    laid = [member.lay(tmp_path / "out" / member.match[1]) for member in members(source, TEXT, "a test")]
    assert {path.stem: path.read_bytes() for path in laid} == EXPECTED
    assert all(path.is_absolute() for path in laid)
    assert (tmp_path / "out").exists() == (kind != "folder")


def test_names_begin_with_the_folders_own(tmp_path: Path) -> None:
    unpack(FILES, tmp_path)
    names = [member.match[0] for member in members(tmp_path / "c", re.compile(r"^c/\w+\.txt$"), "a test")]
    assert names == ["c/a.txt", "c/b.txt"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1, exclude_max=True))
def test_an_archive_that_is_cut_off_anywhere_is_never_taken_for_whole(tmp_path: Path, kind: str, share: float) -> None:
    source = tmp_path / f"cut.{kind}"
    source.write_bytes(KINDS[kind][: int(len(KINDS[kind]) * share)])
    with suppress(UserError):
        # Only the zeros at the end of a plain tar may be missing.
        assert (kind, read(source)) == ("tar", EXPECTED)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["tar.gz", "tar.xz", "zip"]), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
)
def test_a_bit_that_is_wrong_anywhere_is_found_or_does_not_matter(
    tmp_path: Path, kind: str, share: float, bit: int
) -> None:
    content = bytearray(KINDS[kind])
    content[int(len(content) * share)] ^= 1 << bit
    source = tmp_path / f"wrong.{kind}"
    source.write_bytes(content)
    try:
        found = read(source)
    except UserError:
        return
    # A name in a zip's directory has no checksum; what has another name is missed where it is needed.
    assert found.items() <= EXPECTED.items() or kind == "zip"


@pytest.mark.parametrize("member", [1, 2, 3])
def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path, member: int) -> None:
    with tarfile.open(fileobj=io.BytesIO(KINDS["tar"])) as archive:
        offset = archive.getmembers()[member].offset
    content = bytearray(KINDS["tar"])
    content[offset] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar: cannot be read as a tar archive \(bad checksum\)"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("content", [KINDS["tar.gz"][:100], b"no archive"], ids=["cut off", "something else"])
def test_what_is_damaged_is_said_in_one_line_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "x.tar.gz")
    assert re.search(
        r"^\S+x\.tar\.gz: cannot be read as a tar archive \(.*\).*: delete it and fetch it anew\.$", str(raised.value)
    )


def test_a_tar_that_stops_between_two_members_has_not_ended(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(KINDS["tar"])) as archive:
        offset = archive.getmembers()[2].offset
    (tmp_path / "x.tar").write_bytes(KINDS["tar"][:offset])
    with pytest.raises(UserError, match="it ends without the mark of an archive's end"):
        read(tmp_path / "x.tar")


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            member = tarfile.TarInfo(f"c/{kind.decode()}.txt")
            member.type = kind
            member.linkname = str(tmp_path / "secret.txt")
            archive.addfile(member)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    assert read(tmp_path / "x.tar") == {}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("c/link.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret.txt"))
        archive.writestr("c/folder.txt/", "")
    assert read(tmp_path / "x.zip") == {}


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    member = tarfile.TarInfo("c/a.txt")
    member.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(member.tobuf() + bytes(4096))
    with pytest.raises(UserError, match=r"holds 1099511627776 bytes\. Expected at most"):
        read(tmp_path / "x.tar")
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        [member.lay(tmp_path / "out") for member in members(tmp_path / "x.tar", TEXT, "a test")]
    extension = tarfile.TarInfo("c/a.txt")
    extension.type, extension.size = tarfile.XHDTYPE, 1 << 40
    first = tarfile.TarInfo("c/b.txt")
    (tmp_path / "x.tar").write_bytes(first.tobuf() + extension.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match="a header says that it holds 1099511627776 bytes"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("said", [10, 1 << 21])
def test_a_zip_that_holds_another_length_than_it_says(tmp_path: Path, said: int) -> None:
    content = zipped({"c/a.txt": bytes(1 << 20)})
    size = struct.pack("<I", 1 << 20)
    assert content.count(size) == 2
    (tmp_path / "x.zip").write_bytes(content.replace(size, struct.pack("<I", said)))
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        read(tmp_path / "x.zip")


def test_a_zip_under_a_password_is_named(tmp_path: Path) -> None:
    content = bytearray(zipped({"c/a.txt": b"text"}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"c/a\.txt: is under a password"):
        read(tmp_path / "x.zip")


def test_no_source_and_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: .*nothing is not there\. Expected a test, as a folder or"):
        read(tmp_path / "nothing")
    unpack({"c/a.txt": b"\xff"}, tmp_path)
    with pytest.raises(UserError, match=r"c/a\.txt: found bytes that are not UTF-8 at offset 0"):
        [member.text() for member in members(tmp_path, TEXT, "a test")]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(KINDS["tar"])
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"out/a: cannot be written"):
        [member.lay(tmp_path / "out" / member.match[1]) for member in members(tmp_path / "x.tar", TEXT, "a test")]
    assert contents(tmp_path).keys() == {"x.tar", "out"}
