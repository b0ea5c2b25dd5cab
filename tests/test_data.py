"""Sources, audio, features, tokenizer, batches; download and check (tools/librispeech.py)."""

import argparse
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.datasets import librispeech as torchaudio_librispeech

import data
from conftest import DEMO
from tools import librispeech
from tools.command_line import UserError
from tools.packed import pack


def write_sine(path, hertz=1000, rate=16_000, seconds=1.0, channels=1, **options):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([wave] * channels, 1), rate, **options)
    return path


def write_noise(path, seconds=3.0, **options):
    """Noise that grows, so that no part of it resembles another."""
    count = int(16_000 * seconds)
    noise = np.random.default_rng(0).uniform(-1, 1, count) * np.linspace(0.01, 0.5, count)
    soundfile.write(path, noise, 16_000, **options)
    return path


def write_manifest(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source_options(**options):
    defaults = dict(data=None, unlabelled=None, dev=None, speeds=[1.0], batch_seconds=24.0)
    return argparse.Namespace(**(defaults | options))


# ---------------------------------------- sources


def parse_plainly(folder):
    """LibriSpeech by its definition: every line of a .trans.txt is an utterance beside it."""
    texts = {}
    for transcript in folder.glob("*/*/*.trans.txt"):
        for line in transcript.read_text().splitlines():
            id, text = line.split(" ", 1)
            [audio] = transcript.parent.glob(id + ".*")
            texts[str(audio)] = text.strip()
    return texts


def test_demo_is_librispeech(demo_utterances):
    assert {u.path: u.text for u in demo_utterances} == parse_plainly(DEMO / "corpus/train")
    u = demo_utterances[0]
    assert u.seconds == pytest.approx(len(data.load_audio(u.path)) / 16_000, abs=0.05)
    assert len({u.id for u in demo_utterances}) == len(demo_utterances)


def test_real_librispeech(loud_lab):
    folder = loud_lab / "LibriSpeech/train-clean-5"
    utterances = data.load_utterances(folder, transcribed=True)
    assert len(utterances) == 1519
    assert sum(u.seconds for u in utterances) / 3600 == pytest.approx(5.31, abs=0.01)
    assert {u.path: u.text for u in utterances} == parse_plainly(folder)


def test_manifest(tmp_path, capsys):
    """BOM, CRLF, blank lines, relative and absolute paths; what is broken is named."""
    write_sine(tmp_path / "sub/a.wav")
    write_sine(tmp_path / "b.wav", seconds=0.5)
    write_sine(tmp_path / "c.wav", seconds=0.4)
    rows = [
        {"audio_filepath": "sub/a.wav", "text": "relative"},
        {"audio_filepath": str(tmp_path / "b.wav"), "text": "absolute 你好", "duration": 0.5},
        {"audio_filepath": "sub/../sub/a.wav", "text": "twice"},
        {"audio_filepath": "c.wav"},
        "",
        "{broken",
        {"text": "no path"},
        {"audio_filepath": "gone.wav", "text": "x"},
        {"audio_filepath": "b.wav", "text": 5},
        {"audio_filepath": None},
        {"audio_filepath": "b.wav", "weight": 0},
        {"audio_filepath": "b.wav", "duration": -1},
        {"audio_filepath": "b.wav", "offset": float("nan")},
    ]
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\r\n")
    skipped = []
    found = data.load_utterances(manifest, skipped=skipped)
    assert [(u.id, u.text, u.seconds) for u in found] == [
        ("a", "relative", 1.0),
        ("b", "absolute 你好", 0.5),
        ("c", None, 0.4),
    ]
    named = "\n".join(skipped)
    for number in (6, 7, 9, 10, 11, 12, 13):
        assert f"m.jsonl:{number}: " in named
    assert "gone.wav: there is no such file" in named and "a.wav: the same audio" in named
    assert "skipped 9 of 12 utterances" in capsys.readouterr().err
    assert len(data.load_utterances(manifest, transcribed=True)) == 2
    assert len(data.load_sources([manifest, tmp_path / "b.wav"])) == 3


def test_a_line_separator_inside_a_json_string_does_not_cut_the_line(tmp_path):
    write_sine(tmp_path / "a.wav")
    row = '{"audio_filepath": "a.wav", "text": "one\u2028two"}\n'
    (tmp_path / "m.jsonl").write_text(row, encoding="utf-8")
    assert [u.text for u in data.load_utterances(tmp_path / "m.jsonl")] == ["one\u2028two"]


@pytest.mark.parametrize(
    "content", [None, {}, {"a.txt": b"hello"}, {"x.wav": b""}, {"x.jsonl": b""}]
)
def test_no_audio_is_one_line(tmp_path, content, capsys):
    source = tmp_path / "source"
    if content is not None:
        source.mkdir()
        for name, what in content.items():
            (source / name).write_bytes(what)
    with pytest.raises(UserError, match="source") as error:
        data.load_utterances(source)
    assert "\n" not in str(error.value)
    assert librispeech.main(["check", str(source)]) == 1
    assert "1 problem\n" in capsys.readouterr().out


def test_ids_are_unique(tmp_path):
    one = write_sine(tmp_path / "one/a.wav")
    two = write_sine(tmp_path / "two/a.wav")
    write_sine(tmp_path / "one/a.flac")
    rows = [{"audio_filepath": str(two), "offset": x, "duration": 0.2} for x in (0.0, 0.2, 0.4)]
    manifest = write_manifest(tmp_path / "m.jsonl", *rows)
    found = data.load_sources([one.parent, two, manifest, manifest])
    assert len(found) == 6 and len({u.id for u in found}) == 6


def test_links_are_followed_and_loops_end(tmp_path):
    write_sine(tmp_path / "real/1/a.wav")
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "one").symlink_to(tmp_path / "real/1")
    (folder / "again").symlink_to(folder)
    (tmp_path / "real/1/up").symlink_to(tmp_path / "real")
    [u] = data.load_utterances(folder)
    assert u.id == "one/a"
    # The same file, by whichever way.
    assert len(data.load_sources([folder, tmp_path / "real"])) == 1


