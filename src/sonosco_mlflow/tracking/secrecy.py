"""What must not leave the machine with a run: files that look like secrets, and credentials in addresses."""

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_NAMES = re.compile(
    r"""
    \.env(\..+)? | .+\.env                                  # settings of services
    | .*\.(pem|key|p12|pfx|jks|keystore|ppk)                # keys and their stores
    | id_(rsa|dsa|ecdsa|ed25519).*                          # of ssh; the public half as well
    | \.(netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials)
    # Not tokens.txt, which is a vocabulary.
    | (.*[._-])?(credentials?|secrets?|token)(\.(json|ya?ml|toml|ini|txt|cfg))?
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
    | \bxox[abprs]-[A-Za-z0-9-]{20,}
    """,
    re.VERBOSE,
)
# Keys and tokens stand in small files.
_LARGEST = 1024 * 1024


def is_secret(path: Path) -> bool:
    """Return whether the file at ``path`` looks like a secret, by its name or by a key or token in it."""
    if _NAMES.fullmatch(path.name) and not _HARMLESS.fullmatch(path.name):
        return True
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    return _CONTENTS.search(path.read_bytes()) is not None


def without_credentials(address: str) -> str:
    """Return the address of a repository without user name, password and token.

    >>> without_credentials("https://user:token@example.org/project.git")
    'https://example.org/project.git'
    >>> without_credentials("git@example.org:project.git")
    'git@example.org:project.git'
    """
    parts = urlsplit(address)
    if not parts.scheme:
        return address
    host = parts.netloc.rpartition("@")[2]
    # Some services take a token in the query.
    return urlunsplit(parts._replace(netloc=host, query=""))
