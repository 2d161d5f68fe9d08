import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import contents, samples, sound, unpack

from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.corpora.lhotse import write_cuts
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError

NAMES = [f"{letter}{number}" for letter in "ab" for number in range(6)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve recordings with transcripts, and a long one."""
    files = {f"wav/{name}.wav": sound(seed=number) for number, name in enumerate(NAMES)}
    files |= {f"txt/{name}.txt": f"Text  of\n{name}\n".encode() for name in NAMES}
    return unpack(files | {"wav/talk.flac": sound("flac", 2.0, seed=99)}, tmp_path / "source")


def everything(manifests: dict[str, Manifest]) -> dict[str, Utterance]:
    return {utterance.id: utterance for manifest in manifests.values() for utterance in manifest}


def sizes(manifests: dict[str, Manifest]) -> dict[str, int]:
    return {split: len(manifest) for split, manifest in manifests.items()}


def jsonl(*entries: object) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def nemo(name: str, **others: object) -> dict[str, object]:
    return {"audio_filepath": f"wav/{name}.wav", "duration": 0.1, "text": f"Text of {name}"} | others


def cut(source: Path, name: str, start: float = 0.0, duration: float = 0.1, **others: object) -> dict[str, object]:
    whole = 2.0 if name == "talk" else 0.1
    path = str(source / "wav" / (f"{name}.flac" if name == "talk" else f"{name}.wav"))
    supervision = {
        "id": f"sup-{name}",
        "recording_id": name,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": f"Text of {name}",
        "language": "English",
        "speaker": name[0],
        "gender": None,
        "custom": {"x": 1},
    }
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": path}],
        "sampling_rate": 16000,
        "num_samples": int(16000 * whole),
        "duration": whole,
        "channel_ids": [0],
    }
    return {
        "id": f"{name}-0",
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "type": "MonoCut",
    } | others


def kaldi(names: list[str], extra: dict[str, str] | None = None) -> dict[str, bytes]:
    files = {
        "wav.scp": "".join(f"{name} wav/{name}.wav\n" for name in names),
        "text": "".join(f"{name} Text  of {name}\n" for name in names),
        "utt2spk": "".join(f"{name} {name[0]}\n" for name in names),
    }
    return {name: text.encode() for name, text in (files | (extra or {})).items()}


def cut_from(scp: str, spans: dict[str, str]) -> dict[str, str]:
    """The files of Kaldi's for segments of recordings; a speaker is what an id begins with."""
    return {
        "wav.scp": scp,
        "segments": "".join(f"{name} {span}\n" for name, span in spans.items()),
        "text": "".join(f"{name} said {name}\n" for name in spans),
        "utt2spk": "".join(f"{name} {name.partition('-')[0]}\n" for name in spans),
    }


def write(corpus: str, names: list[str], path: Path, source: Path) -> None:
    match corpus:
        case "sonosco-csv":
            lines = [f"{source}/wav/{name}.wav,{source}/txt/{name}.txt,0.1\n" for name in names]
            path.with_suffix(".csv").write_text("".join(lines))
        case "nemo":
            entries = [nemo(name, speaker=name[0], audio_filepath=f"{source}/wav/{name}.wav") for name in names]
            path.with_suffix(".jsonl").write_bytes(jsonl(*entries))
        case "lhotse":
            entries = [cut(source, name, id=name) for name in names]
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(jsonl(*entries)))
        case "kaldi":
            scp = "".join(f"{name} {source}/wav/{name}.wav\n" for name in names)
            unpack(kaldi(names, {"wav.scp": scp}), path)


LISTS = ("sonosco-csv", "nemo", "lhotse", "kaldi")