def test_text_that_is_not_utf8_is_not_used(tmp_path, capsys):
    write_sine(tmp_path / "1/1/a.wav")
    write_sine(tmp_path / "1/1/b.wav")
    transcript = tmp_path / "1/1/1-1.trans.txt"
    transcript.write_bytes("a GOOD\nb LE CAFÉ EST PRÊT\n".encode("cp1252"))
    assert [u.text for u in data.load_utterances(tmp_path)] == ["GOOD"]
    assert f"{transcript}:2: not UTF-8, save it as UTF-8" in capsys.readouterr().err
    rows = b'{"audio_filepath": "1/1/a.wav", "text": "caf\xe9"}\n{"audio_filepath": "1/1/b.wav"}\n'
    (tmp_path / "m.jsonl").write_bytes(rows)
    assert [u.id for u in data.load_utterances(tmp_path / "m.jsonl")] == ["b"]
    assert "m.jsonl:1: not UTF-8" in capsys.readouterr().err


def test_a_row_with_a_duration_is_believed_until_its_file_is_read(tmp_path):
    write_sine(tmp_path / "a.wav")
    write_sine(tmp_path / "b.wav", seconds=9.0)
    rows = [
        {"audio_filepath": "a.wav", "duration": 1.02},
        {"audio_filepath": "b.wav", "duration": 3.0},
        {"audio_filepath": "gone.wav", "duration": 2.0},
    ]
    utterances = data.load_utterances(write_manifest(tmp_path / "m.jsonl", *rows))
    assert [u.seconds for u in utterances] == [1.02, 3.0, 2.0]
    [batch] = data.Loader(utterances, 30).epoch()
    assert [u.id for u in batch.utterances] == ["a"]
    found = " ".join(batch.failed)
    assert "b.wav: 9.00 s long, but 3.00 s in its manifest" in found and "gone.wav: there" in found


def test_a_hundred_thousand_rows_are_listed_in_seconds(tmp_path):
    row = '{"audio_filepath": "%d/%d.flac", "duration": 5.5, "text": "ASK CLARA TO COME"}\n'
    lines = [row % (i % 100, i) for i in range(100_000)]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    began = time.process_time()
    assert len(data.load_utterances(tmp_path / "m.jsonl", transcribed=True)) == 100_000
    assert time.process_time() - began < 10  # 1.5 on the machine where this was written


# ---------------------------------------- training data


def test_what_is_too_long_is_neither_trained_nor_evaluated_on(tmp_path, capsys):
    for i, seconds in enumerate((1, 2, 20, 25, 60)):
        write_sine(tmp_path / f"{i}.wav", seconds=float(seconds))
    args = source_options(unlabelled=[str(tmp_path)], speeds=[0.9, 1.0])
    training, [development] = data.load_training_data(args)
    assert sorted(u.seconds for u in [*training, development]) == [1, 2, 20]
    # Named another way, these are the same files.
    args.dev = [os.path.relpath(tmp_path / f"{i}.wav") for i in (0, 3, 4)]
    training, development = data.load_training_data(args)
    assert [u.seconds for u in training] == [2, 20]
    assert [u.seconds for u in development] == [1, 25]
    output = capsys.readouterr()
    assert output.err.count("too long for --batch-seconds 24") == 4
    assert "60 s, cut it up" in output.err
    assert "training on 2 utterances, 0.4 min; evaluating on 2" in output.out


