"""Sources, audio, features, tokenizer and batches."""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
from conftest import DEMO
from run import UserError


def write_sine(path, hertz=1000, rate=16_000, seconds=1.0, channels=1, subtype="PCM_16"):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([wave] * channels, 1), rate, subtype=subtype)
    return path


# ---------------------------------------------------------------------------- sources

def parse_plainly(folder):
    """LibriSpeech by its definition: every line of every .trans.txt is one utterance, its audio beside it."""
    lines = [
        (t.parent, *line.split(" ", 1)) for t in folder.glob("*/*/*.trans.txt") for line in t.read_text().splitlines()
    ]
    return {str(next(parent.glob(id + ".*"))): text.strip() for parent, id, text in lines}


def test_demo_is_librispeech(demo_utterances):
    assert {u.path: u.text for u in demo_utterances} == parse_plainly(DEMO / "corpus/train")
    u = demo_utterances[0]
    assert u.seconds == pytest.approx(len(data.load_audio(u.path)) / 16_000, abs=0.05)
    assert len({u.id for u in demo_utterances}) == len(demo_utterances)


def test_real_librispeech(loud_lab):
    utterances = data.load_utterances(loud_lab / "LibriSpeech/train-clean-5", transcribed=True)
    assert len(utterances) == 1519 and sum(u.seconds for u in utterances) / 3600 == pytest.approx(5.31, abs=0.01)
    assert {u.path: u.text for u in utterances} == parse_plainly(loud_lab / "LibriSpeech/train-clean-5")


def test_manifest(tmp_path, capsys):
    """BOM, CRLF, blank lines, relative and absolute paths, a line twice, and five kinds of broken lines, each named."""
    write_sine(tmp_path / "sub/a.wav")
    write_sine(tmp_path / "b.wav", seconds=0.5)
    rows = [
        {"audio_filepath": "sub/a.wav", "text": "relative"},
        {"audio_filepath": str(tmp_path / "b.wav"), "text": "absolute 你好", "duration": 0.5},
        {"audio_filepath": "sub/a.wav", "text": "twice"},
        {"audio_filepath": "b.wav"},
        "",
        "{broken",
        {"text": "no path"},
        {"audio_filepath": "gone.wav", "text": "x"},
        {"audio_filepath": "b.wav", "text": 5},
        {"audio_filepath": None},
    ]
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "m.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\r\n")
    found = data.load_utterances(tmp_path / "m.jsonl")
    assert sorted((Path(u.path).name, u.text, round(u.seconds, 2)) for u in found if u.text) == [
        ("a.wav", "relative", 1.0), ("a.wav", "twice", 1.0), ("b.wav", "absolute 你好", 0.5)]
    assert len(found) == 4 and len({u.id for u in found}) == 4
    err = capsys.readouterr().err
    assert (
        all(f"m.jsonl:{n}:" in err for n in (6, 7, 9))
        and "gone.wav: there is no such file" in err
        and "skipped 5 of" in err
    )
    assert len(data.load_utterances(tmp_path / "m.jsonl", transcribed=True)) == 3
    assert len(data.load_sources([tmp_path / "m.jsonl", tmp_path / "b.wav"])) == 2  # each file stands once


def test_a_line_separator_inside_a_json_string_does_not_cut_the_line(tmp_path):
    write_sine(tmp_path / "a.wav")
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "one\u2028two"}\n', encoding="utf-8")
    assert [u.text for u in data.load_utterances(tmp_path / "m.jsonl")] == ["one\u2028two"]


@pytest.mark.parametrize("content", [None, {}, {"readme.txt": b"hello"}, {"x.wav": b""}, {"x.jsonl": b""}])
def test_no_audio_is_one_line(tmp_path, content):
    source = tmp_path / "source"
    if content is not None:
        source.mkdir()
        for name, what in content.items():
            (source / name).write_bytes(what)
    with pytest.raises(UserError, match="source") as error:
        data.load_utterances(source)
    assert "\n" not in str(error.value)