@pytest.mark.parametrize("corpus", LISTS)
def test_a_folder_has_a_list_for_each_split(tmp_path: Path, source: Path, corpus: str) -> None:
    (tmp_path / "lists").mkdir()
    for split, names in {"train": NAMES[:7], "dev": NAMES[7:9], "test": NAMES[9:], "more": NAMES[2:4]}.items():
        write(corpus, names, tmp_path / "lists" / split, source)
    manifests = bring_corpus(corpus, tmp_path / "out", str(tmp_path / "lists"))
    assert sizes(manifests) == {"train": 7, "dev": 2, "test": 3}
    speaker = "unknown" if corpus == "sonosco-csv" else "a"
    assert manifests["train"][0] == Utterance("a0", str(source / "wav" / "a0.wav"), 0.1, "Text of a0", speaker)
    assert not (tmp_path / "out" / "wav").exists()
    chosen = bring_corpus(
        corpus, tmp_path / "out", str(tmp_path / "lists"), {"train": ["dev", "more"], "test": ["test"]}
    )
    assert len(chosen["test"]) == 3
    assert len(chosen["train"]) + len(chosen["dev"]) == 4
    with pytest.raises(
        UserError, match=r"data\.parts: \S+lists has no .* 'mor'\. There are: dev.*, more.*, test.*, train"
    ):
        bring_corpus(corpus, tmp_path / "out", str(tmp_path / "lists"), {"train": ["mor"]})


@pytest.mark.parametrize("corpus", LISTS)
def test_one_list_is_cut_into_splits(tmp_path: Path, source: Path, corpus: str) -> None:
    write(corpus, NAMES, source / "all", source)
    (path,) = source.glob("all*")
    manifests = bring_corpus(corpus, tmp_path / "out", str(path))
    assert everything(manifests).keys() == {*NAMES}
    assert all(len(manifest) for manifest in manifests.values())
    with pytest.raises(UserError, match=r"data\.parts: \S+ is one list, without parts"):
        bring_corpus(corpus, tmp_path / "out", str(path), {"train": ["all"]})


@pytest.mark.parametrize("corpus", LISTS)
def test_no_list_is_named(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "empty").mkdir()
    for given, message in [
        (None, r"data\.source: found None\. Expected a path: a "),
        ("http://127.0.0.1/x", r"Expected a path: a "),
        (str(tmp_path / "nothing"), r"nothing is not there, or is none"),
        (str(tmp_path / "empty"), r"found no .* in \S+empty\. Expected a .*, or a folder with train"),
    ]:
        with pytest.raises(UserError, match=message):
            bring_corpus(corpus, tmp_path / "out", given)


@pytest.mark.parametrize("corpus", LISTS)
def test_recordings_that_are_gone_are_named_with_their_line(tmp_path: Path, source: Path, corpus: str) -> None:
    write(corpus, NAMES, source / "all", source)
    (source / "wav" / "a2.wav").unlink()
    (path,) = source.glob("all*")
    with pytest.raises(UserError, match=r"all\S*:3: names a recording that is not there: \S+a2\.wav"):
        bring_corpus(corpus, tmp_path / "out", str(path))


def test_sonosco_wrote_two_fields_and_later_three(tmp_path: Path, source: Path) -> None:
    lines = [f"wav/{name}.wav,txt/{name}.txt{',9.9' if name < 'b' else ''}\r\n" for name in NAMES]
    (source / "all.csv").write_text("".join(lines))
    found = everything(bring_corpus("sonosco-csv", tmp_path / "out", str(source / "all.csv")))
    assert {utterance.duration for utterance in found.values()} == {0.1}
    assert found["b5"].text == "Text of b5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wav/a0.wav", r"all\.csv:2: found 'wav/a0\.wav'\. Expected 'recording,transcript'"),
        ("wav/a,0.wav,txt/a,0.txt", r"paths with a comma cannot be told apart"),
        ("wav/a0.wav,txt/gone.txt", r"all\.csv:2: the transcript \S+gone\.txt cannot be read \(No such file"),
        ("wav/a0.wav,txt/empty.txt", r"of no use: \S+all\.csv:2: 'a0' has an empty text\. Mend"),
        ("wav/a0.wav,txt/odd.txt", r"odd\.txt: found bytes that are not UTF-8"),
        ("wav/a1.wav,txt/a1.txt", r"all\.csv:2: the id 'wav-a1' stands already in \S+all\.csv:1"),
    ],
)
def test_what_is_wrong_in_sonoscos_manifest_is_named(tmp_path: Path, source: Path, line: str, message: str) -> None:
    unpack(
        {"txt/empty.txt": b" \n", "txt/odd.txt": b"\xff", "all.csv": f"wav/a1.wav,txt/a1.txt\n{line}\n".encode()},
        source,
    )
    with pytest.raises(UserError, match=message):
        bring_corpus("sonosco-csv", tmp_path / "out", str(source / "all.csv"))


