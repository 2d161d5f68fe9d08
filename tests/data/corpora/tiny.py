"""Tiny recordings and archives in the layouts of real corpora."""

import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
_FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}


def samples(seconds: float = 0.1, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Return noise that can be told from another one, [time] or [time, channels] in 16 bits."""
    noise = np.random.default_rng(seed).integers(-9000, 9000, (round(seconds * RATE), channels)).astype(np.int16)
    return noise[:, 0] if channels == 1 else noise


@cache  # of two streams of Ogg, even with the same sound, no two are equal
def sound(kind: str = "wav", seconds: float = 0.1, seed: int = 0, channels: int = 1) -> bytes:
    """Return such noise as the bytes of an audio file."""
    form, subtype = _FORMATS[kind]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples(seconds, seed, channels), RATE, format=form, subtype=subtype)
    return buffer.getvalue()


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    """Write ``files`` below ``folder``, and return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below ``folder`` by their names."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
