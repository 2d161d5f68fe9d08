"""How quickly features are extracted, beside other libraries, and over two processes.

    python benchmarks/feature_extraction.py [FOLDER]            # Markdown tables
    python benchmarks/feature_extraction.py --rounds 5          # a shorter look

All of them compute 80 mel bands of the same utterances of 2 to 15 s at 16 kHz, windows of 25 ms every 10 ms, one
utterance at a time on one thread. In each round each takes its turn, in an order that rotates; a ratio is taken within
a round, of the process's own seconds, and the table gives the median of the rounds with the smallest and largest. What
a library computes is compared with ours: the largest difference of a log energy above -10 is given.

Over processes, the time on the clock of `extract_features` from wav files to the store is compared, in turns: of one
process on one core, where the process that writes is on that core as well, and of two on two.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from resume_peers import REPOSITORY, make_environment

PINS = ["speechbrain==1.1.2", "lhotse==1.33.0", "kaldi-native-fbank==1.23.0", "librosa==0.11.0"]
RATE, UTTERANCES, SECONDS = 16_000, 20, (2.0, 15.0)


def in_environment(about: str, script: str, pins: list[str], measure: Callable[[int], str]) -> None:
    """Print what `measure` says after so many rounds, in an environment of the project's pins and of `pins`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the environment; by default a new one")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(measure(arguments.rounds))
        return
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix=f"{Path(script).stem}-"))).resolve()
    python = make_environment(folder / "environment", ["-r", str(REPOSITORY / "requirements.txt"), *pins])
    program = [str(python), script, "--inside", "--rounds", str(arguments.rounds)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "/usr/bin", **threads}
    sys.exit(subprocess.run(program, env=environment, check=False).returncode)


def tables(rounds: int) -> str:
    return beside_others(rounds) + "\n" + over_processes(rounds)


def utterances() -> list:
    """Noise whose spectrum falls as that of speech does, louder and softer four times a second."""
    import numpy as np
    import torch

    stream = np.random.default_rng(0)
    found = []
    for seconds in stream.uniform(*SECONDS, UTTERANCES):
        samples = np.cumsum(stream.standard_normal(int(seconds * RATE)))
        samples = np.diff(samples - 0.98 * np.concatenate([[0.0], samples[:-1]]), prepend=0.0) + 0.1 * samples
        samples *= 1.2 + np.sin(8 * np.pi * np.arange(len(samples)) / RATE)
        found.append(torch.from_numpy((0.3 * samples / abs(samples).max()).astype(np.float32)))
    return found


def extractors() -> dict[str, tuple[Callable, str]]:
    """Return what each library does with a waveform, to [frames, bands], and which of ours it is the same as."""
    import kaldi_native_fbank
    import librosa
    import numpy as np
    import speechbrain.processing.features as speechbrain
    import torch
    import torchaudio
    from lhotse.features.kaldi.extractors import Fbank, FbankConfig

    from sonosco_mlflow.data.processor import AudioDataProcessor, KaldiFilterBankProcessor

    mel = torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=512, win_length=400, hop_length=160, n_mels=80, center=False,
        window_fn=torch.hann_window, wkwargs={"periodic": False},
    )  # fmt: skip

    def by_torchaudio(waveform):
        return mel(torch.nn.functional.pad(waveform, (56, 56))).clamp_min(1e-10).log().T.contiguous()

    def by_torchaudio_kaldi(waveform):
        return torchaudio.compliance.kaldi.fbank(waveform[None] * 2**15, num_mel_bins=80, sample_frequency=RATE)

    settings = {"sr": RATE, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80, "center": False}
    window = np.hanning(400).astype(np.float32)

    def by_librosa(waveform):
        padded = np.pad(waveform.numpy(), (56, 56))
        energies = librosa.feature.melspectrogram(y=padded, window=window, htk=True, norm=None, **settings)
        return np.ascontiguousarray(np.log(np.maximum(energies, 1e-10)).T)

    lhotse = Fbank(FbankConfig(num_filters=80, dither=0.0, snip_edges=True, high_freq=0.0))

    def by_lhotse(waveform):
        return lhotse.extract(waveform.numpy() * 2**15, RATE)

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80

    def by_kaldi_native(waveform):
        fbank = kaldi_native_fbank.OnlineFbank(options)
        fbank.accept_waveform(RATE, (waveform * 2**15).tolist())
        fbank.input_finished()
        return np.stack([fbank.get_frame(number) for number in range(fbank.num_frames_ready)])

    spectrum = speechbrain.STFT(RATE, win_length=25, hop_length=10, n_fft=512, center=False)
    bands = speechbrain.Filterbank(n_mels=80, n_fft=512, log_mel=True, f_max=8000)

    def by_speechbrain(waveform):
        return bands(speechbrain.spectral_magnitude(spectrum(waveform[None])))[0]

    return {
        "sonosco, `log_mel`": (AudioDataProcessor().features, ""),
        "torchaudio `MelSpectrogram`": (by_torchaudio, "sonosco, `log_mel`"),
        "librosa": (by_librosa, "sonosco, `log_mel`"),
        "SpeechBrain": (by_speechbrain, ""),
        "sonosco, `kaldi_fbank`": (KaldiFilterBankProcessor().features, ""),
        "torchaudio `kaldi.fbank`": (by_torchaudio_kaldi, "sonosco, `kaldi_fbank`"),
        "lhotse": (by_lhotse, "sonosco, `kaldi_fbank`"),
        "kaldi-native-fbank": (by_kaldi_native, "sonosco, `kaldi_fbank`"),
    }


