"""The embedded default corpus: made on the machine, of spoken digit strings and commands.

espeak-ng speaks it, from the ``espeakng-loader`` wheel, one process for each speaker: the samples of a
sentence depend on what the process spoke before, so a speaker's lines are always spoken from first to last in
a fresh one, and the number of processes at once changes no byte.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sonosco_mlflow.data.corpora.audio import (
    SAMPLE_RATE,
    Samples,
    to_sixteen_kilohertz,
    trim_and_level,
    write_wave,
)
from sonosco_mlflow.data.corpora.base import Brought, Request, make_audio_folder
from sonosco_mlflow.data.corpora.grammar import Line, Speaker, lines, speakers
from sonosco_mlflow.data.corpora.splits import SPLITS, refuse_parts
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

_WORKER = Path(__file__).with_name("espeak_worker.py")
# glibc's sine, exponential and power have other last bits on processors with FMA. Synthesis goes without.
_SAME_MATHEMATICS = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4"}


def bring(request: Request) -> Brought:
    """Speak the corpus into ``directory/wav/<speaker>/<id>.wav``, 16 kHz; see ``Corpus.bring``.

    Raises:
        UserError: a source or parts were given, the wheel is not installed, or espeak-ng fails.
    """
    if request.source is not None:
        raise UserError(
            f"data.source: found {request.source!r}, but the default corpus is made here and takes no source."
        )
    refuse_parts(request.parts, "the default corpus")
    if find_spec("espeakng_loader") is None:
        raise UserError(
            "the default corpus needs espeak-ng, which is not installed: pip install 'sonosco-mlflow[corpus]'"
        )
    audio = make_audio_folder(request.directory)
    everybody = speakers()
    total = sum(len(lines(speaker)) for speaker in everybody)
    spoken: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    done = 0
    with ThreadPoolExecutor(max_workers=request.processes) as pool:
        tasks = {pool.submit(_record, speaker, audio): speaker for speaker in everybody}
        try:
            for task in as_completed(tasks):
                utterances = task.result()
                spoken[tasks[task].split] += utterances
                done += len(utterances)
                request.progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Brought(spoken)


def _record(speaker: Speaker, audio: Path) -> list[Utterance]:
    folder = audio / speaker.name
    folder.mkdir()
    utterances = []
    script = lines(speaker)
    for line, samples in zip(script, _speak(speaker, script), strict=True):
        path = folder / f"{line.id}.wav"
        finished = trim_and_level(to_sixteen_kilohertz(samples))
        write_wave(path, finished, SAMPLE_RATE)
        place = path.relative_to(audio.parent).as_posix()
        utterances.append(Utterance(line.id, place, len(finished) / SAMPLE_RATE, line.text, speaker.name))
    return utterances


def _speak(speaker: Speaker, script: list[Line]) -> list[Samples]:
    task = {
        "accent": speaker.accent,
        "variant": speaker.variant,
        "lines": [[line.text.lower(), line.words_per_minute, line.pitch] for line in script],
    }
    worker = subprocess.run(
        [sys.executable, "-P", str(_WORKER)],
        input=json.dumps(task).encode(),
        capture_output=True,
        env=os.environ | _SAME_MATHEMATICS,
        check=False,
    )
    if worker.returncode != 0:
        reason = worker.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"espeak-ng failed for the voice {speaker.name!r} (status {worker.returncode}): {reason[0]}. "
            "Install it anew: pip install --force-reinstall 'sonosco-mlflow[corpus]'"
        )
    recordings = []
    rest = worker.stdout
    while rest:
        end = 4 + int.from_bytes(rest[:4], "little")
        recordings.append(np.frombuffer(rest[4:end], dtype=np.int16))
        rest = rest[end:]
    return recordings
