"""Documents from somebody who means harm: each is refused by name, and nothing is run or written."""

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sonosco_mlflow
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import may_be_built, qualified_name, serializable
from sonosco_mlflow.serialization.serializer import Deserializer

# What an attack needs sooner or later; the interpreter tells of each. Imports read and compile, and are told apart.
HARM = ("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "subprocess.Popen", "socket.connect")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")

_watched: list[str] = []
_is_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if _is_watching and (event in (*HARM, *CHANGES) or writes):
        _watched.append(f"{event}{arguments}")


sys.addaudithook(_watch)


@pytest.fixture(autouse=True, scope="module")
def modules_are_loaded() -> None:
    """What libraries do when they are imported (matplotlib makes a folder) is none of a document's doing."""
    classes_of_this_package()


@serializable
class Harmless:
    def __init__(self, value: object = None) -> None:
        self.value = value


class Wiper:
    """In the script of the reader, and not marked."""

    def __init__(self, path: object) -> None:
        raise AssertionError("was built")


def build(document: Any, **options: Any) -> Any:
    global _is_watching
    _watched.clear()
    _is_watching = True
    try:
        return Deserializer(**options).build(document)
    finally:
        _is_watching = False
        assert _watched == []


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "posix:system", "subprocess:Popen", "builtins:eval", "builtins:exec", "builtins:__import__"),
        *("builtins:open", "builtins:getattr", "builtins:type", "importlib:import_module", "shutil:rmtree"),
        *("sonosco_mlflow.serialization.durable:os.system", "sonosco_mlflow.outcome:os", "torch.nn.modules.module:os"),
        *("torch.nn:Module.__init__.__globals__", "torch.nn.modules.module:Module.__init__"),
        *("torch.nn.modules.module:Module.__class__.__base__", "torch.nn.modules.linear:Linear.__subclasses__"),
        *("sonosco_mlflow.__main__:main", "__main__:__builtins__.eval", "__main__:__loader__", "sonosco_mlflow:os"),
        *("sonosco_mlflow.cli:main", "sonosco_mlflow.serialization.durable:clear_directory"),
        *("sonosco_mlflow.serialization.durable:AppendedFile", "sonosco_mlflow.tracking.checkpoints:fetch_checkpoint"),
        *("sonosco_mlflow.serialization.serializer:Deserializer", "sonosco_mlflow.experiment:Experiment.create"),
        *("torch.nn.modules.module:Module.load_state_dict.x", "torch:load", "torch.hub:load", "torch.jit:load"),
        *("torch.nn.modules..linear:Linear", "torch.nn.\0:x", "torch.nn", ":", "", ".", "a:b:c", "__main__.x:y", "é:é"),
        *("torch.nn.modules.linear:Linear:x", "torch.nn.modules.linear:", "builtins:", "torch._C._nn:__loader__"),
    ],
)
def test_no_name_leads_out_of_what_a_document_may_mean(name: str) -> None:
    documents: list[Any] = [
        {"$name": name},
        {"$object": name, "parameters": {}},
        {"$object": name, "parameters": {"path": "x", "command": "true", "args": ["true"]}},
        {"$enum": name, "name": "x"},
        {"$enum": name, "value": 1},
        {"$partial": {"$name": name}, "arguments": ["true"], "keywords": []},
    ]
    for document in documents:
        with pytest.raises(UserError):
            build(document)
        with pytest.raises(UserError):
            build({"$object": qualified_name(Harmless), "parameters": {"value": document}})


@pytest.mark.parametrize(
    "name",
    [
        *(
            "torch.nn.functional:relu",
            "torch.nn.init:uniform_",
            "torch.optim.sgd:SGD",
            "builtins:int",
            "builtins:bytes",
        ),
        *("torch.nn.parallel.distributed:DistributedDataParallel", "torch.nn.parameter:Parameter"),
        *("torch.nn.modules.module:Module.register_buffer", "sonosco_mlflow.metrics:word_error_rate"),
        *("torch.optim.lr_scheduler:LRScheduler", "sonosco_mlflow.errors:UserError"),
    ],
)
def test_what_may_be_named_is_not_called(name: str) -> None:
    with pytest.raises(UserError):
        build({"$object": name, "parameters": {"lr": 0.1, "x": 1}})


@pytest.mark.parametrize("options", [{}, {"trusted": [__name__]}], ids=["not trusted", "trusted"])
def test_a_class_that_nobody_marked_is_not_built_even_in_a_trusted_module(options: Any) -> None:
    with pytest.raises(UserError, match=r"is not trusted|is not a class that documents may build"):
        build({"$object": qualified_name(Wiper), "parameters": {"path": "/"}}, **options)