def test_stage_2_takes_no_text_from_unlabelled_audio():
    args = source_options(unlabelled=[str(DEMO / "corpus/train"), str(DEMO / "corpus/dev")])
    training, development = data.load_training_data(args, transcribed=True, quiet=True)
    assert training == data.load_utterances(DEMO / "corpus/train")
    assert development == data.load_utterances(DEMO / "corpus/dev")
    args.data = [str(DEMO / "corpus/dev")]
    training, development = data.load_training_data(args, transcribed=True, quiet=True)
    assert len(development) == 3
    assert {u.text is None for u in training if "corpus/train" in u.path} == {True}
    assert {u.text is None for u in training if "corpus/dev" in u.path} == {False}


def test_text_of_a_machine_is_no_measure(tmp_path, capsys):
    rows = []
    for i in range(60):
        write_sine(tmp_path / f"{i}.wav", seconds=0.1 + 0.01 * i)
        rows.append({"audio_filepath": f"{i}.wav", "text": "x", "weight": 0.5 if i else 1.0})
    args = source_options(data=[str(write_manifest(tmp_path / "m.jsonl", *rows))])
    training, [development] = data.load_training_data(args, transcribed=True)
    assert development.id == "0" and {u.weight for u in training} == {0.5}
    assert "machine" not in capsys.readouterr().out
    write_manifest(tmp_path / "m.jsonl", *rows[1:])
    training, development = data.load_training_data(args, transcribed=True)
    assert len(development) == 3
    assert "the development text is a machine's" in capsys.readouterr().out


# ---------------------------------------- audio


@pytest.mark.parametrize(
    "rate, channels, subtype",
    [
        (16_000, 1, "PCM_16"),
        (8_000, 1, "PCM_16"),
        (48_000, 2, "PCM_24"),
        (44_100, 1, "FLOAT"),
        (16_000, 2, "PCM_32"),
    ],
)
def test_audio_of_any_kind_keeps_its_pitch_and_length(tmp_path, rate, channels, subtype):
    path = write_sine(tmp_path / "a.wav", 1000, rate, 1.0, channels, subtype=subtype)
    wave = data.load_audio(path)
    assert wave.dtype == torch.float32 and wave.shape == (16_000,)
    assert wave.abs().max() == pytest.approx(0.5, abs=0.02)
    assert wave[2000:14_000].std() == pytest.approx(0.5 / math.sqrt(2), rel=0.01)
    # Of one second, bin k is k Hz.
    assert torch.fft.rfft(wave).abs().argmax() == 1000


def test_a_long_file_in_blocks_is_the_whole_file(tmp_path):
    path = write_noise(tmp_path / "a.wav", seconds=65.0)
    blocks = list(data.stream_audio(path))
    assert len(blocks) > 2 and max(map(len, blocks)) <= 30 * 16_000
    assert np.array_equal(torch.cat(blocks), soundfile.read(path, dtype="float32")[0])


def test_channels_of_opposite_phase_do_not_cancel_each_other(tmp_path):
    wave, rate = soundfile.read(write_sine(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), rate)
    assert data.load_audio(tmp_path / "a.wav").abs().max() == pytest.approx(0.5, abs=0.01)


def test_bad_audio_is_one_line_with_the_file(tmp_path):
    good = write_sine(tmp_path / "good.flac").read_bytes()
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is a letter, not a sound\n")
    write_sine(tmp_path / "header.wav", seconds=0)
    (tmp_path / "stub.flac").write_bytes(good[:30])
    not_a_number = np.array([0.1, np.nan, 0.1], "float32")
    soundfile.write(tmp_path / "nan.wav", not_a_number, 16_000, subtype="FLOAT")
    for name in ("empty.wav", "text.wav", "header.wav", "stub.flac", "nan.wav", "missing.wav"):
        with pytest.raises(UserError, match=name) as error:
            data.load_audio(tmp_path / name)
        assert "\n" not in str(error.value)