def test_same_names_in_two_sources_stay_apart(tmp_path):
    found = data.load_sources([write_sine(tmp_path / "one/a.wav"), write_sine(tmp_path / "two/a.wav")])
    assert len(found) == 2 and len({u.id for u in found}) == 2


# ---------------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    "rate, channels, subtype",
    [(16_000, 1, "PCM_16"), (8_000, 1, "PCM_16"), (48_000, 2, "PCM_24"), (44_100, 1, "FLOAT"), (16_000, 2, "PCM_32")],
)
def test_audio_of_any_kind_keeps_its_pitch_and_length(tmp_path, rate, channels, subtype):
    wave = data.load_audio(write_sine(tmp_path / "a.wav", 1000, rate, 1.0, channels, subtype))
    assert wave.dtype == torch.float32 and wave.shape == (16_000,)
    assert wave.abs().max() == pytest.approx(0.5, abs=0.02)
    assert wave.numpy()[2000:14_000].std() == pytest.approx(0.5 / math.sqrt(2), rel=0.01)
    assert torch.fft.rfft(wave).abs().argmax() == 1000                              # one second: bin k is k Hz


def test_bad_audio_is_one_line_with_the_file(tmp_path):
    good = write_sine(tmp_path / "good.flac").read_bytes()
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is a letter, not a sound\n")
    (tmp_path / "header.wav").write_bytes(write_sine(tmp_path / "x.wav", seconds=0).read_bytes())
    (tmp_path / "stub.flac").write_bytes(good[:30])
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.1], "float32"), 16_000, subtype="FLOAT")
    for name in ("empty.wav", "text.wav", "header.wav", "stub.flac", "nan.wav", "missing.wav"):
        with pytest.raises(UserError, match=name) as error:
            data.load_audio(tmp_path / name)
        assert "\n" not in str(error.value)


def test_names_and_headers_that_lie_are_one_line(tmp_path, capsys):
    """A name that is no UTF-8, a rate that no resampler has room for, 2^35 frames in a FLAC of one second."""
    latin = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write_sine(tmp_path / "a.wav").rename(latin)
    write_sine(tmp_path / "odd.wav", rate=44_101)
    flac = bytearray(write_sine(tmp_path / "long.flac").read_bytes())
    flac[21] |= 0x0F                                                                # total samples, 36 bits from here
    (tmp_path / "long.flac").write_bytes(flac)
    write_sine(tmp_path / "good.wav")
    assert [Path(u.path).name for u in data.load_utterances(tmp_path)] == ["good.wav"]
    assert data.main(["check", str(tmp_path)]) == 1                                 # which prints the names
    said = capsys.readouterr().out
    assert all(words in said for words in ("caf\\udce9.wav", "not UTF-8", "44101 Hz, convert it", "a length of 40265"))


def test_what_is_too_long_is_neither_trained_nor_evaluated_on(tmp_path, capsys):
    for i, seconds in enumerate((1, 2, 20, 25, 60)):
        write_sine(tmp_path / f"{i}.wav", seconds=float(seconds))
    args = argparse.Namespace(data=None, unlabelled=[str(tmp_path)], dev=None, speeds=[0.9, 1.0], batch_seconds=24.0)
    train, [dev] = data.load_training_data(args, print)
    assert sorted(u.seconds for u in [*train, dev]) == [1, 2, 20]
    args.dev = [os.path.relpath(tmp_path / f"{i}.wav") for i in (0, 3, 4)]              # named another way, the same file
    train, dev = data.load_training_data(args, print)
    assert [u.seconds for u in train] == [2, 20] and [u.seconds for u in dev] == [1, 25]
    said = capsys.readouterr().err
    assert said.count("too long for --batch-seconds 24") == 4 and "60 s, cut it up" in said


