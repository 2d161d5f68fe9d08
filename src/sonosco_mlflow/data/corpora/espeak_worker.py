"""Speak with espeak-ng, in a process of its own: a script, never imported by the package.

espeak-ng is under the GPL, so its code is loaded here and nowhere else. The library also carries state from
one sentence to the next, so a process speaks one fixed list of lines from first to last, and ends.

Standard input: JSON, ``{"accent": ..., "variant": ..., "lines": [[text, words a minute, pitch], ...]}``.
Standard output, for each line: the number of bytes (4, little-endian), then 16 bit samples at 22,050 Hz,
mono.
"""

import ctypes
import json
import sys
from pathlib import Path

import espeakng_loader

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback before espeak_Synth returns
RATE, PITCH = 1, 3  # espeakRATE, espeakPITCH
UTF8 = 1  # espeakCHARS_UTF8
SAMPLE_RATE = 22_050

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main() -> None:
    """Read the task, speak it, write the samples; end with status 1 and one line where that is impossible."""
    task = json.load(sys.stdin)
    data = Path(espeakng_loader.get_data_path())
    # espeak-ng takes the plain voice, without a word, where a variant is missing.
    if not (data / "voices" / "!v" / task["variant"]).is_file():
        sys.exit(f"espeak-ng has no voice variant {task['variant']!r} in {data}")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    if library.espeak_Initialize(SYNCHRONOUS, 0, str(data).encode(), 0) != SAMPLE_RATE:
        sys.exit(f"espeak-ng does not start with {data}, or not at {SAMPLE_RATE} Hz")
    chunks: list[bytes] = []

    def keep(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = Callback(keep)  # held for as long as the library may call it
    library.espeak_SetSynthCallback(callback)
    voice = f"{task['accent']}+{task['variant']}"
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit(f"espeak-ng has no voice {voice!r} in {data}")
    for text, words_per_minute, pitch in task["lines"]:
        chunks.clear()
        library.espeak_SetParameter(RATE, words_per_minute, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        sentence = text.encode()
        library.espeak_Synth(sentence, len(sentence) + 1, 0, 0, 0, UTF8, None, None)
        spoken = b"".join(chunks)
        sys.stdout.buffer.write(len(spoken).to_bytes(4, "little") + spoken)


if __name__ == "__main__":
    main()
