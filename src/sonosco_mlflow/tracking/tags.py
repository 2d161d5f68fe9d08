"""Names of the tags of a run: what scripts and people come to rely on."""

from mlflow.entities import Run

from sonosco_mlflow.errors import whole_number

KIND = "sonosco.kind"
"""``train``, ``data``, ``evaluate``, ``sweep`` or ``segment``."""
STATE = "sonosco.state"
"""``running``, ``finished``, ``interrupted`` or ``failed``; MLflow's status is overwritten by its launcher."""
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
"""MLflow's status of a run that has ended, by that."""
ERROR = "sonosco.error"

CODE_DIGEST = "sonosco.code_digest"
IMPORTED_DIGEST = "sonosco.imported_digest"
"""Of what a program has imported from outside the repository; without it, nothing."""
CONFIG_DIGEST = "sonosco.config_digest"
DATA_DIGEST = "sonosco.data_digest"
ENVIRONMENT_DIGEST = "sonosco.environment_digest"
LANGUAGE_MODEL_DIGEST = "sonosco.language_model_digest"
"""sha256 of the ARPA file that the test set is decoded with."""
WEIGHTS_DIGEST = "sonosco.weights_digest"
"""sha256 of the final ``model.safetensors``."""
LEDGER_DIGEST = "sonosco.ledger_digest"
"""sha256 of ``ledger.json``; a run that is being written to, or was cut off, has none."""
DESCRIPTION_DIGEST = "sonosco.description_digest"
"""sha256 of the description as it was last written here: another one is the user's."""
CANARY = "sonosco.canary"
COMMIT = "sonosco.commit"
DIRTY = "sonosco.dirty"

DVC_EXPERIMENT = "dvc.experiment"
"""Of what ``dvc exp run`` has started: the name of its experiment, and below it the commit that this began from."""
DVC_BASELINE = "dvc.baseline"

FIRST_STEP = "sonosco.first_step"
"""Steps that the trainer had made before the run began; without it, none."""
FOLDER = "sonosco.folder"
"""Name of the run's own folder below ``runs/``."""
CHECKPOINT = "sonosco.checkpoint"
"""Artifact folder of the newest checkpoint; of a model, that of its own."""
MODEL_VERSION = "sonosco.model_version"
"""``<registered model>/<version>`` that the run's model is."""
MANIFEST_DIGEST = "sonosco.manifest_digest"
"""Of a model: sha256 of its checkpoint's manifest."""
TRIAL = "sonosco.trial"
"""Of a training in a sweep: its number there."""
SEGMENTS = "sonosco.segments"
"""How many processes have trained the run, one after the other."""
SEGMENT_RECORD = "sonosco.segment_record"
"""Id of the run that ``mlflow run`` made for the newest segment which it has started."""
ALLOWED_CHANGES = "sonosco.allowed_changes"
"""Digests that differ between the segments."""
REPRODUCED = "sonosco.reproduced"
"""Of an evaluation or a reproduction: whether it gave the numbers of the training again."""
REPRODUCES = "sonosco.reproduces"
"""Of a reproduction: id of the run that it makes again."""
REPRODUCED_BY = "sonosco.reproduced_by"
"""Id of the newest run that made this one again."""

HOST = "sonosco.host"
PID = "sonosco.pid"
HEARTBEAT = "sonosco.heartbeat"
OWNER = "sonosco.owner"
"""Token of the process that may train the run."""


def number_of(run: Run, tag: str, default: int) -> int:
    """Return the whole number that a tag of ``run`` holds.

    Raises:
        UserError: it holds something else; the message names the tag.
    """
    return whole_number(run.data.tags.get(tag, default), f"run {run.info.run_id}: its tag {tag}")
