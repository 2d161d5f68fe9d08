import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace

import pytest

from sonosco_mlflow.tracking.changes import Change, code_changes, listed, unified_code_diff
from sonosco_mlflow.tracking.comparison import Parting
from sonosco_mlflow.tracking.difference import likeliest_first


def archive(files: Mapping[str, str | bytes], executable: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o100755 if name in executable else 0o100644) << 16
            packed.writestr(entry, content)
    return buffer.getvalue()


BEFORE = {
    "same.py": "a",
    "lr.py": "a = 1\nlr = 0.1\n",
    "gone.py": "x\n",
    "run.sh": "ls\n",
    "b.bin": b"\xff\x00",
    "end": "a",
}
AFTER = {
    "same.py": "a",
    "lr.py": "a = 1\nlr = 0.2\n",
    "new.py": "y\n",
    "run.sh": "ls\n",
    "b.bin": b"\xff\x01",
    "end": "b",
}
DIFFERENCE = """\
b.bin: no text; 2 bytes before, 2 now
--- a/end
+++ b/end
@@ -1 +1 @@
-a
\\ no newline at its end
+b
\\ no newline at its end
--- a/gone.py
+++ /dev/null
@@ -1 +0,0 @@
-x
--- a/lr.py
+++ b/lr.py
@@ -1,2 +1,2 @@
 a = 1
-lr = 0.1
+lr = 0.2
--- /dev/null
+++ b/new.py
@@ -0,0 +1 @@
+y
mode of run.sh: 100644 -> 100755
"""


def test_code_that_differs_is_shown_line_by_line() -> None:
    recipe = {"params.yaml": "of the recipe", "dvc.lock": "of the data"}
    one, other = archive({**BEFORE, **recipe}), archive(AFTER, executable=("run.sh",))
    assert code_changes(one, other) == ["b.bin", "end", "gone.py", "lr.py", "new.py", "run.sh"]
    assert unified_code_diff(one, other) == DIFFERENCE
    assert unified_code_diff(one, one) == ""


def test_of_many_names_the_first_are_listed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(tuple("abcdefghi")) == "a, b, c, d, e, f and 3 more"


CONFIG = Change("config", ("optimizer.lr was 1, is 2",))
IDLE = Change("config", ("data.processes was 1, is 2",), matters=False)
TRAIN = Change("data", ("train: utterance a was added", "dev: utterance b was added"))
HELD_OUT = Change("data", ("dev: utterance b was added", "data/features/dev/shard-00000.npy: other bytes"))
CODE = Change("code", ("src/model.py",))
DOCS = Change("code", ("docs/index.md",), matters=False)
NUMERICS = Change("numerics", ("threads was 1, is 2",))
DECODING = Change("decoding", ("decoding.beam was 1, is 4",), matters=False)
TESTED = Parting(6, "test_word_error_rate was 1.0, is 0.5")
TRAINING, EVALUATION = Parting(3, "train_loss was 1.0, is 2.0"), Parting(6, "val_loss was 1.0, is 2.0")


@pytest.mark.parametrize(
    ("changes", "parting", "expected"),
    [
        ([NUMERICS, CODE, TRAIN, CONFIG], TRAINING, [CONFIG, TRAIN, CODE, NUMERICS]),
        ([NUMERICS, DOCS, IDLE], TRAINING, [NUMERICS, IDLE, DOCS]),
        ([HELD_OUT, CODE, CONFIG], TRAINING, [CONFIG, CODE, HELD_OUT]),
        ([CODE, CONFIG, HELD_OUT], EVALUATION, [HELD_OUT, CONFIG, CODE]),
        ([CODE, CONFIG, HELD_OUT], Parting(6, "only the other has val_loss"), [HELD_OUT, CONFIG, CODE]),
        ([CODE, CONFIG], None, [CONFIG, CODE]),
        ([CODE, DECODING, CONFIG], EVALUATION, [CONFIG, CODE, DECODING]),
        ([CODE, DECODING, CONFIG], TESTED, [replace(DECODING, matters=True), CONFIG, CODE]),
    ],
)
def test_the_likeliest_cause_comes_first(
    changes: list[Change], parting: Parting | None, expected: list[Change]
) -> None:
    assert likeliest_first(changes, parting) == expected