def test_names_and_headers_that_lie_are_one_line(tmp_path, capsys):
    """A name that is no UTF-8, a rate that no resampler has room for, a FLAC of 2^35 frames."""
    latin = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write_sine(tmp_path / "a.wav").rename(latin)
    write_sine(tmp_path / "odd.wav", rate=44_101)
    flac = bytearray(write_sine(tmp_path / "long.flac").read_bytes())
    flac[21] |= 0x0F  # The number of frames: 36 bits from here.
    (tmp_path / "long.flac").write_bytes(flac)
    write_sine(tmp_path / "good.wav")
    assert [u.id for u in data.load_utterances(tmp_path)] == ["good"]
    assert librispeech.main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    for words in ("caf\\udce9.wav", "not UTF-8", "44101 Hz, convert it", "a length of 40265"):
        assert words in output


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.wav", {}),
        ("gsm.wav", dict(subtype="GSM610")),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.opus", dict(format="OGG", subtype="OPUS")),
        ("a.mp3", {}),
        ("a.aiff", {}),
        ("a.au", {}),
    ],
)
def test_a_file_that_was_cut_off_is_named(tmp_path, name, options):
    path = write_noise(tmp_path / name, **options)
    assert len(data.load_audio(path)) == 48_000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: not readable as audio .(cut off|flac decoder)"):
        data.load_audio(path)


def listed_and_read(path):
    """The length of a file in seconds, as it is listed and as it is read"""
    [u] = data.load_utterances(path)
    return u.seconds, len(data.load_audio(u.path, u.offset, u.seconds)) / 16_000


def test_an_mp3_whose_header_holds_no_length_is_read_whole(tmp_path):
    wave = np.concatenate([np.zeros(80_000), np.random.default_rng(0).uniform(-1, 1, 80_000)])
    path = tmp_path / "a.mp3"
    soundfile.write(path, wave, 16_000, bitrate_mode="VARIABLE")
    assert listed_and_read(path) == (10.0, 10.0)
    path.write_bytes(path.read_bytes().replace(b"Xing", bytes(4)).replace(b"Info", bytes(4)))
    assert abs(soundfile.info(path).duration - 10) > 2  # libsndfile's estimate
    assert listed_and_read(path) == pytest.approx((10.0, 10.0), abs=0.2)


def test_joined_mp3s_are_read_whole(tmp_path):
    once = write_noise(tmp_path / "a.mp3").read_bytes()
    picture = b"ID3\x04\x00\x00" + bytes([0, 2, 0, 0]) + bytes(2 * 128 * 128)
    (tmp_path / "a.mp3").write_bytes(picture + once)
    assert listed_and_read(tmp_path / "a.mp3") == (3.0, 3.0)
    (tmp_path / "a.mp3").write_bytes(picture + once + picture + once)
    # Each brings its encoder's silence, a tenth of a second or two.
    assert listed_and_read(tmp_path / "a.mp3") == pytest.approx((6.0, 6.0), abs=0.4)


def test_audio_that_was_written_into_a_pipe_is_read_whole(tmp_path):
    """A FLAC of unknown length, a WAV of the greatest; of a WAV of length 0 nothing is known."""
    flac = bytearray(write_noise(tmp_path / "a.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(flac)
    assert listed_and_read(tmp_path / "a.flac") == (3.0, 3.0)
    wav = bytearray(write_noise(tmp_path / "a.wav").read_bytes())
    wav[4:8] = wav[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(wav)
    assert listed_and_read(tmp_path / "a.wav") == (3.0, 3.0)
    wav[4:8] = wav[40:44] = bytes(4)
    (tmp_path / "a.wav").write_bytes(wav)
    with pytest.raises(UserError, match="no length; re-encode"):
        data.load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.wav", {}),
        ("gsm.wav", dict(subtype="GSM610")),
        ("a.flac", {}),
        ("a.opus", dict(format="OGG", subtype="OPUS")),
        ("a.mp3", {}),
    ],
)
def test_segments_are_parts_of_their_file(tmp_path, name, options):
    whole = data.load_audio(write_noise(tmp_path / name, **options))
    rows = [
        {"audio_filepath": name, "offset": 0.0, "duration": 0.5, "text": "ONE"},
        {"audio_filepath": name, "offset": 0.5, "duration": 1.25, "text": "TWO"},
        {"audio_filepath": name, "start": 1.75, "end": 2.5, "text": "THREE"},
        {"audio_filepath": name, "offset": 2.5, "text": "FOUR"},
        {"audio_filepath": name, "offset": 2.5, "duration": 2.0, "text": "BEHIND THE END"},
        {"audio_filepath": name, "offset": 4.0, "duration": 2.0, "text": "BEHIND THE END"},
    ]
    found = data.load_sources([write_manifest(tmp_path / "m.jsonl", *rows)])
    assert [u.offset for u in found] == [0.0, 0.5, 1.75, 2.5, 2.5, 4.0]
    assert [u.seconds for u in found] == [0.5, 1.25, 0.75, 0.5, 2.0, 2.0]
    for u in found[:4]:
        begin = int(16_000 * u.offset)
        expected = whole[begin : begin + int(16_000 * u.seconds)]
        assert torch.allclose(data.load_audio(u.path, u.offset, u.seconds), expected, atol=1e-4)
    for u in found[4:]:
        with pytest.raises(UserError, match="no room for a segment"):
            data.load_audio(u.path, u.offset, u.seconds)


# ---------------------------------------- features


@pytest.mark.parametrize("frame", [5, 50, 93])
def test_a_click_peaks_in_its_own_frame(frame):
    wave = 1e-3 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    wave[frame * 160] = 1.0
    mel = data.log_mel(wave)
    assert mel.shape == (101, 80) and mel.mean(1).argmax() == frame


def test_features_of_speech_are_near_mean_0_deviation_1(demo_utterances):
    frames = torch.cat([data.log_mel(data.load_audio(u.path)) for u in demo_utterances[::10]])
    assert abs(frames.mean()) < 0.8 and 0.5 < frames.std() < 1.5


def test_silence_is_finite():
    assert torch.isfinite(data.log_mel(torch.zeros(1600))).all()


def test_speed_changes_length_and_pitch():
    wave = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)
    fast = data.perturb_speed(wave, 1.25)
    assert len(fast) == 12_800
    assert torch.fft.rfft(fast).abs().argmax() * 16_000 / 12_800 == pytest.approx(1250, abs=2)