def test_nemo_segments_are_cut_and_whole_recordings_are_not(tmp_path: Path, source: Path) -> None:
    part = {"audio_filepath": "wav/talk.flac", "text": "said", "offset": 0.5, "duration": 0.25}
    entries = [nemo(name, offset=0.0 if name < "b" else None) for name in NAMES]
    (source / "all.json").write_bytes(jsonl(*entries, part, part | {"offset": 1.0, "id": "second", "speaker": "anna"}))
    found = everything(bring_corpus("nemo", tmp_path / "out", str(source / "all.json")))
    assert {"a0-0000000-0000100", "b0", "talk-0000500-0000750", "second"} <= found.keys()
    assert found["a0-0000000-0000100"].audio_filepath == str(source / "wav" / "a0.wav")
    assert (found["second"].duration, found["second"].speaker) == (0.25, "anna")
    audio, _ = soundfile.read(tmp_path / "out" / found["talk-0000500-0000750"].audio_filepath, dtype="int16")
    assert audio.tolist() == samples(2.0, seed=99)[8000:12000].tolist()


def test_nemo_ids_of_one_name_begin_with_their_folders(tmp_path: Path, source: Path) -> None:
    unpack({"other/a0.wav": sound()}, source)
    (source / "all.json").write_bytes(jsonl(*map(nemo, NAMES), nemo("x", audio_filepath="other/a0.wav")))
    found = everything(bring_corpus("nemo", tmp_path / "out", str(source / "all.json")))
    assert {"wav-a0", "other-a0", "a1"} <= found.keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"all\.json:1: found no valid JSON"),
        (b"[1]", r"all\.json:1: found \[1\]\. Expected a JSON object"),
        (jsonl({"text": "x"}), r"all\.json:1: key 'audio_filepath': found no such key in \['text'\]"),
        (jsonl(nemo("a0", text=None)), r"all\.json:1: key 'text': found null\. Expected a string"),
        (jsonl(nemo("a0", offset=-1)), r"all\.json:1: key 'offset': found -1\. Expected seconds, 0 or more"),
        (jsonl(nemo("a0", offset=0.1, duration="1")), r"key 'duration': found \"1\"\. Expected seconds"),
        (jsonl(nemo("a0", offset=0.05, duration=5)), r"all\.json:1: the segment \S+ ends at 5\.05 s"),
        (jsonl(nemo("a0", text="")), r"of no use: \S+all\.json:1: 'a0' has an empty text\. Mend"),
        (b"\xff", r"all\.json: found bytes that are not UTF-8"),
    ],
)
def test_what_is_wrong_in_nemos_manifest_is_named(tmp_path: Path, source: Path, line: bytes, message: str) -> None:
    (source / "all.json").write_bytes(line)
    with pytest.raises(UserError, match=message):
        bring_corpus("nemo", tmp_path / "out", str(source / "all.json"))