def test_a_path_is_data_and_a_partial_function_is_not_called(tmp_path: Path) -> None:
    target = tmp_path / "never"
    document = {"$object": qualified_name(Harmless), "parameters": {"value": {"$path": str(target)}}}
    assert build(document).value == target
    partial = build(
        {"$partial": {"$name": qualified_name(Harmless)}, "arguments": [{"$path": str(target)}], "keywords": []}
    )
    assert partial.func is Harmless
    assert not target.exists()


def classes_of_this_package() -> list[type[Any]]:
    found = []
    for module in pkgutil.walk_packages(sonosco_mlflow.__path__, "sonosco_mlflow."):
        if not module.name.endswith("__main__"):
            contents = vars(importlib.import_module(module.name)).values()
            found += [item for item in contents if isinstance(item, type) and item.__module__ == module.name]
    return sorted(found, key=qualified_name)


def test_no_class_of_this_package_that_may_be_built_changes_anything_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a path for every parameter that sounds like one, and a text for every other."""
    monkeypatch.chdir(tmp_path)
    buildable = [item for item in classes_of_this_package() if may_be_built(item)]
    assert len(buildable) > 20
    for item in buildable:
        parameters: dict[str, Any] = {}
        for name in inspect.signature(item).parameters:
            is_place = any(word in name for word in ("path", "dir", "folder", "file", "root", "store"))
            parameters[name] = {"$path": str(tmp_path / "evil" / name)} if is_place else "evil"
        try:
            build({"$object": qualified_name(item), "parameters": parameters})
        except UserError:
            continue
    assert list(tmp_path.iterdir()) == []


def deep(make: Callable[[Any], Any]) -> Any:
    document: Any = 1
    for _ in range(100_000):
        document = make(document)
    return document


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: [inner],
        lambda inner: {"a": inner},
        lambda inner: {"$tuple": [inner]},
        lambda inner: {"$pairs": [["a", inner]]},
        lambda inner: {"$object": qualified_name(Harmless), "parameters": {"value": inner}},
        lambda inner: {"$partial": inner, "arguments": [], "keywords": []},
    ],
)
def test_a_deep_document_is_refused(make: Callable[[Any], Any]) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        build(deep(make))


HARMLESS = qualified_name(Harmless)
WRONG: dict[str, list[Any]] = {
    "$tuple": [3, None, "ab", {}],
    "$set": [3, [[1]], [{"a": 1}], {}],
    "$frozenset": [3, [[]]],
    "$pairs": [3, [1], [[1]], [[1, 2, 3]], {}, [[[], 1]], [[1, 1], [1, 2]], [[1, 1], [True, 2]]],
    "$ordered": [3, [1], [["a", 1], ["a", 2]]],
    "$float": ["abc", "1.5", 3, None, [], "Infinity"],
    "$bytes": ["ä", "a", 3, None, "a b"],
    "$path": [3, None, []],
    "$range": [3, [], [1, 2], [1, 2, 0], ["a", 1, 1], [1.5, 2, 1], None],
    "$numpy": ["float32", "load", 3, None],
    "$device": ["x", 3, None, "", []],
    "$dtype": ["load", "nn", "__builtins__", 3, None, "Tensor"],
    "$enum": ["x:y", 3, None],
    "$name": [3, None, [], {}],
    "$partial": ["os:system", 3, {"$name": HARMLESS}],
    "$object": [HARMLESS, 3, None],
    "$same": [1, "1", None, [], True],
    "$external": [3, None, ["x"]],
    "$unknown": [1],
    "$": [1],
    "$eval": ["1"],
}


@pytest.mark.parametrize(("tag", "content"), [(tag, content) for tag, all_of in WRONG.items() for content in all_of])
def test_a_tag_with_what_does_not_fit_is_named(tag: str, content: Any) -> None:
    name = tag.replace("$", r"\$")
    for document in ({tag: content}, [{"a": {tag: content}}]):
        with pytest.raises(UserError, match=rf"'{name}'"):
            build(document)


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({"$tuple": [], "more": 1}, r"'\$tuple' does not fit"),
        ({"more": 1, "$float": "nan"}, r"'\$float' does not fit"),
        ({"$path": "a", "$float": "nan"}, r"'\$path' does not fit"),
        ({"$numpy": "int8", "value": 300}, r"'\$numpy' does not fit"),
        ({"$numpy": "int8", "value": 1.5}, "1.5 is no int8"),
        ({"$numpy": "float32", "value": 0.1}, "0.1 is no float32"),
        ({"$numpy": "int8", "value": "1"}, "expected a number"),
        ({"$enum": "sonosco_mlflow.text:SpecialToken", "name": "EVIL"}, "has no member 'EVIL'"),
        ({"$enum": "sonosco_mlflow.text:SpecialToken", "value": 99}, "has no member 99"),
        ({"$enum": "sonosco_mlflow.text:SpecialToken", "name": 3}, r"'\$enum' does not fit"),
        ({"$enum": HARMLESS, "name": "value"}, "is not an Enum"),
        ({"$object": HARMLESS, "parameters": {"value": 1, "other": 2}}, "cannot be built from"),
        ({"$object": HARMLESS, "parameters": [], "x": 1}, r"'\$object' does not fit"),
        ({"$object": HARMLESS, "parameters": {1: 2}}, "cannot be built"),
        ({"$object": HARMLESS, "parameters": {}, "shared": "1"}, "'shared' is '1'"),
        ([{"$object": HARMLESS, "parameters": {}, "shared": 1}] * 2, "'shared' is 1"),
        ({"$object": HARMLESS, "parameters": {"value": {"$same": 1}}, "shared": 1}, "contains itself"),
        ({"$partial": {"$tuple": []}, "arguments": [], "keywords": []}, "expected a function"),
        ({"$partial": {"$name": HARMLESS}, "arguments": [], "keywords": [[1, 2]]}, "expected a function and keywords"),
        ({1: 2}, "keys"),
        ({"a": {None: 2}}, "keys"),
        ({"$external": "loader"}, "must be given"),
        (
            {"$object": "torch.nn.modules.linear:Linear", "parameters": {"in_features": 10**30, "out_features": 1}},
            "built",
        ),
        ({"$object": "torch.nn.modules.linear:Linear", "parameters": {"in_features": -1, "out_features": 1}}, "built"),
        ({"$object": "torch.nn.modules.container:Sequential", "parameters": {"args": 3}}, "cannot be built"),
        ({"$object": "torch.nn.modules.container:Sequential", "parameters": {"args": [3]}}, "cannot be built"),
    ],
)
def test_documents_of_a_wrong_shape_are_refused(document: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        build(document)


def test_huge_numbers_are_numbers() -> None:
    text = json.dumps([10**4000, -(10**4000)]) + "\n"
    assert build(json.loads(text)) == [10**4000, -(10**4000)]


def test_a_string_of_names_is_not_taken_for_names() -> None:
    with pytest.raises(UserError, match="lists of names"):
        Deserializer(trusted="os")


# ---------------------------------------------------------------------- what acts where a document says


def called(*arguments: object) -> None:
    raise AssertionError("was called")


@pytest.mark.parametrize(
    "kind", [{"$name": f"{__name__}:called"}, {"$name": "torch.nn.modules.linear:Linear"}, "text", None]
)
def test_only_a_class_of_optimizers_is_called_as_one(kind: object) -> None:
    document = {
        "$object": "sonosco_mlflow.training.optimizer:OptimizerRecipe",
        "parameters": {"kind": kind, "groups": []},
    }
    recipe = Deserializer(trusted=[__name__]).build(document)
    with pytest.raises(UserError, match="is no class of optimizers"):
        recipe.build(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "parameters", "match"),
    [
        ("sonosco_mlflow.training.callbacks.model_checkpoint:ModelCheckpoint", ["directory"], "is forged"),
        ("sonosco_mlflow.tracking.tensorboard:TensorBoard", ["directory"], "is forged"),
        ("sonosco_mlflow.tracking.journal:Journal", ["path", "send"], "is not a class"),
        ("sonosco_mlflow.tracking.recording:Recording", ["run", "lease", "folder"], "is not a class"),
    ],
)
def test_no_document_says_where_files_are_written(tmp_path: Path, name: str, parameters: list[str], match: str) -> None:
    place = {"$path": str(tmp_path / "victim")}
    with pytest.raises(UserError, match=match):
        build({"$object": name, "parameters": dict.fromkeys(parameters, place)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["torch.nn.attention._fa3:_fa3_import_module", "torch.nn.functional:_verify_batch_size", "torch._C._nn:_x"]
)
def test_private_parts_of_torch_are_not_named(name: str) -> None:
    with pytest.raises(UserError, match="is private to torch"):
        build({"$name": name})