@pytest.mark.parametrize("widest", [4, 27])
def test_spec_augment_masks_as_wide_as_it_says_with_the_mean(widest):
    torch.manual_seed(0)
    features = torch.randn(600, 80) + 3
    frames = []
    bins = []
    for _ in range(300):
        augmented = data.spec_augment(features, widest)
        masked = augmented != features
        frames.append(masked.all(1).sum().item())
        bins.append(masked.all(0).sum().item())
        assert torch.allclose(augmented[masked], features.mean())
        # Whole frames and whole bins only.
        assert torch.equal(masked, masked.all(1)[:, None] | masked.all(0))
    # torchaudio draws fewer than 5 % of 600 frames: ten masks of 14.5 on average, overlapping.
    assert max(frames) <= 10 * 29 and 80 < np.mean(frames) < 145 and len(set(frames)) > 50
    # Two masks of bins, each uniform in 0 ... widest - 1.
    assert max(bins) <= 2 * (widest - 1)
    assert np.mean(bins) == pytest.approx(widest - 1, rel=0.15)


# ---------------------------------------- text


@pytest.mark.parametrize(
    "text, expected",
    [
        (" Don\u2019t  stop, ｆｕｌｌ-width_now! ", "DON'T STOP FULL WIDTH NOW"),
        ("你好，world。 他说\u2018好\u2019吧", "你好 WORLD 他说 好 吧"),
        ("It\u2018s it\u02bcs it\u00b4s it`s IT\uff07S", "IT'S IT'S IT'S IT'S IT'S"),
        ("the \u2018quoted\u2019 'words' and ''more''", "THE QUOTED WORDS AND MORE"),
        ("the dogs' o'clock, 'tis rock 'n' roll", "THE DOGS O'CLOCK TIS ROCK N ROLL"),
        ("soft\u00adhyphen zero\u200dwidth\ufeff joi\u200cner", "SOFTHYPHEN ZEROWIDTH JOINER"),
        ("two\u200bwords", "TWO WORDS"),
        ("caf\u00e9 cafe\u0301 हिन्दी 42", "CAFÉ CAFÉ हिन्दी 42"),
        ("' \u2019 ` ...", ""),
    ],
)
def test_normalise(text, expected):
    assert data.normalise(text) == expected
    assert data.normalise(expected) == expected


def test_tokenizer_round_trip(demo_utterances):
    texts = [u.text for u in demo_utterances]
    mixed = ["我们 去 MEETING ROOM 三号", "打开 WIFI", "IT'S 好"]
    tokenizer = data.train_tokenizer(texts + mixed * 100, 256)
    # As a checkpoint keeps it:
    again = type(tokenizer).from_str(tokenizer.to_str())
    for text in texts + mixed:
        ids = tokenizer.encode(data.normalise(text)).ids
        assert 0 not in ids and 1 not in ids
        assert again.decode(ids).strip() == data.normalise(text)
    assert tokenizer.id_to_token(0) == "<blank>" and tokenizer.get_vocab_size() <= 256


def test_small_corpora_give_small_vocabularies(demo_utterances):
    texts = [u.text for u in demo_utterances]
    small = data.train_tokenizer(texts[:5], 1000)
    large = data.train_tokenizer(texts, 1000)
    characters = len(set("".join(texts[:5])))
    assert characters <= small.get_vocab_size() < large.get_vocab_size() < 1000
    # Never seen: <unk>, not blank, not a crash.
    ids = small.encode("Ж").ids
    assert ids and 0 not in ids