def beside_others(rounds: int) -> str:
    import torch

    torch.set_num_threads(1)
    waveforms, ours = utterances(), "sonosco, `log_mel`"
    functions = extractors()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(-1, rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            began = time.process_time()
            for waveform in waveforms:
                functions[name][0](waveform)
            if round_ >= 0:  # whoever comes first pays for what is made once
                seconds[name].append(time.process_time() - began)
    audio = sum(len(waveform) for waveform in waveforms) / RATE
    lines = ["| | times real time | seconds beside ours | largest difference |", "|---|---|---|---|"]
    for name, (function, same) in functions.items():
        ratios = [one / other for one, other in zip(seconds[name], seconds[ours], strict=True)]
        difference = f"{furthest(function, functions[same][0], waveforms):.1e} from {same}" if same else ""
        beside = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {audio / median(seconds[name]):,.0f} | {beside} | {difference} |")
    return "\n".join(lines)


def furthest(one: Callable, other: Callable, waveforms: list) -> float:
    import torch

    differences = []
    for waveform in waveforms:
        found, expected = torch.as_tensor(one(waveform)), torch.as_tensor(other(waveform))
        assert found.shape == expected.shape
        differences.append(float((found - expected)[expected > -10].abs().max()))
    return max(differences)


def over_processes(rounds: int) -> str:
    import soundfile

    from sonosco_mlflow.data.executors import Processes
    from sonosco_mlflow.data.extraction import extract_features
    from sonosco_mlflow.data.manifest import Manifest, Utterance
    from sonosco_mlflow.data.processor import AudioDataProcessor

    with tempfile.TemporaryDirectory() as folder:
        root, rows = Path(folder), []
        waveforms = utterances()
        for number in range(1000):
            waveform = waveforms[number % len(waveforms)]
            soundfile.write(root / f"{number}.wav", waveform.numpy(), RATE)
            rows.append(Utterance(f"{number:04d}", f"{number}.wav", len(waveform) / RATE, "", ""))
        manifest = Manifest(rows, root)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        cores = sorted(os.sched_getaffinity(0))
        for round_ in range(-1, rounds):
            for count in ((1, 2), (2, 1))[round_ % 2]:
                os.sched_setaffinity(0, cores[:count])
                began = time.perf_counter()
                extract_features(manifest, AudioDataProcessor(), root / "store", executor=Processes(count))
                if round_ >= 0:
                    seconds[count].append(time.perf_counter() - began)
                os.sched_setaffinity(0, cores)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    speed, hours = manifest.hours * 3600 / median(seconds[1]), manifest.hours
    return (
        f"\nFrom {hours:.2f} h of wav files to a store: one process on one core {speed:,.0f} times real time, two on "
        f"two {median(ratios):.2f} times that ({min(ratios):.2f} to {max(ratios):.2f})."
    )


if __name__ == "__main__":
    in_environment(__doc__, __file__, PINS, tables)
