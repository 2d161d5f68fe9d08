"""Names that people give to runs and settings, as folders and MLflow take them."""

import re
from collections.abc import Mapping

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.settings import flatten

# Of a parameter in MLflow, behind the names of the sections that it is in.
_SETTING = re.compile(r"(?!\.\.?(/|$))[\w.\-: ]+(/(?!\.\.?(/|$))[\w.\-: ]+)*")
_LONGEST_SETTING = 250


def folder_name(name: str, run_id: str) -> str:
    """Return what the folder of a run is called. A name in the UI may hold anything, a folder's may not.

    >>> folder_name("../speech: small", "2f1c09aa")
    '-speech- small-2f1c09'
    """
    safe = re.sub(r"[^\w. -]+", "-", name).strip(". ")[:100]
    return f"{safe}-{run_id[:6]}"


def require_setting_names(settings: Mapping[str, object]) -> None:
    """Return if MLflow takes all of nested settings as parameters of a run, by their names.

    Raises:
        UserError: it refuses one.
    """
    for name, _ in flatten(settings):
        if len(name) > _LONGEST_SETTING or not _SETTING.fullmatch(name):
            raise UserError(
                f"{name:.80}: MLflow keeps no setting of that name; expected letters, digits, '_', '-', ':' and "
                f"spaces, or parts of these with '/' between, {_LONGEST_SETTING} at most"
            )
