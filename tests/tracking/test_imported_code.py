"""What a process has imported is kept, wherever it lies; each is a process of its own here."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import _cffi_backend
import mlflow
import pytest

from experiments import go_on, new_project, run_experiment, toy_trainer
from project import REPOSITORY, environment
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.code_snapshot import imported_digests
from sonosco_mlflow.tracking.imported_code import ImportedCode

REPORT = """
import json, sys
from pathlib import Path
from sonosco_mlflow.tracking.code_archive import archived_files
from sonosco_mlflow.tracking.code_snapshot import imported_since, snapshot_code
from sonosco_mlflow.tracking.origin import Command

snapshot = snapshot_code(Path(sys.argv[1]))
import late
command = Command.of_this_process(snapshot, trains_recipe=False)
names = sorted(archived_files(snapshot.archive))
digests = [snapshot.digest, snapshot.imported_digest]
print(json.dumps([names, digests, vars(command), [str(path) for path in imported_since(snapshot)]]))
"""


def report(
    folder: Path, arguments: list[str], *, project: Path, path: list[Path], warning: str = ""
) -> tuple[list[str], list[str], dict[str, object], list[str]]:
    searched = ":".join(str(entry) for entry in [REPOSITORY / "src", *path])
    ended = subprocess.run(
        [sys.executable, *arguments, str(project)],
        cwd=folder,
        env=environment({"PYTHONPATH": searched}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert warning in ended.stderr
    assert bool(ended.stderr) == bool(warning), ended.stderr
    names, digest, command, late = json.loads(ended.stdout)
    ours = [name for name in names if "/sonosco_mlflow/" not in name]
    assert len(names) - len(ours) > 100, "this package is in it"
    return ours, digest, command, late


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of modules, in no repository: a package, a namespace, a plain module."""
    library = tmp_path / "library"
    for name, text in {
        "plain.py": "import kit\nimport space.part.inner\n",
        "kit/__init__.py": "",
        "kit/not_imported_yet.py": "",
        "kit/table.json": "{}",
        "kit/.env": "token=1",
        "kit/log.txt": "written by the package",
        "kit/__pycache__/old.pyc": "",
        "space/part/inner.py": "",
        "space/part/not_imported.py": "",
        "not_imported.py": "",
        "late.py": "",
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text)
    return library


def test_all_that_a_program_imports_is_kept_though_none_of_it_is_in_git(tmp_path: Path, library: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "program.py").write_text("import plain\n" + REPORT)
    kept, digests, command, late = report(tmp_path, ["programs/program.py"], project=project, path=[library])
    assert kept == [
        ".imported/kit/kit/__init__.py",
        ".imported/kit/kit/not_imported_yet.py",
        ".imported/kit/kit/table.json",
        ".imported/plain/plain.py",
        ".imported/program/program.py",
        ".imported/space/space/part/inner.py",
    ]
    assert command["arguments"] == [".imported/program/program.py", "."]
    assert command["folder"] == "."
    # In the order in which they were searched: the program's own folder, this package's, the library.
    library_path = [".imported/kit", ".imported/plain", ".imported/space"]
    assert command["path"] == [".imported/program", ".imported/sonosco_mlflow", *library_path]
    assert late == [str(library / "late.py")]

    # Where all of it lies is no code.
    moved = tmp_path / "a" / "moved"
    moved.parent.mkdir()
    library.rename(moved)
    programs.rename(tmp_path / "z")
    assert report(tmp_path, ["z/program.py"], project=project, path=[moved])[:2] == (kept, digests)
    (moved / "kit" / "log.txt").write_text("and again")
    (moved / "kit" / "table.json").write_text("[]")
    changed = report(tmp_path, ["z/program.py"], project=project, path=[moved])[1]
    assert changed == digests, "what a package writes beside its code is no code"
    (moved / "space" / "part" / "inner.py").write_text("x = 1\n")
    changed = report(tmp_path, ["z/program.py"], project=project, path=[moved])[1]
    assert changed[0] == digests[0]
    assert changed[1] != digests[1] != ""


def test_in_a_repository_git_says_what_is_code_and_what_is_imported_is_added(tmp_path: Path, library: Path) -> None:
    project = tmp_path / "project"
    (project / "own").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    (project / ".gitignore").write_text("generated.py\nignored.py\n")
    (project / "own" / "__init__.py").write_text("")
    for name in ("generated", "ignored", "model", "other"):
        (project / "own" / f"{name}.py").write_text("")
    (project / "own" / "linked.py").symlink_to(library / "not_imported.py")
    (project / "libs").mkdir()
    path = [library, project / "libs"]
    (project / "program.py").write_text("import own.generated, own.model, own.linked, space.part.inner\n" + REPORT)
    kept, _, command, late = report(project, ["program.py"], project=project, path=path, warning="own/generated.py")
    assert kept == [
        ".gitignore",
        ".imported/space/space/part/inner.py",
        "own/__init__.py",
        "own/linked.py",
        "own/model.py",
        "own/other.py",
        "program.py",
    ]
    assert command["arguments"] == ["program.py", "."]
    # Something may be imported from there later.
    assert command["path"] == [".", ".imported/sonosco_mlflow", ".imported/space", "libs"]
    assert late == [str(library / "late.py")]


