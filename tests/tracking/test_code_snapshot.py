import hashlib
import io
import json
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking import code_snapshot
from sonosco_mlflow.tracking.code_archive import unpack
from sonosco_mlflow.tracking.code_snapshot import archive_digest, snapshot_code
from sonosco_mlflow.tracking.imported_code import ImportedCode
from sonosco_mlflow.tracking.secrecy import is_secret, without_secrets


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests themselves have imported is no part of their repositories."""
    nothing = ImportedCode({}, {})
    monkeypatch.setattr("sonosco_mlflow.tracking.code_snapshot.imported_code", lambda *_, **__: nothing)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    (tmp_path / "tracked.py").write_text("x = 1\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


ODD_NAMES = ("with space.py", "naïve ü.txt", "new\nline", "-dash", 'quote".py', "tab\t", "a/b/c d/deep.txt")


def spoil(folder: Path) -> None:
    """Leave a working tree in every kind of disorder."""
    (folder / "tracked.py").write_text("x = 2\n")
    (folder / "tracked.py").chmod(0o755)
    for name in ODD_NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    (folder / "empty").write_bytes(b"")
    (folder / "no end of line").write_bytes(b"x\r\ny")
    (folder / "latin").write_bytes("ä\n".encode("latin-1"))
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "script.sh").write_text("#!/bin/sh\n")
    (folder / "script.sh").chmod(0o755)
    (folder / "link").symlink_to("tracked.py")
    (folder / "broken link").symlink_to("nowhere")


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a working tree by name, with its kind and executable bit, and its content."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] == ".git" or (path.is_dir() and not path.is_symlink()):
            continue
        mode = path.lstat().st_mode
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        found[name] = (stat.S_IFMT(mode) | (mode & stat.S_IXUSR), content)
    return found


def names(archive: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(archive)).namelist()


def test_a_clean_tree_is_its_commit(repository: Path) -> None:
    snapshot = snapshot_code(repository)
    assert snapshot.commit == git(repository, "rev-parse", "HEAD").strip()
    assert snapshot.branch == "main"
    assert not snapshot.dirty
    assert snapshot.patch == b""
    assert names(snapshot.archive) == [".gitignore", "tracked.py"]


def test_untracked_files_are_in_it_and_ignored_ones_are_not(repository: Path) -> None:
    (repository / "untracked.py").write_text("y = 2\n")
    (repository / "ignored.txt").write_text("secret\n")
    snapshot = snapshot_code(repository)
    assert snapshot.dirty
    assert names(snapshot.archive) == [".gitignore", "tracked.py", "untracked.py"]


def test_the_patch_makes_the_commit_what_ran(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    spoil(repository)
    for key, value in (("diff.noprefix", "true"), ("diff.external", "false"), ("color.ui", "always")):
        git(repository, "config", key, value)
    index = (repository / ".git" / "index").read_bytes()
    snapshot = snapshot_code(repository)
    assert (repository / ".git" / "index").read_bytes() == index
    clone = tmp_path_factory.mktemp("clones") / "clone"
    git(repository, "clone", "--quiet", str(repository), str(clone))
    (clone / ".git" / "patch").write_bytes(snapshot.patch)
    git(clone, "apply", ".git/patch")
    # Untracked files that are no text are in the archive alone.
    expected = {name: facts for name, facts in tree(repository).items() if name != "binary"}
    assert tree(clone) == expected


def test_a_change_in_the_second_of_the_commit_is_in_the_patch(repository: Path) -> None:
    """Size and time are then those that git has noted; only the time of its index tells it to look."""
    git(repository, "config", "core.trustctime", "false")
    tracked = repository / "tracked.py"
    committed = tracked.stat()
    tracked.write_text("x = 2\n")
    for path in (tracked, repository / ".git" / "index"):
        os.utime(path, ns=(committed.st_mtime_ns, committed.st_mtime_ns))
    time.sleep(1.1)
    assert b"+x = 2" in snapshot_code(repository).patch


def test_the_digest_depends_on_contents_names_and_modes_and_on_nothing_else(repository: Path) -> None:
    first = snapshot_code(repository)
    (repository / "tracked.py").write_text("x = 2\n")
    changed = snapshot_code(repository)
    (repository / "tracked.py").write_text("x = 1\n")
    assert snapshot_code(repository).archive == first.archive
    assert snapshot_code(repository).digest == first.digest != changed.digest
    (repository / "tracked.py").chmod(0o755)
    assert snapshot_code(repository).digest not in {first.digest, changed.digest}


def test_other_parameters_and_other_data_are_no_other_code(repository: Path) -> None:
    before = snapshot_code(repository)
    (repository / "params.yaml").write_text("training: {epochs: 2}\n")
    (repository / "dvc.lock").write_text("stages: {}\n")
    after = snapshot_code(repository)
    assert after.digest == before.digest
    assert not after.dirty
    assert {"params.yaml", "dvc.lock"} <= set(names(after.archive))


def test_a_file_deleted_but_not_committed_is_left_out(repository: Path) -> None:
    (repository / "tracked.py").unlink()
    snapshot = snapshot_code(repository)
    assert names(snapshot.archive) == [".gitignore"]
    assert snapshot.dirty


def test_before_the_first_commit_and_detached(tmp_path: Path, repository: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")
    assert snapshot_code(repository).branch is None
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    git(unborn, "init", "--quiet")
    (unborn / "a.py").write_text("")
    snapshot = snapshot_code(unborn)
    assert snapshot.commit is None
    assert names(snapshot.archive) == ["a.py"]


def test_credentials_do_not_leave(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://user:secret@example.org/repository.git")
    snapshot = snapshot_code(repository)
    assert snapshot.remote == "https://example.org/repository.git"
    assert "secret" not in snapshot.git_json()


def test_a_large_file_is_listed_with_its_digest(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("code_archive", "repository"):
        monkeypatch.setattr(f"sonosco_mlflow.tracking.{module}.LARGEST_FILE", 100)
    large = repository / "large.bin"
    large.write_bytes(bytes(101))
    snapshot = snapshot_code(repository)
    assert "large.bin" not in names(snapshot.archive)
    assert list(snapshot.left_out) == ["large.bin"]
    git(repository, "add", "large.bin")
    assert snapshot_code(repository).patch == b"", "staged is no smaller"
    committed(repository)
    large.unlink()
    gone = snapshot_code(repository)
    assert gone.patch == b""
    assert gone.unpatched == ["large.bin"]


def test_much_that_is_no_code_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"one.wav": 40_000, "two.wav": 30_000}.items():
        (repository / name).write_bytes(random.Random(0).randbytes(size))
    snapshot_code(repository)
    monkeypatch.setattr("sonosco_mlflow.tracking.code_snapshot._REMARKABLE_BYTES", 65_000)
    with pytest.warns(UserWarning, match=r"takes 0\.1 MB, of that most one\.wav \(0\.0 MB\), two\.wav \(0\.0 MB\), "):
        snapshot_code(repository)


# ---------------------------------------------------------------------- there and back


def clean(repository: Path, places: Path) -> Path:
    return repository


def dirty(repository: Path, places: Path) -> Path:
    spoil(repository)
    return repository


def staged(repository: Path, places: Path) -> Path:
    spoil(repository)
    git(repository, "add", "--all")
    return repository


def detached(repository: Path, places: Path) -> Path:
    git(repository, "checkout", "--quiet", "--detach")
    return dirty(repository, places)


def worktree(repository: Path, places: Path) -> Path:
    git(repository, "worktree", "add", "--quiet", "--detach", str(places / "worktree"))
    return dirty(places / "worktree", places)


def cloned(repository: Path, places: Path) -> Path:
    git(repository, "clone", "--quiet", str(repository), str(places / "clone"))
    return dirty(places / "clone", places)


def unborn(repository: Path, places: Path) -> Path:
    git(places, "init", "--quiet", "unborn")
    (places / "unborn" / "tracked.py").write_text("")
    return dirty(places / "unborn", places)


@pytest.mark.parametrize("situation", [clean, dirty, staged, detached, worktree, cloned, unborn])
def test_what_is_unpacked_is_what_was_there(
    situation: Callable[[Path, Path], Path], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    places = tmp_path_factory.mktemp("places")
    folder = situation(repository, places)
    before = git(folder, "status", "--porcelain")
    snapshot = snapshot_code(folder)
    assert git(folder, "status", "--porcelain") == before
    unpack(snapshot.archive, places / "again")
    assert tree(places / "again") == tree(folder)
    git(places, "init", "--quiet", "again")
    assert snapshot_code(places / "again").digest == snapshot.digest
    assert snapshot_code(folder).archive == snapshot.archive


def test_before_the_first_commit_the_patch_makes_everything(tmp_path: Path) -> None:
    folder = unborn(tmp_path, tmp_path)
    patch = snapshot_code(folder).patch
    git(tmp_path, "init", "--quiet", "again")
    (tmp_path / "patch").write_bytes(patch)
    git(tmp_path / "again", "apply", "../patch")
    assert tree(tmp_path / "again") == {name: facts for name, facts in tree(folder).items() if name != "binary"}


def committed(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "more")
    return git(folder, "rev-parse", "HEAD").strip()


def test_submodules_are_in_it_as_they_are_checked_out(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "--quiet")
    (other / "file.py").write_text("x = 1\n")
    first = committed(other)
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "with space")
    committed(repository)
    snapshot = snapshot_code(repository)
    assert snapshot.submodules == {"with space": first}
    assert not snapshot.dirty
    assert "with space/file.py" in names(snapshot.archive)
    git(repository, "config", "diff.ignoreSubmodules", "all")
    (repository / "with space" / "file.py").write_text("x = 2\n")
    changed = snapshot_code(repository)
    assert changed.dirty
    assert changed.digest != snapshot.digest
    second = committed(repository / "with space")
    moved = snapshot_code(repository)
    assert moved.submodules == {"with space": second}
    assert moved.digest == changed.digest


def test_a_repository_inside_that_is_not_tracked_is_code_as_well(repository: Path) -> None:
    inner = repository / "lib" / "inner"
    inner.mkdir(parents=True)
    git(inner, "init", "--quiet")
    (inner / ".gitignore").write_text("*.tmp\n")
    (inner / "model.py").write_text("x = 1\n")
    (inner / "a.tmp").write_text("")
    found = names(snapshot_code(repository).archive)
    assert found == [".gitignore", "lib/inner/.gitignore", "lib/inner/model.py", "tracked.py"]


def test_what_runs_write_is_no_code(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to tell git to ignore it."""
    (repository / "own.py").write_text("x = 1\n")
    (repository / "runs").mkdir()
    (repository / "runs" / "plot.py").write_text("x = 1\n")
    before = snapshot_code(repository)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository / 'store.db'}")
    written = ("store.db", "store.db.lock", "store.db-journal", "mlruns/0/a/artifacts/params.yaml", "sweeps.db")
    for name in (*written, "runs/train-0a1b2c/journal.jsonl", ".sonosco/data/x.py", "train.log", "nohup.out"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("x\n")
    after = snapshot_code(repository)
    assert after.digest == before.digest
    assert {*names(after.archive)} - {*names(before.archive)} == {"train.log", "nohup.out"}
    committed(repository)
    assert "store.db" in names(snapshot_code(repository).archive), "what git tracks is code, whatever it is called"


def test_a_project_below_the_root_of_its_repository(repository: Path) -> None:
    project = repository / "sub"
    project.mkdir()
    (project / "dvc.yaml").write_text("stages: {}\n")
    (repository / "other").mkdir()
    (repository / "other" / "params.yaml").write_text("a: 1\n")
    before = snapshot_code(project)
    for name in ("params.yaml", "dvc.lock"):
        (project / name).write_text("x: 1\n")
    assert snapshot_code(project).digest == before.digest
    (repository / "other" / "params.yaml").write_text("a: 2\n")
    assert snapshot_code(project).digest != before.digest, "no recipe of DVC's"


def test_settings_of_git_hide_nothing(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (repository / "tracked.py").write_text("".join(f"x = {i}\n" for i in range(30)))
    committed(repository)
    for key, value in (("status.showUntrackedFiles", "no"), ("diff.context", "0"), ("diff.relative", "true")):
        git(repository, "config", key, value)
    (repository / "untracked.py").write_text("y = 2\n")
    assert snapshot_code(repository).dirty
    (repository / "tracked.py").write_text("".join(f"x = {i}\n" for i in range(30) if i != 15))
    (repository / "sub").mkdir()
    snapshot = snapshot_code(repository / "sub")
    clone = tmp_path_factory.mktemp("clones") / "clone"
    git(repository, "clone", "--quiet", str(repository), str(clone))
    (clone / ".git" / "patch").write_bytes(snapshot.patch)
    git(clone, "apply", ".git/patch")
    assert tree(clone) == tree(repository)


@pytest.mark.parametrize("mark", ["assume-unchanged", "skip-worktree"])
def test_a_mark_in_the_index_hides_nothing(repository: Path, mark: str) -> None:
    (repository / "sparse.py").write_text("y = 1\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "second")
    git(repository, "update-index", f"--{mark}", "tracked.py")
    assert not snapshot_code(repository).dirty
    (repository / "tracked.py").write_text("x = 2\n")
    snapshot = snapshot_code(repository)
    assert snapshot.dirty
    assert b"-x = 1\n+x = 2\n" in snapshot.patch
    git(repository, "update-index", f"--no-{mark}", "tracked.py")
    git(repository, "checkout", "tracked.py")
    # What a sparse checkout leaves out was not deleted.
    git(repository, "update-index", "--skip-worktree", "sparse.py")
    (repository / "sparse.py").unlink()
    assert (snapshot_code(repository).dirty, snapshot_code(repository).patch) == (False, b"")


def test_a_name_that_is_not_utf_8(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    odd = os.fsdecode(b"caf\xe9.py")
    (repository / odd).write_text("x = 1\n")
    snapshot = snapshot_code(repository)
    again = tmp_path_factory.mktemp("again")
    unpack(snapshot.archive, again)
    assert tree(again) == tree(repository)
    assert archive_digest(snapshot.archive, {}) == snapshot.digest
    json.loads(snapshot.git_json())


def test_without_git_it_is_what_was_imported(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    snapshot = snapshot_code(repository)
    assert snapshot.commit is None
    assert names(snapshot.archive) == []
    program = "from sonosco_mlflow.tracking import code_snapshot"
    source = Path(code_snapshot.__file__).parents[2]
    environment = {"PATH": str(repository), "PYTHONPATH": str(source)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_forged_archive_writes_nothing_through_a_link(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, target in {"a": str(tmp_path / "outside"), "a/planted.pth": "/anything", "a/b/c": "/any"}.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o755) << 16
            archive.writestr(entry, target)
    (tmp_path / "outside").mkdir()
    with pytest.raises(UserError, match=r"names 'a/planted\.pth', which leaves its folder"):
        unpack(buffer.getvalue(), tmp_path / "inside")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_forged_archive_writes_nothing_outside(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="leaves its folder"):
        unpack(buffer.getvalue(), tmp_path / "inside")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


def test_a_forged_archive_writes_through_no_link(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o644) << 16
        archive.writestr(link, str(tmp_path / "outside"))
        archive.writestr("link/file", "x")
    (tmp_path / "outside").mkdir()
    with pytest.raises(OSError, match="link"):
        unpack(buffer.getvalue(), tmp_path / "inside")
    assert not list((tmp_path / "outside").iterdir())


# ---------------------------------------------------------------------- secrets

# In two pieces: these lines are no secrets.
TOKEN = "ghp_" + 40 * "a"
PRIVATE_KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----"


def test_secrets_stay(repository: Path) -> None:
    git(repository, "remote", "add", "origin", f"https://{TOKEN}@example.org/repository.git?token={TOKEN}")
    (repository / "tracked.py").write_text(f"token = '{TOKEN}'\n")
    (repository / ".env").write_text(f"TOKEN={TOKEN}\n")
    git(repository, "add", "--force", ".env")
    (repository / "deploy").mkdir()
    (repository / "deploy" / "key of mine").write_text(f"{PRIVATE_KEY}\n{TOKEN}\n")
    with pytest.warns(UserWarning, match=r"look like secrets: \.env, deploy/key of mine, tracked\.py"):
        snapshot = snapshot_code(repository)
    assert snapshot.withheld == [".env", "deploy/key of mine", "tracked.py"]
    kept = [zipfile.ZipFile(io.BytesIO(snapshot.archive)).read(name) for name in names(snapshot.archive)]
    for content in (*kept, snapshot.patch, snapshot.git_json().encode()):
        assert TOKEN.encode() not in content
        assert PRIVATE_KEY.encode() not in content


@pytest.mark.parametrize("removal", ["deleted", "untracked", "cleaned"])
def test_a_patch_does_not_show_a_secret_that_was_committed(repository: Path, removal: str) -> None:
    (repository / ".env").write_text("TOKEN=planted-in-the-past\n")
    (repository / "b.py").write_text(f"token = '{TOKEN}'\n")
    (repository / "c.py").write_text("c = 1\n")
    committed(repository)
    (repository / "b.py").write_text("token = None\n")
    (repository / "c.py").write_text("c = 2\n")
    match removal:
        case "deleted":
            (repository / ".env").unlink()
        case "untracked":
            git(repository, "rm", "--quiet", "--cached", ".env")
            (repository / ".env").unlink()
        case "cleaned":
            (repository / ".env").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snapshot = snapshot_code(repository)
    assert b"planted-in-the-past" not in snapshot.patch
    assert TOKEN.encode() not in snapshot.patch
    assert b"+c = 2" in snapshot.patch
    assert {*snapshot.unpatched} == {".env", "b.py"}
    assert "b.py" in names(snapshot.archive), "as it is now"


def test_a_repository_of_another_user_is_one_clear_mistake(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    with pytest.raises(UserError, match=r"belongs to another user .* --add safe\.directory"):
        snapshot_code(repository)


def test_a_program_with_a_token_in_it_counts_though_it_stays(repository: Path) -> None:
    digests = set()
    for rate in (1, 2):
        (repository / "train.py").write_text(f"rate = {rate}\ntoken = '{TOKEN}'\n")
        with pytest.warns(UserWarning, match=r"look like secrets: train\.py"):
            snapshot = snapshot_code(repository)
        assert "train.py" not in names(snapshot.archive)
        assert list(snapshot.left_out) == ["train.py"]
        digests.add(snapshot.digest)
    assert len(digests) == 2


def test_what_a_secret_variable_holds_is_no_part_of_code_or_text(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("MY_TOKEN_FILE", str(repository))
    (repository / "a.txt").write_text("it is correct-horse-battery\n")
    (repository / "b.txt").write_text(f"it is in {repository}\n")
    with pytest.warns(UserWarning, match=r"look like secrets: a\.txt"):
        assert snapshot_code(repository).withheld == ["a.txt"]
    assert without_secrets(f"--token=correct-horse-battery {repository}") == f"--token=*** {repository}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in (".envrc", ".env-prod", "kaggle.json", ".databrickscfg", "api_key.txt")),
        *((name, True) for name in (".env", ".env.local", "prod.env", "server.pem", "id_ed25519", ".netrc", "token")),
        *((name, True) for name in ("credentials.json", "aws-credentials", "client_secret.json", "secrets.yaml")),
        *((name, False) for name in (".env.example", "tokens.txt", "tokenizer.json", "environment.py", "secrets.py")),
        *((name, False) for name in ("keys.py", "monkey.txt", "token.py", "README.md")),
    ],
)
def test_the_names_of_secrets(tmp_path: Path, name: str, expected: bool) -> None:
    (tmp_path / name).write_text("x\n")
    assert is_secret(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://example.org/a.git", "https://example.org/a.git"),
        ("https://me:pass@example.org:8080/a.git?key=pass#x", "https://example.org:8080/a.git#x"),
        ("ssh://git@example.org/a.git", "ssh://example.org/a.git"),
        ("git@example.org:a.git", "git@example.org:a.git"),
        ("/srv/git/a.git", "/srv/git/a.git"),
        ("--set=data.source=https://me:pass@example.org/x", "--set=data.source=https://example.org/x"),
        (
            "run at postgresql://me:p@ss@host:5432/db, and s3://bucket/x",
            "run at postgresql://host:5432/db, and s3://bucket/x",
        ),
    ],
)
def test_addresses_without_credentials(address: str, expected: str) -> None:
    assert without_secrets(address) == expected


# ---------------------------------------------------------------------- quick


def test_five_thousand_files_take_seconds(repository: Path) -> None:
    for number in range(5000):
        folder = repository / f"part-{number // 100}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.py").write_text(f"x = {number}\n" * 50)
    # Of this process and of git's: how long others keep the machine is not what is asked.
    started = sum(os.times()[:4])
    snapshot_code(repository)
    assert sum(os.times()[:4]) - started < 5


def test_a_file_of_200_megabytes_is_not_read_into_memory(repository: Path) -> None:
    with (repository / "large.bin").open("wb") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    snapshot = snapshot_code(repository)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(snapshot.left_out) == ["large.bin"]
    assert snapshot.left_out["large.bin"] == (0o100644, hashlib.sha256(bytes(200_000_000)).hexdigest())
    facts = json.loads(snapshot.git_json())
    assert archive_digest(snapshot.archive, facts["left_out"]) == snapshot.digest
    assert peak < 20_000_000


def test_what_the_folders_around_a_project_are_called_says_nothing(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("around") / "mlruns" / ".sonosco" / "project"
    moved.parent.mkdir(parents=True)
    repository.rename(moved)
    (moved / "untracked.py").write_text("x = 1")
    (moved / "sweeps.db_tools.py").write_text("x = 2")
    (moved / "mlruns").mkdir()
    (moved / "mlruns" / "meta.yaml").write_text("")
    snapshot = snapshot_code(moved)
    assert snapshot.dirty
    assert names(snapshot.archive) == [".gitignore", "sweeps.db_tools.py", "tracked.py", "untracked.py"]