def test_truncated_audio_is_read_as_far_as_it_goes_or_named(tmp_path):
    """Neither a crash nor silence in place of what is missing."""
    for name in ("a.wav", "a.flac", "a.ogg"):
        path = tmp_path / name
        whole = soundfile.read(write_sine(path, seconds=3.0, subtype="VORBIS" if name == "a.ogg" else "PCM_16"))[0]
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        try:
            wave = data.load_audio(path)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            assert 0.2 * len(whole) < len(wave) < 0.8 * len(whole) and wave[-1000:].abs().max() > 0.4


# ---------------------------------------------------------------------------- features

@pytest.mark.parametrize("frame", [5, 50, 93])
def test_a_click_peaks_in_its_own_frame(frame):
    wave = 1e-3 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    wave[frame * 160] = 1.0                                                         # at frame x 10 ms
    mel = data.log_mel(wave)
    assert mel.shape == (101, 80) and mel.mean(1).argmax() == frame


def test_features_of_speech_are_near_mean_0_deviation_1(demo_utterances):
    frames = torch.cat([data.log_mel(data.load_audio(u.path)) for u in demo_utterances[::10]])
    assert abs(frames.mean()) < 0.8 and 0.5 < frames.std() < 1.5


def test_silence_is_finite():
    assert torch.isfinite(data.log_mel(torch.zeros(1600))).all()


@pytest.mark.parametrize("widest", [4, 27])
def test_spec_augment_masks_as_wide_as_it_says(widest):
    torch.manual_seed(0)
    frames, bins = [], []
    for _ in range(300):
        masked = data.spec_augment(torch.ones(600, 80), widest) == 0
        frames.append(masked.all(1).sum().item())
        bins.append(masked.all(0).sum().item())
        assert torch.equal(masked, masked.all(1)[:, None] | masked.all(0))     # whole frames and whole bins only
    assert max(bins) <= 2 * (widest - 1) and max(frames) <= 10 * 29            # torchaudio: fewer than 5 % of 600
    assert np.mean(bins) == pytest.approx(widest - 1, rel=0.15)                # two, each uniform in 0 ... widest - 1
    assert 80 < np.mean(frames) < 145                                          # ten of 14.5 that overlap
    assert len(set(frames)) > 50


# ---------------------------------------------------------------------------- text

def test_normalise():
    assert data.normalise(" Don\u2019t  stop, ｆｕｌｌ-width_now! ") == "DON'T STOP FULL WIDTH NOW"
    assert data.normalise("你好，world。") == "你好 WORLD"


def test_tokenizer_round_trip(demo_utterances):
    mixed = ["我们 去 MEETING ROOM 三号", "打开 WIFI", "IT'S 好"]
    for texts, frequency in (
        ([u.text for u in demo_utterances], 10),
        ([u.text for u in demo_utterances] + mixed * 3, 2),
    ):
        tokenizer = data.train_tokenizer(texts, 256, frequency)
        again = type(tokenizer).from_str(tokenizer.to_str())                        # as a checkpoint keeps it
        for text in texts:
            ids = tokenizer.encode(data.normalise(text)).ids
            assert 0 not in ids and 1 not in ids and again.decode(ids).strip() == data.normalise(text)
        assert tokenizer.id_to_token(0) == "<blank>" and tokenizer.get_vocab_size() <= 256


def test_small_corpora_give_small_vocabularies(demo_utterances):
    texts = [u.text for u in demo_utterances]
    few, many = (data.train_tokenizer(t, 1000, 10).get_vocab_size() for t in (texts[:5], texts))
    assert len(set("".join(texts[:5]))) <= few < many < 1000
    ids = data.train_tokenizer(texts[:5], 1000, 10).encode("Ж").ids  # never seen: <unk>, not blank, not a crash
    assert ids and 0 not in ids


# ---------------------------------------------------------------------------- batches

def loader(utterances, **options):
    return data.Loader(
        utterances, **(dict(batch_seconds=30, augment=True, speeds=(0.9, 1.0, 1.1), waveforms=True, seed=3) | options)
    )


