import os
import subprocess
import sys
from pathlib import Path

import pytest

from sonosco_mlflow.data.corpora import CORPORA, base, bring_corpus
from sonosco_mlflow.data.corpora.base import make_audio_folder, some
from sonosco_mlflow.errors import UserError

SOURCES = Path(base.__file__).parents[3]


def test_the_corpora_that_are_promised() -> None:
    published = ("an4", "librispeech", "tedlium", "voxforge", "common-voice")
    lists = ("sonosco-csv", "nemo", "lhotse", "kaldi")
    assert {*CORPORA} == {"default", "folder", *published, *lists}


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpus: found 'an5'.*did you mean 'an4'\?"):
        bring_corpus("an5", tmp_path)


WITHOUT_PARTS = ("default", "an4", "folder", "tedlium", "voxforge")


@pytest.mark.parametrize("name", WITHOUT_PARTS)
def test_a_corpus_without_parts_refuses_them_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data\.parts: found \{'train': \['x'\]\}, but .* is not made of parts"):
        bring_corpus(name, tmp_path, source=None, parts={"train": ["x"]})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"trian": ["x"]}, r"data\.parts: found the split 'trian', did you mean 'train'\?"),
        ({"dev": ["x"]}, r"data\.parts: names no part for train"),
        ({"train": []}, r"data\.parts: names no part for train"),
        ({"train": ["x"], "dev": ["y", "x"]}, r"data\.parts: found 'x' in train and in dev\. Expected each part once"),
        ({"train": ["x", "x"]}, r"data\.parts: found 'x' in train and in train"),
    ],
)
@pytest.mark.parametrize("name", CORPORA)
def test_parts_that_make_no_splits_are_refused(
    tmp_path: Path, name: str, parts: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        bring_corpus(name, tmp_path, parts=parts)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_not_cut_may_have_parts_for_testing_alone(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(UserError, match="the folder with the lists"):
        bring_corpus("sonosco-csv", tmp_path / "out", str(tmp_path / "x.csv"), {"test": ["x"]}, hold_out=False)
    with pytest.raises(UserError, match=r"data\.source: \S+ has no utterances\."):
        bring_corpus("sonosco-csv", tmp_path / "out", str(tmp_path), {"test": ["x"]}, hold_out=False)


def test_neither_torch_nor_mlflow_is_imported() -> None:
    code = (
        "import importlib, sys\n"
        "from sonosco_mlflow.data.corpora.base import _MODULES\n"
        "[importlib.import_module(name) for name in _MODULES.values()]\n"
        "sys.exit(sorted({'torch', 'mlflow', 'espeakng_loader', 'lhotse'} & set(sys.modules)) or 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0


@pytest.mark.parametrize("place", [".", "inside", "inside/deeper.tar.gz"])
def test_a_source_inside_the_output_is_left_alone(tmp_path: Path, place: str) -> None:
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("mine")
    with pytest.raises(UserError, match=r"data\.source: .* lies in "):
        bring_corpus("folder", tmp_path, source=str(tmp_path / place))
    assert manifest.read_text() == "mine"


def test_a_foreign_audio_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "mine.wav").touch()
    with pytest.raises(UserError, match="was not made by sonosco"):
        bring_corpus("default", tmp_path)
    assert (tmp_path / "wav" / "mine.wav").exists()


def test_an_earlier_corpus_goes_before_the_next_one_comes(tmp_path: Path) -> None:
    audio = make_audio_folder(tmp_path)
    (audio / "speaker").mkdir()
    (audio / "speaker" / "old.wav").touch()
    (tmp_path / "dev.jsonl").touch()
    with pytest.raises(UserError, match="needs one"):
        bring_corpus("folder", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_many_names_are_cut_to_five() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdef")) == "a, b, c, d, e, ... (6 in all)"
