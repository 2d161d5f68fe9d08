"""What is taken for a secret and what is not: both kinds of mistake cost something."""

import os
import subprocess
from pathlib import Path

import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking import secrecy
from sonosco_mlflow.tracking.secrecy import (
    holds_secret,
    is_secret,
    require_no_secrets,
    without_secret_options,
    without_secrets,
)

# Put together, so that this file is no secret itself.
LOGIN = "https://bob:" + "hunter2-of-bob@pypi.example.org/simple"
TOKENS = (
    "ghp_" + "k9Zq" * 9,
    "hf_" + "k9Zq" * 9,
    "sk-" + "A1b2" * 12,
    "sk-proj-" + "A1b2" * 12,
    "AIza" + "a1B-_" * 7,
    "GOCSPX-" + "a1B2" * 7,
    "pypi-" + "AgEIcHlwaS5vcmc" + "a1B2" * 9,
    "AKIA" + "A1B2" * 4,
    "dapi" + "0a1b" * 8,
    "xoxb-" + "1234567890-abcdefghij",
)


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_found_in_any_text(token: str) -> None:
    assert holds_secret(Path("a.txt"), f"it is '{token}'.\n".encode())
    assert without_secrets(f"--token={token} --rate=1") == "--token=*** --rate=1"
    assert not holds_secret(Path("a.txt"), f"x{token}".encode()), "the end of another word"


@pytest.mark.parametrize(
    "name",
    [".dvc/config.local", ".docker/config.json", ".s3cfg", "_netrc", "client_secret_123.json", "credentials.csv"],
)
def test_names_of_secrets_and_their_places(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x\n")
    assert is_secret(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pip.conf", f"[global]\nindex-url = {LOGIN}\n"),
        ("requirements-private.txt", "git+https://x:" + "tok-abcdefgh@example.org/a.git\n"),
        ("train.py", "url = 'postgresql://me:" + "p4ssw0rd-of-me@db.example.org/runs'\n"),
        ("backup.asc", "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\nabc\n"),
    ],
)
def test_passwords_and_keys_are_found_by_what_they_are_in(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert is_secret(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "url = f'https://{user}:{password_of_user}@example.org/'",
        "git clone https://x-access-token:${GITHUB_TOKEN}@github.com/a/b",
        "createdb postgresql://postgres:postgres@localhost:5432/test",
        "as in https://username:password@example.org or mysql://scott:tiger@host",
        "as in https://me:your-password-here@example.org, or https://me:MY_SECRET_TOKEN@example.org",
        "sqlalchemy.url = driver://user:pass@localhost/dbname",
        "ssh://git@example.org:2222/a.git and http://localhost:5000/#/experiments/0",
        "<div id='sk-container-id-1' class='sk-top-container sk-estimator-doc-link-of-a-classifier'>",
        "brokers at kafka://one:9092,two:9092,me@three:9092",
        "from https://example.org:8080/packages/@scope/name",
    ],
)
def test_what_only_looks_like_one_stays(content: str) -> None:
    assert not holds_secret(Path("a.py"), content.encode())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *((f"{option} = x", True) for option in ("password", "token", "session_token", "client_secret")),
        *((f"{option} = x", True) for option in ("gdrive_client_secret", "oss_key_secret", "secret_access_key")),
        ("url = https://u:" + "pw@example.org/x", True),
        ("url = s3://bucket/token", False),
        ("ask_password = true", False),
        ("access_key_id = x", False),
    ],
)
def test_the_settings_of_a_remote(line: str, expected: bool) -> None:
    assert holds_secret(Path("a/.dvc/config"), f"['remote \"r\"']\n    {line}\n".encode()) == expected


def test_a_token_is_found_in_a_large_notebook(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text("x" * 2_000_000 + f" {TOKENS[0]} ")
    assert is_secret(tmp_path / "a.ipynb")


@pytest.mark.parametrize(
    "name",
    ["KAGGLE_KEY", "GITHUB_PAT", "AZURE_STORAGE_CONNECTION_STRING", "DB_PASSWORD", "MY_SERVICE_CREDENTIALS"],
)
@pytest.mark.parametrize("value", ["correct-horse-battery", "/wJalrXUtnFEMIK7MDENG"])
def test_variables_that_hold_a_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"it is {value}!") == "it is ***!"
    assert holds_secret(Path("a.txt"), value.encode())


def test_a_variable_may_name_what_lies_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SSH_KEY", str(tmp_path))
    assert without_secrets(f"in {tmp_path}") == f"in {tmp_path}"


def test_each_line_of_a_key_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRIVATE_KEY", "-----BEGIN\nline-two-of-the-key\n  and words of a comment\n---END")
    assert without_secrets("line-two-of-the-key, and words of a comment") == "***, and words of a comment"


def test_a_secret_that_is_no_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = b"\xffcorrect-horse\xfe"
    monkeypatch.setitem(os.environ, "MY_TOKEN", os.fsdecode(secret))
    assert holds_secret(Path("a.txt"), b"it is " + secret)
    assert not holds_secret(Path("a.txt"), b"it is not")


def test_an_address_loses_what_stands_behind_it() -> None:
    assert without_secrets("at https://h/cb#access_token=abc&x=1, done") == "at https://h/cb done"
    assert without_secrets("at http://h/#/experiments/0") == "at http://h/#/experiments/0"


@pytest.mark.parametrize(
    "value",
    [
        *TOKENS[:2],
        LOGIN,
        "postgresql://me:" + "pass@localhost/runs",
        "s3://bucket/a.tar?X-Amz-Signature=0a1b",
        "https://example.org/a?x=1&access_token=abc",
        "correct-horse-battery",
    ],
)
def test_settings_with_credentials_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    for settings in ({"data": {"source": value}}, {"data": {"source": [1, value]}}):
        with pytest.raises(UserError, match=r"^data\.source: .*by ~/\.netrc") as refusal:
            require_no_secrets(settings)
        assert value not in str(refusal.value)


@pytest.mark.parametrize(
    "value",
    [None, 12, "", "a/b.tar.gz", "s3://bucket/token.txt", "ssh://git@example.org:22/a", "https://h/a?version=2&keys=3"],
)
def test_settings_without_credentials_are_kept(value: object) -> None:
    require_no_secrets({"data": {"source": value}})


def test_this_repository_is_kept_whole() -> None:
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [root / name for name in listed.split("\0") if name]
    assert Path(secrecy.__file__) in paths
    assert [path for path in paths if is_secret(path)] == []


def test_what_options_are_given_as_secrets_is_not_kept() -> None:
    given = ["prog.py", "--user", "anna", "--password", "correct-horse", "--api-key=0123", "-v", "--db-passwd", "--x"]
    shown = ["prog.py", "--user", "anna", "--password", "***", "--api-key=***", "-v", "--db-passwd", "--x"]
    assert without_secret_options(given) == shown
    harmless = [
        "--set",
        "tokenizer.size=500",
        "--tokenizer",
        "bert",
        "--max-tokens",
        "100",
        "-P",
        "model=tds",
        "--key=a",
    ]
    assert without_secret_options(harmless) == harmless
