"""What must not leave the machine with a run: files that look like secrets, credentials, tokens."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from sonosco_mlflow.errors import UserError, describe_failure
from sonosco_mlflow.settings import flatten

_NAMES = re.compile(
    r"""
    \.env([.-].+)? | .+\.env | \.envrc                      # settings of services
    | .*\.(pem|key|p12|pfx|jks|keystore|ppk)                # keys and their stores
    | id_(rsa|dsa|ecdsa|ed25519).*                          # of ssh; the public half as well
    | [._]netrc | \.(pypirc|npmrc|pgpass|htpasswd|git-credentials|databrickscfg|s3cfg|dockercfg) | kaggle\.json
    | client_secret.*\.json                                 # of Google
    # Not tokens.txt, which is a vocabulary.
    | (.*[._-])?(credentials?|secrets?|token|api[_-]?key)(\.(json|ya?ml|toml|ini|txt|cfg|csv))?
    """,
    re.IGNORECASE | re.VERBOSE,
)
# What says little by its name says enough by its folder.
_PLACES = {(".dvc", "config.local"), (".docker", "config.json")}
# Templates, by which a project shows which settings there are.
_HARMLESS = re.compile(r".*\.(example|sample|template|dist)", re.IGNORECASE)
# What tokens of known services look like, by what they begin with: that alone is looked for in most texts.
_TOKENS = {
    start: re.compile(rf"{start}(?<![A-Za-z0-9]{start}){rest}")
    for start, rest in {
        **dict.fromkeys(("AKIA", "ASIA"), r"[A-Z0-9]{16}\b"),  # of AWS
        **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{36,}"),
        "github_pat_": r"[A-Za-z0-9_]{40,}",
        "glpat-": r"[A-Za-z0-9_-]{20,}",
        "hf_": r"[A-Za-z0-9]{30,}",
        "sk-": r"((proj|ant|svcacct)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{40,})",  # of language models' services
        "AIza": r"[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",  # of Google
        "GOCSPX-": r"[A-Za-z0-9_-]{20,}",
        "pypi-": r"AgE[A-Za-z0-9_-]{30,}",
        "dapi": r"[0-9a-f]{32}\b",  # of Databricks
        **dict.fromkeys(("xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-"), r"[A-Za-z0-9-]{20,}"),
    }.items()
}
_KEY = re.compile(r"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----")
# In the settings of DVC, of a remote.
_DVC = re.compile(
    r"^\s*(?!ask_)\w*(password|passphrase|token|secret|access_key|account_key|connection_string)\s*=\s*\S",
    re.MULTILINE | re.IGNORECASE,
)
# An address with a password; in a program it is mostly made of variables, which are none.
_LOGIN = re.compile(r"://[^\s/:@,\"'<>{}$]{0,100}:([^\s@/,\"'<>{}()\[\]$*]{1,200})@")
# The passwords of examples and of databases that only tests see.
_STOPGAP = re.compile(
    r".{1,7} | [A-Za-z]{1,15}"
    r"| ((my|your|the|a|some|user(name)?|pass(word|wd|phrase)?|pwd?|token|secret|key|api|access|here|x+)(\W|_|$))+",
    re.IGNORECASE | re.VERBOSE,
)
_SIGNED = re.compile(
    r"[?&;#]([\w.-]*(token|secret|passw(or)?d|api_?key|access_?key|signature|credential)|sig|key|auth)=[^\s&#\"']",
    re.IGNORECASE,
)
_VARIABLES = re.compile(
    r"TOKEN(?!S|IZ)|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CONNECTION_STRING|_(KEY|PAT|PWD?)$",
    re.IGNORECASE,
)
# What a shorter one says may stand anywhere by chance.
_SHORTEST = 12
_ADDRESS = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://)([^/\s\"']*@)?([^\s?#\"']*)(\?[^\s#\"']*)?(\#[^\s=\"']*=[^\s\"']*)?", re.IGNORECASE
)
LARGEST_SECRET = 10 * 1024 * 1024
"""Bytes of the largest file that is searched for keys and tokens. A notebook may hold one beside its pictures."""


def is_secret(path: Path) -> bool:
    """Return whether the file at ``path`` looks like a secret: by its name, or by a key or token in it."""
    if is_secrets_name(path):
        return True
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_SECRET:
        return False
    return holds_secret(path, path.read_bytes())


def is_secrets_name(path: PurePath) -> bool:
    """Return whether a file of that name looks like a secret."""
    if path.parts[-2:] in _PLACES:
        return True
    return bool(_NAMES.fullmatch(path.name)) and not _HARMLESS.fullmatch(path.name)


def holds_secret(path: PurePath, content: bytes) -> bool:
    """Return whether there is a key, a token or a password in the content of the file at ``path``."""
    # A character a byte, whatever it is written in: what is looked for is ASCII.
    text = content.decode("latin-1")
    if path.parts[-2:] == (".dvc", "config") and (_DVC.search(text) or _LOGIN.search(text)):
        return True
    if _holds_token(text) or ("PRIVATE KEY" in text and _KEY.search(text)):
        return True
    if "://" in text and any(not _STOPGAP.fullmatch(login[1]) for login in _LOGIN.finditer(text)):
        return True
    return any(os.fsencode(value) in content for value in _secret_values())


def require_no_secrets(settings: Mapping[str, object]) -> None:
    """Return unless nested settings hold credentials: a run keeps them as they are, for all who can read it.

    Raises:
        UserError: one does; the message names its key, and not what it holds.
    """
    for key, value in flatten(settings):
        if not isinstance(value, str):
            continue
        if _LOGIN.search(value) or ("://" in value and _SIGNED.search(value)):
            found = "an address with credentials in it"
        elif _holds_token(value) or any(secret in value for secret in _secret_values()):
            found = "a token or key"
        else:
            continue
        raise UserError(
            f"{key}: found {found}, expected none: a run keeps its settings to the letter, for all who can read it. "
            "Leave it out here, and give it to what needs it by a variable of the environment, by ~/.netrc, or, for a "
            "remote of DVC, by `dvc remote modify --local`"
        )


def describe_without_secrets(error: Exception) -> str:
    """Return the message of a failure (:func:`~sonosco_mlflow.errors.describe_failure`) as a run may keep it."""
    return without_secrets(describe_failure(error))


def without_secrets(text: str) -> str:
    """Return ``text`` without credentials in addresses, tokens, and what the environment's secret variables hold.

    >>> without_secrets("--remote=https://user:token@example.org/project.git?key=token")
    '--remote=https://example.org/project.git'
    >>> without_secrets("git@example.org:project.git")
    'git@example.org:project.git'
    """
    # The longest first: one may hold another.
    for value in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(value, "***")
    for start, token in _TOKENS.items():
        if start in text:
            text = token.sub("***", text)
    # Some services take a token in the query, or behind it.
    return _ADDRESS.sub(lambda found: found[1] + found[3], text) if "://" in text else text


def without_secret_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command; of options that are named as secrets are, ``***`` for what they are given.

    >>> without_secret_options(["--user", "anna", "--password", "correct-horse", "--api-key=0123"])
    ['--user', 'anna', '--password', '***', '--api-key=***']
    """
    shown: list[str] = []
    is_value = False
    for argument in arguments:
        option = re.fullmatch(r"(--?([a-z][\w.-]*))(=.*)?", argument, re.IGNORECASE | re.DOTALL)
        if is_value and not option:
            shown.append("***")
        elif option and option[3] and _names_secret(option[2]):
            shown.append(f"{option[1]}=***")
        else:
            shown.append(argument)
        is_value = bool(option and not option[3] and _names_secret(option[2]))
    return shown


def _names_secret(option: str) -> bool:
    return bool(_VARIABLES.search(option.replace("-", "_")))


def _holds_token(text: str) -> bool:
    return any(start in text and token.search(text) for start, token in _TOKENS.items())


def _secret_values() -> Iterator[str]:
    for name, value in os.environ.items():
        # Some name a file that holds it. Whatever a value is, neither of these fails.
        if _VARIABLES.search(name) and not os.path.exists(os.path.expanduser(value)):  # noqa: PTH110, PTH111
            # Of a key with several lines a text may show one; what has a space in it is no part of a key.
            lines = [line for line in map(str.strip, value.strip().splitlines()) if " " not in line]
            yield from (secret for secret in {value.strip(), *lines} if len(secret) >= _SHORTEST)
