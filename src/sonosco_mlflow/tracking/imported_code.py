"""Code that a process has imported from anywhere but its environment: this package, a program, the modules beside it.

What is installed is known by its version. All else that runs is kept with the run, also where git knows nothing of it:
from outside the run's folder under :data:`IMPORTED`, each module or package in a folder called as it is: where it was
found is no code. What a program has loaded by a path of its own, past ``sys.path``, is not found.

>>> imported_code(Path(), in_git=True).files                        # doctest: +SKIP
{'.imported/own/own/model.py': PosixPath('/home/me/lib/own/model.py'), ...}
"""

import os
import site
import sys
import sysconfig
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

IMPORTED = ".imported"
CODE = frozenset({".py", ".pyi", ".pyx", ".so"})
_SETTINGS = frozenset({".json", ".yaml", ".yml", ".toml", ".html"})
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ImportedCode:
    """What a process has imported.

    Attributes:
        files: each file by its name in the run's code.
        places: of each folder that modules were found in, what it is called in the run's code.
        modules: what was imported by then, wherever it is kept.
    """

    files: dict[str, Path]
    places: dict[Path, list[str]]
    modules: frozenset[Path] = frozenset()

    def place_of(self, path: Path) -> str | None:
        """Return the name of a file in the run's code, or None where it is not among it."""
        return next((name for name, file in self.files.items() if file == path.resolve()), None)


def imported_code(root: Path, *, in_git: bool) -> ImportedCode:
    """Return what this process has imported so far; of packages all code, since more may be imported later.

    Args:
        root: the folder whose code is kept.
        in_git: whether git says what in ``root`` is code; then nothing of it is added here.
    """
    root = root.resolve()
    files: dict[str, Path] = {}
    places: dict[Path, list[str]] = {}
    sources = _sources()
    for source, modules in sorted(sources.items(), key=lambda item: (item[0].name, item[0].folder)):
        inside = source.folder.is_relative_to(root) and not is_installed(source.folder)
        top = source.name.partition("/")[0].removesuffix(".py")
        place = source.folder.relative_to(root).as_posix() if inside else f"{IMPORTED}/{top}"
        known = places.setdefault(source.folder, [])
        known += [] if place in known else [place]
        if inside and in_git:
            continue
        # A package that holds the whole project has its runs and data as well.
        for path in modules if root.is_relative_to(source.path) else source.files():
            files[Path(place, path.relative_to(source.folder)).as_posix()] = path
    return ImportedCode(files, places, frozenset(path for modules in sources.values() for path in modules))


def ignored_imports(root: Path, listed: Container[Path]) -> list[Path]:
    """Return what was imported from the repository ``root`` and is not among what git lists of it."""
    root = root.resolve()
    found = (path for source, modules in _sources().items() if source.path.is_relative_to(root) for path in modules)
    return sorted(path for path in found if path.is_relative_to(root) and path not in listed)


def compiled_imports(kept: Container[Path]) -> list[Path]:
    """Return the compiled modules that were imported, are not installed, and are not among what is ``kept``."""
    files = (getattr(module, "__file__", None) for module in sys.modules.copy().values())
    compiled = (file for file in files if isinstance(file, str) and file.endswith(tuple(EXTENSION_SUFFIXES)))
    found = {Path(file).resolve() for file in compiled if not is_installed(file)}
    return sorted(path for path in found if path.is_file() and path not in kept)


def is_the_programs(name: str) -> bool:
    """Return whether a file of a run's code is neither the repository's nor this package's, by its name there."""
    return name.startswith(f"{IMPORTED}/") and not name.startswith(f"{IMPORTED}/{_PACKAGE.name}/")


@dataclass(frozen=True)
class _Source:
    """A module or package that stands on its own.

    Attributes:
        folder: where it was found.
        name: of its file or folder there.
    """

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The file or the folder."""
        return self.folder / self.name

    def files(self) -> Iterator[Path]:
        """Yield its files, those of a package only as far as they may be code, or settings that code reads."""
        if self.path.is_file():
            yield self.path
            return
        for file in sorted(self.path.rglob("*")):
            is_hidden = any(part.startswith(".") for part in file.relative_to(self.path).parts)
            if file.is_file() and not file.is_symlink() and file.suffix in CODE | _SETTINGS and not is_hidden:
                yield file


def _sources() -> dict[_Source, list[Path]]:
    """Return what was imported, and of each source the files that were."""
    searched = {Path(entry).resolve() for entry in sys.path}
    found: dict[_Source, list[Path]] = {_Source(_PACKAGE.parent, _PACKAGE.name): []}
    for name, module in sys.modules.copy().items():
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or is_installed(file):
            continue
        # The folder's links are resolved, the file's own is not: by that name it is imported.
        path = Path(file).parent.resolve() / Path(file).name
        if path.is_relative_to(_PACKAGE) or not path.is_file():
            continue
        # What `python -m` has started is called otherwise while it runs.
        spec = getattr(module, "__spec__", None)
        source = _source(name if spec is None else spec.name, path)
        if source.folder in searched or name == "__main__":
            known = found.setdefault(source, [])
            known += [] if path in known else [path]
    return found


def _source(name: str, path: Path) -> _Source:
    """Return what module ``name`` at ``path`` belongs to: the outermost package with a file, else itself."""
    parts = name.split(".")
    for depth in range(len(parts)):
        initial = getattr(sys.modules.get(".".join(parts[: depth + 1])), "__file__", None)
        if isinstance(initial, str) and Path(initial).name == "__init__.py":
            path = Path(initial).resolve().parent
            break
    else:
        depth = len(parts) - 1
    folder = path.parents[min(depth, len(path.parents) - 1)]
    return _Source(folder, path.relative_to(folder).as_posix())


def is_installed(path: Path | str) -> bool:
    """Return whether a path is Python's own, or of what is installed for it, also in another environment's folders."""
    # As a text: there are thousands of modules.
    place = f"{path}{os.sep}"
    return any(name in place for name in _INSTALLED) or place.startswith(_installed())


@cache
def _installed() -> tuple[str, ...]:
    schemes = sysconfig.get_paths()
    folders = {schemes[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    folders |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(f"{form}{os.sep}" for folder in sorted(folders) for form in (folder, Path(folder).resolve()))
