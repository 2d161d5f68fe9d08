"""What must not leave the machine with a run: files that look like secrets, credentials, tokens."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from sonosco_mlflow.errors import describe_failure

_NAMES = re.compile(
    r"""
    \.env([.-].+)? | .+\.env | \.envrc                      # settings of services
    | .*\.(pem|key|p12|pfx|jks|keystore|ppk)                # keys and their stores
    | id_(rsa|dsa|ecdsa|ed25519).*                          # of ssh; the public half as well
    | \.(netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials|databrickscfg) | kaggle\.json
    # Not tokens.txt, which is a vocabulary.
    | (.*[._-])?(credentials?|secrets?|token|api[_-]?key)(\.(json|ya?ml|toml|ini|txt|cfg))?
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Templates, by which a project shows which settings there are.
_HARMLESS = re.compile(r".*\.(example|sample|template|dist)", re.IGNORECASE)
_CONTENTS = re.compile(
    rb"""
    -----BEGIN\ ([A-Z0-9]+\ )*PRIVATE\ KEY-----
    | \b(AKIA|ASIA)[A-Z0-9]{16}\b                           # of AWS
    | \bgh[pousr]_[A-Za-z0-9]{36,} | \bgithub_pat_[A-Za-z0-9_]{40,}
    | \bglpat-[A-Za-z0-9_-]{20,}
    | \bhf_[A-Za-z0-9]{30,}
    | \bsk-(proj|ant)-[A-Za-z0-9_-]{20,}                    # of language models' services
    | \bdapi[0-9a-f]{32}\b                                  # of Databricks
    | \bxox[abprs]-[A-Za-z0-9-]{20,}
    """,
    re.VERBOSE,
)
# Of a remote, in the settings of DVC.
_DVC = re.compile(rb"^\s*(password|secret_access_key|connection_string|account_key|sas_token)\s*=", re.MULTILINE)
_VARIABLES = re.compile(r"TOKEN|SECRET|PASSW(OR)?D|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
# What a shorter one says may stand anywhere by chance.
_SHORTEST = 12
_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)([^/\s\"']*@)?([^\s?#\"']*)(\?[^\s#\"']*)?", re.IGNORECASE)
# Keys and tokens stand in small files.
LARGEST_SECRET = 1024 * 1024


def is_secret(path: Path) -> bool:
    """Return whether the file at ``path`` looks like a secret: by its name, or by a key or token in it."""
    if is_secrets_name(path):
        return True
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_SECRET:
        return False
    return holds_secret(path, path.read_bytes())


def is_secrets_name(path: PurePath) -> bool:
    """Return whether a file of that name looks like a secret."""
    return bool(_NAMES.fullmatch(path.name)) and not _HARMLESS.fullmatch(path.name)


def holds_secret(path: PurePath, content: bytes) -> bool:
    """Return whether there is a key or token in the content of the file at ``path``."""
    if path.parts[-2:] == (".dvc", "config") and _DVC.search(content):
        return True
    return _CONTENTS.search(content) is not None or any(value.encode() in content for value in _secret_values())


def describe_without_secrets(error: Exception) -> str:
    """Return the message of a failure (:func:`~sonosco_mlflow.errors.describe_failure`) as a run may keep it."""
    return without_secrets(describe_failure(error))


def without_secrets(text: str) -> str:
    """Return ``text`` without credentials in addresses, and without what the environment's secret variables hold.

    >>> without_secrets("--remote=https://user:token@example.org/project.git?key=token")
    '--remote=https://example.org/project.git'
    >>> without_secrets("git@example.org:project.git")
    'git@example.org:project.git'
    """
    for value in _secret_values():
        text = text.replace(value, "***")
    # Some services take a token in the query.
    return _ADDRESS.sub(lambda found: found[1] + found[3], text) if "://" in text else text


def _secret_values() -> Iterator[str]:
    for name, value in os.environ.items():
        # Some name a file that holds it.
        if len(value) >= _SHORTEST and _VARIABLES.search(name) and not value.startswith((os.sep, "~")):
            yield value