# ---------------------------------------- batches


def loader(utterances, **options):
    defaults = dict(batch_seconds=12, augment=True, speeds=(0.9, 1.0, 1.1), seed=3)
    return data.Loader(utterances, **(defaults | options))


def ids_of(batches):
    return [[u.id for u in batch.utterances] for batch in batches]


@pytest.mark.parametrize("augment", [False, True])
def test_every_utterance_once_per_epoch_within_the_budget(demo_utterances, augment):
    for number in range(3):
        batches = loader(demo_utterances, augment=augment, batch_seconds=30).batches(number)
        assert sorted(sum(batches, [])) == list(range(len(demo_utterances)))
        for batch in batches:
            assert len(batch) * max(demo_utterances[i].seconds for i in batch) / 0.9 <= 30


def test_an_epoch_as_it_arrives(demo_utterances):
    few = demo_utterances[:12]
    tokenizer = data.train_tokenizer([u.text for u in few], 64)
    caches = [lambda u, speed: torch.full((len(u.text), 2), speed, dtype=torch.float16)]
    texts = {}
    for batch in loader(few, tokenizer=tokenizer, caches=caches).epoch(0):
        count = len(batch.utterances)
        assert count * batch.features.shape[1] / 100 <= 12 + 0.1 * count
        assert batch.seconds == pytest.approx(sum(map(len, batch.waveforms)) / 16_000)
        assert batch.weights.tolist() == [1.0] * count
        assert batch.embeddings[0].shape[0] == count
        for b, u in enumerate(batch.utterances):
            assert batch.feature_lengths[b] == len(batch.waveforms[b]) // 160 + 1
            # The cache is asked for the speed that was drawn.
            speed = batch.embeddings[0][b, 0, 0].item()
            assert len(batch.waveforms[b]) / 16_000 == pytest.approx(u.seconds / speed, abs=0.01)
            labels = batch.targets[b, : batch.target_lengths[b]].tolist()
            texts[u.id] = tokenizer.decode(labels).strip()
        moved = batch.to("meta")
        assert moved.targets.device.type == moved.embeddings[0].device.type == "meta"
    assert texts == {u.id: data.normalise(u.text) for u in few}


def test_masks_only_where_they_are_wanted(demo_utterances):
    for bins in (0, 4):
        options = dict(spec_augment=bins, speeds=(1.0,))
        batch = next(loader(demo_utterances[:12], **options).epoch(0))
        for row, length, waveform in zip(batch.features, batch.feature_lengths, batch.waveforms):
            assert torch.equal(row[:length], data.log_mel(waveform)) == (bins == 0)


def test_order_and_augmentation_do_not_depend_on_workers(demo_utterances):
    few = demo_utterances[:12]
    first = list(loader(few, spec_augment=4).epoch(1))
    torch.manual_seed(123)  # Nor on what was drawn before.
    for workers in (0, 2):
        again = list(loader(few, spec_augment=4, workers=workers).epoch(1))
        assert ids_of(again) == ids_of(first)
        assert all(torch.equal(a.features, b.features) for a, b in zip(first, again))
    other_epoch = ids_of(loader(few).epoch(2))
    assert sorted(sum(other_epoch, [])) == sorted(u.id for u in few)
    assert other_epoch != ids_of(first)


def test_skip_goes_on_exactly(demo_utterances):
    few = demo_utterances[:12]
    whole = list(loader(few).epoch(1))
    rest = list(loader(few).epoch(1, skip=2))
    assert len(rest) == len(whole) - 2 > 0
    assert all(torch.equal(a.features, b.features) for a, b in zip(whole[2:], rest))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_in_equal_numbers(demo_utterances, world):
    parts = []
    for rank in range(world):
        parts.append(loader(demo_utterances, rank=rank, world=world).batches(4))
    assert len({len(part) for part in parts}) == 1
    assert set(sum(sum(parts, []), [])) == set(range(len(demo_utterances)))
    # Only to make the numbers equal is a batch used twice.
    extra = sum(map(len, parts)) - len(loader(demo_utterances).batches(4))
    assert extra < world


def test_the_worst_batches_are_the_largest_and_that_of_the_longest(demo_utterances):
    few = demo_utterances[:20]
    worst = loader(few, rank=1, world=2).worst()
    longest = max(few, key=lambda u: u.seconds)
    assert any(longest in batch.utterances for batch in worst)
    sizes = [len(batch) * max(few[i].seconds for i in batch) for batch in loader(few).batches(0)]
    found = [len(b.utterances) * max(u.seconds for u in b.utterances) for b in worst]
    assert max(found) == max(sizes)
    # At the slowest speed.
    for batch in worst:
        seconds = sum(u.seconds for u in batch.utterances)
        assert batch.seconds == pytest.approx(seconds / 0.9, rel=0.01)