def test_what_is_imported_later_is_to_be_as_it_was_kept(tmp_path: Path, library: Path) -> None:
    project = new_project(made(tmp_path / "project"))
    for name in ("before", "edited", "same"):
        (project / f"{name}.py").write_text("x = 1\n")
    edit = """
for name in ("before", "edited", "made", "same"):
    text = "x = 1\\n" if name == "same" else "x = 2  # edited\\n"
    Path(f"{name}.py").write_text(text)
import edited, made, same
"""
    program = REPORT.replace("import late\n", "import late\n" + edit)
    (project / "program.py").write_text(f"import before\n{program}")
    late = report(project, ["program.py"], project=project, path=[library])[3]
    assert late == sorted(map(str, (library / "late.py", project / "edited.py", project / "made.py")))


@pytest.mark.parametrize("place", ["project", "library"])
def test_a_compiled_module_that_is_nowhere_kept_is_named_with_its_digest(
    tmp_path: Path, library: Path, place: str
) -> None:
    project = new_project(made(tmp_path / "project"))
    (project / ".gitignore").write_text("*.so\n")
    (source,) = Path(_cffi_backend.__file__).parent.glob("_cffi_backend*.so")
    path = Path(shutil.copy(source, tmp_path / place))
    (project / "program.py").write_text(
        f"import sys\nsys.path.insert(0, {str(path.parent)!r})\nimport _cffi_backend\n{REPORT}"
    )
    warning = f"{path} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"
    report(project, ["program.py"], project=project, path=[library], warning=warning)


def test_a_module_that_python_started_stands_under_its_own_name(tmp_path: Path, library: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (library / "alone.py").write_text(REPORT)
    (library / "kit" / "run.py").write_text(REPORT)
    assert report(tmp_path, ["-P", "-m", "alone"], project=project, path=[library])[0] == [".imported/alone/alone.py"]
    kept, _, command, _ = report(tmp_path, ["-P", "-m", "kit.run"], project=project, path=[library])
    assert kept == [
        f".imported/kit/kit/{name}" for name in ("__init__.py", "not_imported_yet.py", "run.py", "table.json")
    ]
    assert command["arguments"] == ["-P", "-m", "kit.run", "."]


def archive(**modules: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as files:
        files.writestr("program.py", "")
        for name, text in modules.items():
            files.writestr(f".imported/{name}/{name}.py", text)
    return buffer.getvalue()


def test_another_program_may_continue_a_run_with_the_same_modules() -> None:
    one, other = imported_digests(archive(model="x = 1", train=""), archive(model="x = 1", resume=""))
    assert one == other
    one, other = imported_digests(archive(model="x = 1", train=""), archive(model="x = 2", resume=""))
    assert one != other
    # This package's digest is the code's own.
    assert (
        imported_digests(archive(sonosco_mlflow="1"), archive(sonosco_mlflow="2"))[0]
        == imported_digests(archive(), archive())[1]
    )


def test_a_module_that_has_changed_since_is_refused_and_one_more_is_not(
    tmp_path: Path, tone_manifest: Manifest, tracking_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = new_project(tmp_path)
    files = {".imported/own/own.py": tmp_path / "elsewhere.txt"}
    files[".imported/own/own.py"].write_text("x = 1")
    monkeypatch.setattr(
        "sonosco_mlflow.tracking.code_snapshot.imported_code", lambda *_, **__: ImportedCode(dict(files), {})
    )
    stopped = run_experiment(toy_trainer(tone_manifest, stop_at=3), project)
    files[".imported/more/more.py"] = project / "model.py"
    stopped = go_on(stopped.run.id, toy_trainer(tone_manifest, stop_at=4), project)
    files[".imported/own/own.py"].write_text("x = 2")
    with pytest.raises(UserError, match=r"code: .*\.imported/own/own\.py(?s:.*)--allow-code-change"):
        go_on(stopped.run.id, toy_trainer(tone_manifest), project)
    again = go_on(stopped.run.id, toy_trainer(tone_manifest), project, allowed_changes=["code"])
    assert mlflow.get_run(again.run.id).data.tags["sonosco.state"] == "finished"


def test_what_is_installed_for_another_environment_is_installed(tmp_path: Path, library: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    other = tmp_path / "other" / "site-packages"
    other.parent.mkdir()
    library.rename(other)
    (other / "alone.py").write_text("import kit\n" + REPORT)
    assert report(tmp_path, ["-P", "-m", "alone"], project=project, path=[other])[0] == []


def test_of_a_package_that_holds_the_whole_project_only_what_was_imported_counts(tmp_path: Path, library: Path) -> None:
    project = tmp_path / "whole"
    (project / "runs").mkdir(parents=True)
    for name in ("__init__.py", "runs/other.py"):
        (project / name).write_text("")
    (project / "train.py").write_text(REPORT)
    kept = report(tmp_path, ["-m", "whole.train"], project=project, path=[library])[0]
    assert kept == [".imported/whole/whole/__init__.py", ".imported/whole/whole/train.py"]
