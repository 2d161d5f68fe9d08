"""Serializer and Deserializer: objects as the classes and parameters that make them again.

A class marked ``@serializable`` remembers the parameters that its constructor was given. The Serializer writes
them down, nested, as JSON, and the Deserializer builds the same object from that, without any code of the user's:

>>> @serializable
... class Smoother:
...     def __init__(self, window: int = 3) -> None:
...         self.window = window
>>> document = Serializer().describe(Smoother(5))
>>> Deserializer().build(document).window
5

Nothing is pickled. A class or function is named as ``module:qualified.name``, and only these are ever imported: what is
marked ``@serializable`` (callbacks are by themselves), this package, ``torch.nn`` and ``torch.optim``, the script that
is running, and modules that the reader trusts by name. Of these, only classes are ever called, and only such as are
marked, dataclasses and named tuples, or torch's own modules and schedulers.

An object that is given twice is one object again; a list that is given twice becomes two. All else comes back with
the type and value that it had, or is refused when it is written.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.construction import Construction
from sonosco_mlflow.serialization.description import Description, external_objects
from sonosco_mlflow.serialization.names import resolve

if TYPE_CHECKING:
    from sonosco_mlflow.serialization.checkpoint import Snapshot


class Serializer:
    """Writes objects down as JSON documents.

    A class may name those of its parameters that are given anew when it is read (data loaders), as
    ``external_parameters``; wherever inside the object they occur, their name stands for them.

    One that has a ``digest`` (text) must have the same when it is given anew.

    Args:
        external: further objects that are given anew, by name. Plain values (None, numbers, text) are written down all
            the same: they cannot be told from others that are equal.
    """

    def __init__(self, external: Mapping[str, object] | None = None) -> None:
        self._external = external_objects(external or {})

    def serialize(self, value: Any, path: str | Path, step: int = 0, digests: Mapping[str, str] | None = None) -> Path:
        """Write ``value`` and its state as a checkpoint under ``path``, and return the checkpoint's directory.

        Args:
            value: what is written; its state is what ``value.state_dict()`` returns, if it has one.
            path: folder of checkpoints.
            step: how far the state has come; it names the checkpoint.
            digests: of what the state belongs to.

        Raises:
            UserError: something in ``value`` cannot be written down.
        """
        # Imported here: marking a class as serialisable should not cost torch.
        from sonosco_mlflow.serialization.checkpoint import write_checkpoint

        return write_checkpoint(Path(path), self.snapshot(value, step, digests=digests))

    def snapshot(
        self,
        value: Any,
        step: int,
        *,
        batches: int = 0,
        parent: str | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> "Snapshot":
        """Return ``value`` and its state as they are now, to be written as a checkpoint whenever.

        Args:
            value: what is described; its state is what ``value.state_dict()`` returns, if it has one.
            step: how far the state has come.
            batches: batches of a step that is not finished.
            parent: name of the checkpoint before it.
            digests: of what the state belongs to.

        Raises:
            UserError: something in ``value`` cannot be written down.
        """
        from sonosco_mlflow.serialization.checkpoint import Snapshot

        state = value.state_dict() if hasattr(value, "state_dict") else {}
        return Snapshot.take(self.describe(value), _parts(state), step, batches=batches, parent=parent, digests=digests)

    def describe(self, value: Any, path: str = "") -> Any:
        """Return the JSON document of ``value``.

        Raises:
            UserError: ``value``, or something in it, cannot be written down; the message gives its path and a remedy.
        """
        return Description(self._external).document(value, path)


def _parts(state: Mapping[str, object]) -> Mapping[str, object]:
    """Return ``state`` as parts with a file each: its entries where all are trees themselves, else the whole."""
    parted = all(name.isidentifier() and isinstance(entry, Mapping) for name, entry in state.items())
    return state if parted and state.keys() != {"state"} else {"state": state}


def _require_types(value: Any, state: Mapping[str, Any]) -> None:
    """Refuse an object that has taken tensors in a type of its own: their values would be others."""
    now = value.state_dict() if state else {}
    for name, kept in state.items():
        found = getattr(now.get(name), "dtype", None)
        if found is not None and found != getattr(kept, "dtype", found):
            raise UserError(
                f"'{name}' was written as {kept.dtype}, and the {type(value).__name__} that was built again has "
                f"{found}: its type was changed after it was made. Let its constructor make it so, or make it yourself "
                "and give it the state that read_checkpoint returns"
            )


class Deserializer:
    """Builds objects from the documents of a :class:`Serializer`.

    Args:
        trusted: names of further modules (their submodules included) that may be imported.
        fetch: brings what a URI (``runs:/...``) names into a folder and returns where it lies there.
        allow_changed: names of objects given anew that need not have the digest of those that were written.
    """

    def __init__(
        self,
        trusted: Iterable[str] = (),
        fetch: Callable[[str, Path], Path] | None = None,
        *,
        allow_changed: Iterable[str] = (),
    ) -> None:
        if isinstance(trusted, str) or isinstance(allow_changed, str):
            raise UserError("trusted and allow_changed are lists of names: write ['name']")
        self.trusted = tuple(trusted)
        self.fetch = fetch
        self.allow_changed = frozenset(allow_changed)

    def deserialize(self, path: str | Path, **external: object) -> Any:
        """Return the object that a :class:`Serializer` wrote, with all its state.

        Args:
            path: a checkpoint, a folder of checkpoints (the newest whole one is read), or a URI.
            external: the objects that are given anew, by name.

        Raises:
            UserError: there is no whole checkpoint, the object cannot be built, does not take its state, or an external
                object is missing.
        """
        from sonosco_mlflow.serialization.checkpoint import read_newest_checkpoint

        with self._local(path) as folder:
            checkpoint = read_newest_checkpoint(folder)
        value = self.build(checkpoint.objects, **external)
        if hasattr(value, "load_state_dict"):
            state = checkpoint.state
            state = state["state"] if state.keys() == {"state"} else state
            with checkpoint.loading():
                value.load_state_dict(state)
            _require_types(value, state)
        return value

    def build(self, document: Any, **external: object) -> Any:
        """Return the object of ``document``, with ``external`` objects in their places.

        Raises:
            UserError: the document is malformed, names something that is not trusted or does not exist, or an external
                object is missing or has changed.
        """
        try:
            return Construction(document, external, resolve=self.resolve, allow_changed=self.allow_changed).value(
                document
            )
        except RecursionError as error:
            raise UserError("the document is nested too deeply to be read") from error

    def resolve(self, name: str) -> Any:
        """Return the class or function called ``module:qualified.name``.

        Raises:
            UserError: it is neither registered nor in a trusted module, or it does not exist.
        """
        return resolve(name, self.trusted)

    @contextmanager
    def _local(self, path: str | Path) -> Iterator[Path]:
        if isinstance(path, Path) or not re.match(r"[a-z][a-z0-9+.-]+:/", path):
            yield Path(path)
            return
        if self.fetch is None:
            raise UserError(f"'{path}' is not on this machine; give the Deserializer a way to fetch it, or a folder")
        with tempfile.TemporaryDirectory(prefix="sonosco-checkpoint-") as scratch:
            yield self.fetch(path, Path(scratch))