def test_a_file_that_breaks_during_training_is_left_out_and_named(tmp_path):
    paths = [write_sine(tmp_path / f"{i}.wav", seconds=1 + 0.01 * i) for i in range(3)]
    utterances = data.load_sources(paths)
    paths[1].write_bytes(b"gone")
    [batch] = loader(utterances).epoch(0)
    assert sorted(*ids_of([batch])) == ["0", "2"]
    assert len(batch.failed) == 1 and "1.wav" in batch.failed[0]

    # Of a batch that is all broken, a neighbour takes the place in training.
    [one] = loader(utterances, batch_seconds=1.1, rank=1, world=3, augment=False).epoch(0)
    assert one.utterances == [] and one.features.shape == (0, 0, 80) and "1.wav" in one.failed[0]
    for batch in loader(utterances, batch_seconds=1.1).epoch(0):
        assert len(batch.utterances) == 1


def test_what_cannot_be_learned_from_is_named(tmp_path):
    tokenizer = data.train_tokenizer(["ABC"], 10)
    long = data.Utterance(str(write_sine(tmp_path / "long.wav")), 1.0, "ABC " * 20, "long")
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    utterances = [long, data.Utterance(str(silent), 1.0, "A", "silent")]
    [batch] = loader(utterances, tokenizer=tokenizer).epoch(0)
    assert batch.utterances == [] and batch.targets.shape == (0, 0)
    failed = " ".join(batch.failed)
    assert "long.wav: its transcript of" in failed and "silent.wav: silence" in failed


def test_a_seed_may_be_a_date(demo_utterances):
    assert next(loader(demo_utterances[:3], seed=20261121).epoch(0)).utterances


def test_thousands_of_rows_are_packed_without_a_difference(tmp_path):
    rows = []
    write_noise(tmp_path / "a.wav", seconds=40.0)
    for i in range(3000):
        segment = {"offset": i / 100, "duration": 0.2 + i * 7 % 300 / 100}
        rows.append({"audio_filepath": "a.wav", "text": f"ROW {i}" if i % 3 else None, **segment})
    plain = data.load_utterances(write_manifest(tmp_path / "m.jsonl", *rows))
    plain.append(data.Utterance(os.fsdecode(b"/caf\xe9.wav"), 3.5, "你好", "é", 0.5))
    packed = pack(plain)
    assert packed == plain and pack(packed) is packed and len(packed) == 3001
    assert packed[-1] == plain[-1] and packed[5:9] == plain[5:9] and packed[5:9] != plain[6:10]
    assert packed.seconds.tolist() == [u.seconds for u in plain]
    with pytest.raises(IndexError):
        packed[3001]

    # The batches, by hand: in order of length, as many as fit.
    expected = [[]]
    for i in sorted(range(3001), key=lambda i: plain[i].seconds):
        if plain[i].seconds / 0.9 * (len(expected[-1]) + 1) > 12:
            expected.append([])
        expected[-1].append(i)
    assert loader(plain, augment=False).batches(0) == expected


def test_a_loader_that_was_pickled_or_forked_gives_the_same_batches(tmp_path):
    write_noise(tmp_path / "a.wav", seconds=40.0)
    utterances = []
    for i in range(2000):
        path = str(tmp_path / "a.wav")
        utterances.append(data.Utterance(path, 1 + i % 50 / 50, None, str(i), offset=i / 60))
    first = loader(utterances)
    pickled = pickle.loads(pickle.dumps(first))
    assert pickled == first and pickled.batches(7) == first.batches(7)
    skip = len(first.batches(7)) - 4
    expected = list(first.epoch(7, skip))
    for other in (pickled, loader(utterances, workers=2), loader(pack(utterances), workers=2)):
        found = list(other.epoch(7, skip))
        assert ids_of(found) == ids_of(expected) and len(found) == 4
        assert all(torch.equal(a.features, b.features) for a, b in zip(found, expected))


# ---------------------------------------- librispeech