@pytest.mark.parametrize("augment", [False, True])
def test_every_utterance_once_per_epoch_within_the_budget(demo_utterances, augment):
    for number in range(3):
        batches = loader(demo_utterances, augment=augment).batches(number)
        assert sorted(i for batch in batches for i in batch) == list(range(len(demo_utterances)))
        assert all(max(demo_utterances[i].seconds for i in batch) / 0.9 * len(batch) <= 30 for batch in batches)


def test_an_epoch_as_it_arrives(demo_utterances):
    few = demo_utterances[:12]
    tokenizer = data.train_tokenizer([u.text for u in few], 64, 3)
    seen = {}
    for batch in loader(few, tokenizer=tokenizer).epoch(0):
        assert batch.features.shape[0] * batch.features.shape[1] / 100 <= 30 + 0.1 * len(batch.ids)
        assert batch.seconds == pytest.approx(sum(map(len, batch.waveforms)) / 16_000)
        for id, text, wave, n, ids, m in zip(
            batch.ids,
            batch.texts,
            batch.waveforms,
            batch.feature_lengths,
            batch.targets,
            batch.target_lengths,
            strict=True,
        ):
            assert n == len(wave) // 160 + 1
            seen[id] = text, tokenizer.decode(ids[:m].tolist()).strip()
    assert seen == {u.id: (u.text, data.normalise(u.text)) for u in few}


def test_masks_only_where_they_are_wanted(demo_utterances):
    for masks in (0, 4):
        batch = next(loader(demo_utterances[:12], masks=masks, speeds=(1.0,)).epoch(0))
        plain = [torch.equal(x[:n], data.log_mel(w)) for x, n, w in zip(batch.features, batch.feature_lengths,
                                                                       batch.waveforms)]
        assert not any(plain) if masks else all(plain)


def test_order_and_augmentation_do_not_depend_on_workers(demo_utterances):
    few = demo_utterances[:12]
    runs = [list(loader(few, workers=workers, batch_seconds=12).epoch(1)) for workers in (0, 2)]
    torch.manual_seed(123)                                                          # nor on what was drawn before
    runs.append(list(loader(few, batch_seconds=12).epoch(1)))
    for other in runs[1:]:
        assert [b.ids for b in other] == [b.ids for b in runs[0]]
        assert all(torch.equal(a.features, b.features) for a, b in zip(runs[0], other))
    other_epoch = list(loader(few, batch_seconds=12).epoch(2))
    assert {id for b in other_epoch for id in b.ids} == {u.id for u in few} and [b.ids for b in other_epoch] != [
        b.ids for b in runs[0]
    ]


def test_skip_goes_on_exactly(demo_utterances):
    few = demo_utterances[:12]
    whole, rest = list(loader(few, batch_seconds=12).epoch(1)), list(loader(few, batch_seconds=12).epoch(1, skip=2))
    assert len(rest) == len(whole) - 2 > 0 and all(
        torch.equal(a.features, b.features) for a, b in zip(whole[2:], rest, strict=True)
    )


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_in_equal_numbers(demo_utterances, world):
    parts = [loader(demo_utterances, rank=rank, world=world).batches(4) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    everything = [i for part in parts for batch in part for i in batch]
    assert set(everything) == set(range(len(demo_utterances)))
    extra = len(loader(demo_utterances).batches(4))
    assert sum(map(len, parts)) - extra < world  # only to make the numbers equal is a batch heard twice


def test_a_file_that_breaks_during_training_is_left_out_and_named(tmp_path):
    paths = [write_sine(tmp_path / f"{i}.wav", seconds=1 + 0.01 * i) for i in range(3)]
    utterances = data.load_sources(paths)
    paths[1].write_bytes(b"gone")
    [batch] = loader(utterances).epoch(0)
    assert sorted(batch.ids) == ["0", "2"] and len(batch.failed) == 1 and "1.wav" in batch.failed[0]


def test_a_seed_may_be_a_date(demo_utterances):
    assert len(next(loader(demo_utterances[:3], seed=20261121).epoch(0)).ids)
