"""Writing so that it survives a crash: seen through a proxy of the ``os`` that the module calls."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sonosco_mlflow.serialization import durable

WATCHED = ("open", "write", "fsync", "close", "replace", "unlink", "rmdir", "mkdir")


class DiskError(OSError):
    pass


class WatchedOs:
    """Notes each operation and the name that it is about; may fail at one of them, or write less than it is given."""

    def __init__(self, most: int | None = None) -> None:
        self.log: list[str] = []
        self.names: dict[int, str] = {}
        self.most = most
        self.fatal: int | None = None

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return (lambda *given: self.operate(name, function, *given)) if name in WATCHED else function

    def operate(self, name: str, function: Callable[..., Any], *given: Any) -> Any:
        about = self.names[given[0]] if isinstance(given[0], int) else Path(given[0]).name
        self.log.append(f"{name} {about}" + (f" -> {Path(given[1]).name}" if name == "replace" else ""))
        if name == "close":
            # As the system does it: a descriptor is gone even if closing it reports an error.
            del self.names[given[0]]
            function(*given)
        if len(self.log) - 1 == self.fatal:
            raise DiskError
        if name == "close":
            return None
        if name == "write" and self.most is not None:
            given = (given[0], given[1][: self.most])
        result = function(*given)
        if name == "open":
            self.names[result] = about
        return result


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> WatchedOs:
    watched = WatchedOs()
    monkeypatch.setattr(durable, "os", watched)
    return watched


def test_a_file_is_written_synced_and_closed(tmp_path: Path, system: WatchedOs) -> None:
    durable.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert system.log == ["open file", "write file", "fsync file", "close file"]


def test_an_empty_file_is_synced_as_well(tmp_path: Path, system: WatchedOs) -> None:
    durable.write_bytes(tmp_path / "file", b"")
    assert (tmp_path / "file").read_bytes() == b""
    assert system.log == ["open file", "fsync file", "close file"]


def test_a_shorter_content_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    for content in (b"a long one", b"short"):
        durable.write_bytes(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_what_the_system_did_not_take_is_written_again(tmp_path: Path, system: WatchedOs, most: int) -> None:
    system.most = most
    content = bytes(range(20))
    durable.write_bytes(tmp_path / "written", content)
    file = durable.AppendedFile(tmp_path / "appended")
    file.append(content)
    file.append(content)
    file.close()
    assert (tmp_path / "written").read_bytes() == content
    assert (tmp_path / "appended").read_bytes() == 2 * content
    assert system.log.count("write written") == -(-20 // most)


def test_a_content_is_replaced_after_it_is_on_the_disk_and_its_name_is_synced_last(
    tmp_path: Path, system: WatchedOs
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    durable.replace_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    folder = tmp_path.name
    assert system.log == [
        *("open file.partial", "write file.partial", "fsync file.partial", "close file.partial"),
        *("replace file.partial -> file", f"open {folder}", f"fsync {folder}", f"close {folder}"),
    ]


def test_a_directory_is_made_with_all_above_it_and_each_name_is_synced(tmp_path: Path, system: WatchedOs) -> None:
    durable.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert system.log == [
        *("mkdir a", f"open {tmp_path.name}", f"fsync {tmp_path.name}", f"close {tmp_path.name}"),
        *("mkdir b", "open a", "fsync a", "close a"),
    ]
    system.log.clear()
    durable.make_directory(tmp_path / "a" / "b")
    assert system.log == []


def test_a_directory_that_another_process_makes_meanwhile_is_as_good(
    tmp_path: Path, system: WatchedOs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_by_another(path: Path) -> None:
        os.mkdir(path)  # noqa: PTH102
        os.mkdir(path)  # noqa: PTH102

    monkeypatch.setattr(system, "mkdir", made_by_another, raising=False)
    durable.make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_a_file_in_the_place_of_a_directory_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        durable.make_directory(tmp_path / "file")


def test_a_directory_is_renamed_durably_before_anything_in_it_is_removed(tmp_path: Path, system: WatchedOs) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    for name in ("one", "two"):
        (directory / name).write_bytes(b"content")
    durable.remove_directory(directory)
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path.name
    assert system.log == [
        *("replace old -> .removing-old", f"open {folder}", f"fsync {folder}", f"close {folder}"),
        *("unlink one", "unlink two", "rmdir .removing-old"),
    ]


def test_of_nested_directories_the_innermost_goes_first_and_links_are_not_followed(
    tmp_path: Path, system: WatchedOs
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "old" / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    for directory in (elsewhere, tmp_path / "old" / "inner"):
        (directory / "file").write_bytes(b"content")
    (tmp_path / "old" / "link").symlink_to(elsewhere)
    durable.clear_directory(tmp_path / "old")
    assert system.log == ["unlink file", "rmdir inner", "unlink link", "rmdir old"]
    assert (elsewhere / "file").read_bytes() == b"content"


def test_a_link_to_a_directory_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(elsewhere)
    durable.remove_directory(tmp_path / "link")
    assert (elsewhere / "file").read_bytes() == b"content"
    assert not (tmp_path / "link").is_symlink()


def test_what_is_appended_stands_in_order_and_is_synced_when_asked(tmp_path: Path, system: WatchedOs) -> None:
    path = tmp_path / "folder" / "journal"
    file = durable.AppendedFile(path)
    file.append(b"one,")
    file.append(b"two")
    assert path.read_bytes() == b"one,two", "it must survive the process without being synced or closed"
    file.sync()
    file.close()
    assert system.log == [
        *("mkdir folder", f"open {tmp_path.name}", f"fsync {tmp_path.name}", f"close {tmp_path.name}"),
        *("open journal", "open folder", "fsync folder", "close folder"),
        *("write journal", "write journal", "fsync journal", "close journal"),
    ]
    again = durable.AppendedFile(path)
    again.append(b",three")
    again.close()
    assert path.read_bytes() == b"one,two,three"


def write(folder: Path) -> None:
    durable.write_bytes(folder / "file", b"new")


def replace(folder: Path) -> None:
    durable.replace_bytes(folder / "file", b"new")


def make(folder: Path) -> None:
    durable.make_directory(folder / "a" / "b")


def remove(folder: Path) -> None:
    durable.remove_directory(folder / "directory")


def append(folder: Path) -> None:
    file = durable.AppendedFile(folder / "new" / "journal")
    try:
        file.append(b"content")
        file.sync()
    finally:
        file.close()


@pytest.mark.parametrize("action", [write, replace, make, remove, append])
def test_whatever_fails_the_error_passes_every_descriptor_is_closed_and_nothing_stands_half(
    action: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = 0
    while True:
        folder = tmp_path / str(operations)
        (folder / "directory").mkdir(parents=True)
        names = ["one", "two", "three"]
        for name in names:
            (folder / "directory" / name).write_bytes(b"content")
        (folder / "file").write_bytes(b"old")
        system = WatchedOs()
        system.fatal = operations
        monkeypatch.setattr(durable, "os", system)
        try:
            action(folder)
            break
        except DiskError:
            operations += 1
        assert system.names == {}, system.log
        directory = folder / "directory"
        assert not directory.exists() or sorted(path.name for path in directory.iterdir()) == sorted(names)
        if action is replace:
            assert (folder / "file").read_bytes() in (b"old", b"new")
    assert operations == len(system.log) > 3


def test_what_is_appended_stands_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = durable.AppendedFile(tmp_path / "journal")
    file.append(b"first\n")
    system = WatchedOs(most=4)
    monkeypatch.setattr(durable, "os", system)
    system.names[file._descriptor] = "journal"
    system.fatal = 1
    with pytest.raises(DiskError):
        file.append(b"second\n")
    monkeypatch.undo()
    file.append(b"third\n")
    file.close()
    assert (tmp_path / "journal").read_bytes() == b"first\nthird\n"