def test_check_reads_every_file_whole(tmp_path, capsys):
    for i in range(3):
        write_sine(tmp_path / f"{i}.wav", hertz=500 + i)
    assert librispeech.main(["check", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "nothing wrong" in output and "3 utterances, 0.1 min, 1.0 to 1.0 s" in output

    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    write_sine(tmp_path / "copy.wav", hertz=501)
    write_sine(tmp_path / "long.wav", seconds=36.0)
    flac = write_sine(tmp_path / "cut.flac")
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size // 2])
    assert librispeech.main(["check", str(tmp_path), str(tmp_path / "nowhere")]) == 1
    output = capsys.readouterr().out
    for words in (
        "silent.wav: silence",
        "the same audio as",
        "36 s; training",
        "cut.flac: not",
        "no such file or folder",
        "5 problems",
    ):
        assert words in output


class Server(http.server.BaseHTTPRequestHandler):
    """Sends what is missing of `content`; of what is asked from its beginning, only a half."""

    content = b""

    def do_GET(self):
        begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        rest = self.content[begin:]
        self.send_response(206 if rest else 416)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if begin else rest[: len(rest) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def dev_clean(monkeypatch):
    """A server of a small dev-clean, named in torchaudio's list"""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(DEMO / "corpus/dev", "LibriSpeech/dev-clean")
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.RequestHandlerClass.content = archive.getvalue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/dev-clean.tar.gz"
    checksums = {url: hashlib.sha256(archive.getvalue()).hexdigest()}
    monkeypatch.setattr(torchaudio_librispeech, "_CHECKSUMS", checksums)
    yield checksums
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_where_it_broke(dev_clean, tmp_path, capsys):
    command = ["download", "dev-clean", "--to", str(tmp_path)]
    assert librispeech.main(command) == 2
    assert "ended early; run the same command again to go on" in capsys.readouterr().err
    for _ in range(2):
        assert librispeech.main(command) == 0
    assert capsys.readouterr().out.count("LibriSpeech/dev-clean is ready") == 2
    found = data.load_utterances(tmp_path / "LibriSpeech/dev-clean", transcribed=True)
    assert len(found) == len(parse_plainly(DEMO / "corpus/dev"))
    assert [p.name for p in tmp_path.iterdir()] == ["LibriSpeech"]


def test_a_wrong_download_is_deleted(dev_clean, tmp_path, capsys):
    [url] = dev_clean
    dev_clean[url] = "0" * 64
    command = ["download", "dev-clean", "--to", str(tmp_path)]
    assert librispeech.main(command) == 2 and librispeech.main(command) == 2
    assert "wrong checksum" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))
    assert librispeech.main(["download", "dev-dirty"]) == 2
    assert "no part 'dev-dirty'; choose one of dev-clean" in capsys.readouterr().err


def test_segments_of_a_development_file_are_not_trained_on(tmp_path):
    """A whole file in --dev keeps out all its segments; a segment in --dev only itself."""
    whole = data.Utterance("/a/x.flac", 9.0, "X", "x")
    first = data.Utterance("/a/x.flac", 4.0, "X", "x-1", offset=0.0)
    second = data.Utterance("/a/x.flac", 5.0, "X", "x-2", offset=4.0)
    other = data.Utterance("/a/y.flac", 5.0, "Y", "y")
    assert data.without([first, second, other], [whole]) == [other]
    assert data.without([whole, first, second, other], [first]) == [second, other]


def write_rows(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_segments_that_overlap_development_audio_are_not_trained_on():
    dev = [data.Utterance("/a/x.flac", 3.0, "X", "x", offset=0.0)]
    near = data.Utterance("/a/x.flac", 3.0, "X", "x-1", offset=0.5)
    behind = data.Utterance("/a/x.flac", 3.0, "X", "x-2", offset=2.995)
    assert data.without([near, behind], dev) == [behind]


def test_a_segment_at_the_very_end_of_its_file_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(64_000), 16_000)
    with pytest.raises(UserError, match="no room for a segment"):
        data.load_audio(tmp_path / "a.wav", 3.95, 0.1)
    soundfile.write(tmp_path / "b.wav", 0.1 * np.ones(320), 16_000)
    with pytest.raises(UserError, match="shorter than 0.1 s"):
        data.load_audio(tmp_path / "b.wav", None, 0.11)


def test_a_transcribed_row_is_kept_beside_one_of_the_same_audio_without_text(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(16_000), 16_000)
    rows = [{"audio_filepath": "a.wav"}, {"audio_filepath": "a.wav", "text": "HELLO"}]
    manifest = write_rows(tmp_path / "m.jsonl", *rows)
    [u] = data.load_utterances(manifest, transcribed=True, skipped=[])
    assert u.text == "HELLO"


@pytest.mark.parametrize(
    "row", [{"offset": "7"}, {"end": 10**400}, {"weight": True}, {"duration": []}]
)
def test_numbers_of_a_manifest_that_are_none_are_named(row, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(16_000), 16_000)
    good = {"audio_filepath": "a.wav", "id": "good"}
    manifest = write_rows(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", **row}, good)
    assert [u.id for u in data.load_utterances(manifest)] == ["good"]
    assert "m.jsonl:1: " in capsys.readouterr().err