def test_lhotses_cuts_are_cut_and_may_have_several_supervisions(tmp_path: Path, source: Path) -> None:
    several = cut(source, "talk", 0.5, 0.3, id="several")
    late = {"id": "2", "start": 0.2, "duration": 0.1, "text": "the end", "speaker": "anna"}
    several["supervisions"] = [late, {"id": "1", "start": 0.0, "duration": 0.2, "text": "at first", "speaker": "bo"}]
    stereo = cut(source, "talk", 0.0, 2.0, id="stereo", channel=1)
    (source / "wav" / "stereo.wav").write_bytes(sound(seconds=2.0, channels=2))
    file = {"type": "file", "channels": [0, 1], "source": "wav/stereo.wav"}
    stereo["recording"] |= {"sources": [file], "channel_ids": [0, 1]}  # type: ignore[operator]
    (source / "all.jsonl").write_bytes(jsonl(*(cut(source, name) for name in NAMES), several, stereo))
    found = everything(bring_corpus("lhotse", tmp_path / "out", str(source / "all.jsonl")))
    assert (found["several"].text, found["several"].speaker, found["several"].duration) == (
        "at first the end",
        "unknown",
        0.3,
    )
    assert found["a0-0"].audio_filepath == str(source / "wav" / "a0.wav")
    audio, _ = soundfile.read(tmp_path / "out" / found["stereo"].audio_filepath, dtype="int16")
    assert audio.tolist() == samples(2.0, channels=2)[:, 1].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "MixedCut"}, r"all\.jsonl:1: key 'type': found 'MixedCut'\. Expected 'MonoCut'"),
        ({"supervisions": []}, r"all\.jsonl:1: key 'supervisions': found \[\]\. Expected one at least"),
        ({"recording": None}, r"key 'recording': found None\. Expected an object"),
        ({"recording": {"transforms": [{"name": "Speed"}]}}, r"transformed as it is read .*CutSet\.save_audios"),
        ({"recording": {"sources": []}}, r"key 'sources' of the recording: found \[\]"),
        ({"recording": {"sources": [{"type": "command"}]}}, r"the recording's source is 'command'\. Expected 'file'"),
        ({"channel": 3}, r"key 'channel': found 3\. Expected one of the source's: \[0\]"),
        ({"start": None}, r"key 'start': found null"),
        ({"supervisions": [{"start": "x", "text": "y"}]}, r"key 'start': found \"x\""),
    ],
)
def test_what_is_wrong_in_lhotses_cuts_is_named(
    tmp_path: Path, source: Path, change: dict[str, object], message: str
) -> None:
    (source / "all.jsonl").write_bytes(jsonl(cut(source, "a0") | change))
    with pytest.raises(UserError, match=message):
        bring_corpus("lhotse", tmp_path / "out", str(source / "all.jsonl"))


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_a_manifest_comes_back_from_lhotses_cuts(tmp_path: Path, source: Path, name: str) -> None:
    write("nemo", NAMES, source / "all", source)
    manifest = Manifest(
        [*everything(bring_corpus("nemo", tmp_path / "out", str(source / "all.jsonl"))).values()], source
    )
    write_cuts(manifest, tmp_path / name)
    again = everything(bring_corpus("lhotse", tmp_path / "out", str(tmp_path / name)))
    assert sorted(again.values(), key=lambda utterance: utterance.id) == [*manifest]
    first = (tmp_path / name).read_bytes()
    write_cuts(manifest, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_a_damaged_pack_of_cuts_is_named(tmp_path: Path, source: Path) -> None:
    packed = gzip.compress(jsonl(*(cut(source, name) for name in NAMES)))
    for content in (packed[:-20], b"text", packed[:20] + b"x" + packed[21:]):
        (source / "all.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"all\.jsonl\.gz: cannot be read"):
            bring_corpus("lhotse", tmp_path / "out", str(source / "all.jsonl.gz"))


def test_kaldis_segments_are_cut(tmp_path: Path, source: Path) -> None:
    spans = {"anna-1": "talk 0.5 0.75", "anna-2": "talk 1.5 -1", "bo-1": "talk 0 0.5 A", "bo-2": "talk 1.0 1.1"}
    directory = source / "data" / "train"
    extra = cut_from("talk wav/talk.flac\nunused wav/a0.wav\n", spans)
    unpack(kaldi([], extra), directory)
    found = everything(bring_corpus("kaldi", tmp_path / "out", str(directory)))
    assert {name: utterance.duration for name, utterance in found.items()} == {
        "anna-1": 0.25,
        "anna-2": 0.5,
        "bo-1": 0.5,
        "bo-2": pytest.approx(0.1),
    }
    assert {utterance.speaker for utterance in found.values()} == {"anna", "bo"}
    audio, _ = soundfile.read(tmp_path / "out" / found["anna-2"].audio_filepath, dtype="int16")
    assert audio.tolist() == samples(2.0, seed=99)[24000:].tolist()
    one = contents(tmp_path / "out")
    bring_corpus("kaldi", tmp_path / "out", str(directory), processes=1)
    assert contents(tmp_path / "out") == one


@pytest.mark.parametrize("nothing", ["", None])
def test_a_speaker_or_an_id_that_says_nothing_is_unknown(tmp_path: Path, source: Path, nothing: str | None) -> None:
    entries = [nemo(name, speaker=nothing, id=nothing) for name in NAMES]
    (source / "all.jsonl").write_bytes(jsonl(*entries))
    found = everything(bring_corpus("nemo", tmp_path / "out", str(source / "all.jsonl")))
    assert found.keys() == {*NAMES}
    assert {utterance.speaker for utterance in found.values()} == {"unknown"}
    cuts = [cut(source, name, id=name) for name in NAMES]
    for one in cuts:
        one["supervisions"][0]["speaker"] = nothing  # type: ignore[index]
    (source / "all.jsonl").write_bytes(jsonl(*cuts))
    found = everything(bring_corpus("lhotse", tmp_path / "out", str(source / "all.jsonl")))
    assert {utterance.speaker for utterance in found.values()} == {"unknown"}
    (source / "all.jsonl").write_bytes(jsonl(*cuts, cut(source, "a0", id="")))
    with pytest.raises(UserError, match=rf"all\.jsonl:{len(NAMES) + 1}: key 'id': found \"\"\. Expected a string"):
        bring_corpus("lhotse", tmp_path / "out", str(source / "all.jsonl"))


def test_kaldis_segments_may_be_of_one_channel(tmp_path: Path, source: Path) -> None:
    both = np.stack([samples(1.0, seed=1), samples(1.0, seed=2)], axis=1)
    soundfile.write(source / "wav" / "call.wav", both, 16000, subtype="PCM_16")
    spans = {"a": "call 0 1 0", "b": "call 0 1 1", "c": "call 0 0.5 A", "d": "call 0 0.5 B"}
    extra = cut_from("call wav/call.wav\n", spans)
    unpack(kaldi([], extra), source)
    found = everything(bring_corpus("kaldi", tmp_path / "out", str(source)))
    for name, (channel, count) in {"a": (0, 16000), "b": (1, 16000), "c": (0, 8000), "d": (1, 8000)}.items():
        audio, _ = soundfile.read(tmp_path / "out" / found[name].audio_filepath, dtype="int16")
        assert audio.tolist() == both[:count, channel].tolist()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"wav.scp": "a0 sph2pipe -f wav a0.sph |\n"},
            r"wav\.scp:1: found the pipe 'sph2pipe -f wav a0\.sph \|'\. Expected",
        ),
        ({"wav.scp": "a0\n"}, r"wav\.scp:1: found 'a0'\. Expected a key, and what belongs to it"),
        ({"wav.scp": "a0 wav/a0.wav\na0 wav/a0.wav\n"}, r"wav\.scp:2: the key 'a0' stands already in \S+wav\.scp:1"),
        ({"text": ""}, r"text: has no line for a0\. Expected one for each utterance"),
        ({"text": "a0\n"}, r"of no use: \S+wav\.scp:1: 'a0' has an empty text"),
        ({"text": "a0 yes\nzz no\n"}, r"text: has lines for what is no utterance: zz\. Kaldi's utils/fix_data_dir\.sh"),
        ({"utt2spk": "a1 a\n"}, r"utt2spk: has no line for a0"),
        ({"segments": "a0 talk 0 1\n"}, r"segments:1: names the recording 'talk', which \S+wav\.scp does not"),
        ({"segments": "a0 a0 x 1\n"}, r"segments:1: found 'a0 x 1'\. Expected a recording, its start and end in"),
        ({"segments": "a0 a0 nan 1\n"}, r"segments:1: found 'a0 nan 1'"),
        ({"segments": "a0 a0 0 0.1 left\n"}, r"segments:1: found 'a0 0 0\.1 left'\. Expected .* which one, from 0"),
        ({"segments": "a0 a0 0 0.1 0 1\n"}, r"segments:1: found 'a0 0 0\.1 0 1'"),
        ({"segments": "a0 a0 0 0.1 1\n"}, r"segments:1: 'a0' is in channel 1\. Expected one below 1"),
        ({"segments": "a0 a0 0 0\n"}, r"segments:1: 'a0' holds no samples"),
    ],
)
def test_what_is_wrong_in_kaldis_directory_is_named(
    tmp_path: Path, source: Path, extra: dict[str, str], message: str
) -> None:
    unpack(kaldi(["a0"], extra), source)
    with pytest.raises(UserError, match=message):
        bring_corpus("kaldi", tmp_path / "out", str(source))


def test_kaldis_directory_needs_texts_and_may_be_without_speakers(tmp_path: Path, source: Path) -> None:
    unpack(kaldi(NAMES), source)
    (source / "utt2spk").unlink()
    found = everything(bring_corpus("kaldi", tmp_path / "out", str(source)))
    assert {utterance.speaker for utterance in found.values()} == {"unknown"}
    (source / "text").unlink()
    with pytest.raises(UserError, match=r"text is not there\. Expected a data directory of Kaldi"):
        bring_corpus("kaldi", tmp_path / "out", str(source))
