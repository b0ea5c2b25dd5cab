"""Embeddings on disk: what is kept, what an interruption costs, what is refused; runs of stage 1
with and without them; the probe."""

import fcntl
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import types
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

import data
import model
import pretrain_kd
from conftest import DEMO
from pretrain_kd import Teacher, target_names
from tools import probe, training
from tools.command_line import UserError
from tools.machine import start_processes
from tools.teacher_cache import Cache, fill

SPEEDS = (0.9, 1.0, 1.1)


class FakeTeacher:
    """Embeds every 40 ms as mean, deviation and maximum of its samples."""

    def __init__(self, spec="somewhere/fake", factor=1.0):
        self.spec = spec
        self.layers = ["last"]
        self.dim = 3
        self.factor = factor
        self.calls = 0
        self.interrupt_at = None

    def embed(self, waveforms):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        rows = []
        for waveform in waveforms:
            T = max(1, (len(waveform) + 320) // 640)
            samples = torch.nn.functional.pad(waveform, (0, 640))[: 640 * T].reshape(T, 640)
            row = torch.stack([samples.mean(1), samples.std(1), samples.amax(1)], dim=1)
            rows.append(self.factor * row)
        lengths = torch.tensor([len(row) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    @property
    def fingerprint(self):
        return [self.factor * k for k in range(1, 65)]


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """(6 utterances to train on, 3 to evaluate on), whole files"""
    folder = tmp_path_factory.mktemp("audio")
    generator = torch.Generator().manual_seed(0)
    utterances = []
    for k in range(9):
        path = folder / f"{k}.wav"
        samples = 0.1 * torch.randn(12_000 + 3_000 * k, generator=generator)
        soundfile.write(path, samples.numpy(), 16_000)
        utterances.append(data.Utterance(str(path), len(samples) / 16_000, id=str(k)))
    return utterances[:6], utterances[6:]


@pytest.fixture
def teachers():
    return [FakeTeacher("a/one"), FakeTeacher("b/two:1,last", factor=5.0)]


def filled(folder, teachers, audio, **more):
    """The caches, after filling them in batches of at most 4 s"""
    caches, training, development = fill(folder, teachers, *audio, SPEEDS, 4.0, **more)
    assert (training, development) == audio
    return caches


def check(caches, teachers, audio):
    """Every utterance at every speed has what its teacher gives."""
    training, development = audio
    wanted = [(u, speed) for u in training for speed in SPEEDS] + [(u, 1.0) for u in development]
    for cache, teacher in zip(caches, teachers):
        for u, speed in wanted:
            waveform = data.load_audio(u.path, u.offset, u.seconds)
            if speed != 1.0:
                waveform = data.perturb_speed(waveform, speed)
            [expected], [n] = teacher.embed([waveform])
            found = cache(u, speed)
            assert found.dtype == torch.float16 and found.shape == (n, teacher.dim)
            torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=2e-3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------- what is kept


def test_a_cache_holds_what_teachers_gave_and_they_encode_once(audio, teachers, tmp_path, capsys):
    caches = filled(tmp_path, teachers, audio)
    output = capsys.readouterr().out
    written = re.search(r"([\d.e-]+) GB to write \(one [\d.e-]+, two-1,last", output)
    check(caches, teachers, audio)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.f16")]
    assert float(written[1]) == pytest.approx(sum(sizes) / 1e9, rel=0.02)
    assert len((tmp_path / "one.0.jsonl").read_text().splitlines()) == 1 + 6 * 3 + 3

    before = contents(tmp_path)
    again = [FakeTeacher("moved/one"), FakeTeacher("b/two:1,last", factor=5.0)]
    filled(tmp_path, again, audio)
    assert [teacher.calls for teacher in again] == [0, 0]
    assert contents(tmp_path) == before and "to write" not in capsys.readouterr().out


def test_real_teachers(teacher_folders, audio, tmp_path):
    """In batches as they come, with a teacher that may be padded and one that may not"""
    teachers = [Teacher(teacher_folders[name]) for name in ("hubert", "moonshine")]
    check(filled(tmp_path, teachers, audio), teachers, audio)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_a_cache_equal_those_of_the_teacher(audio, teachers, tmp_path, workers):
    caches = filled(tmp_path, teachers, audio)
    caches = pickle.loads(pickle.dumps(caches))  # as they go to a process that was not forked
    loader = data.Loader(
        audio[0], 4.0, caches=caches, augment=True, speeds=SPEEDS, workers=workers, seed=1
    )
    for batch in loader.epoch():
        assert len(batch.embeddings) == 2
        for found, teacher in zip(batch.embeddings, teachers):
            expected, lengths = teacher.embed(batch.waveforms)
            assert lengths.tolist() == ((batch.feature_lengths + 1) // 4).tolist()
            torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=2e-3)


def test_segments_of_one_file(teachers, tmp_path):
    samples = 0.1 * torch.randn(64_000, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "long.wav"
    soundfile.write(path, samples.numpy(), 16_000)
    segments = []
    for offset, seconds in ((0.0, 1.5), (1.5, 1.0), (2.5, 1.5), (1.0, 1.0)):
        segments.append(data.Utterance(str(path), seconds, offset=offset))
    segments.append(data.Utterance(str(path), 4.0))  # the whole file
    split = (segments[:3], segments[3:])
    check(filled(tmp_path / "cache", teachers, split), teachers, split)
    twice = [segments[0], replace(segments[0], seconds=1.0)]
    with pytest.raises(UserError, match="different length begin at 0.0 s"):
        fill(tmp_path / "cache", teachers, twice, [], SPEEDS, 4.0)


def test_no_embedding_at_a_speed_that_nobody_asked_for(audio, teachers, tmp_path):
    training, development = audio
    caches, *_ = fill(tmp_path, teachers, training, development, (0.9, 1.1), 4.0)
    assert caches[0].find(training[0], 1.0) is None and caches[0].find(development[0], 1.0)
    # Asked for later, it is added.
    filled(tmp_path, teachers, audio)
    assert Cache(tmp_path, teachers[0], "one").find(training[0], 1.0)


def test_audio_that_cannot_be_read_is_left_out(audio, teachers, tmp_path, capsys):
    training, development = audio
    gone = data.Utterance(str(tmp_path / "gone.wav"), 1.0)
    found = fill(tmp_path / "cache", teachers, [gone, *training], development, SPEEDS, 4.0)
    assert found[1:] == audio
    assert "skipped: " in capsys.readouterr().err


# ---------------------------------------- interruptions


def test_interrupted_filling_goes_on(audio, teachers, tmp_path, capsys):
    """Ctrl-C in the fifth batch, then what a crash leaves: half an embedding, half a line. The rest
    is appended."""
    filled(tmp_path / "whole", teachers, audio)
    folder = tmp_path / "cache"
    teachers[1].calls = 0
    teachers[1].interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        filled(folder, teachers, audio)
    done = contents(folder)
    assert sorted(done) == ["one.0.f16", "one.0.jsonl", "two-1,last.0.f16", "two-1,last.0.jsonl"]
    for name in done:
        assert 0 < len(done[name]) < (tmp_path / "whole" / name).stat().st_size
    for name, rest in (("one.0.f16", bytes(10)), ("one.0.jsonl", b'{"audio": "x", "sp')):
        with open(folder / name, "ab") as file:
            file.write(rest)

    capsys.readouterr()
    caches = filled(folder, teachers, audio)
    for name, start in done.items():
        assert (folder / name).read_bytes().startswith(start)
    complete = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.f16"))
    assert sum(path.stat().st_size for path in folder.glob("*.f16")) == complete
    kept = sum(len(content) for name, content in done.items() if name.endswith(".f16"))
    promised = float(re.search(r"([\d.e-]+) GB to write", capsys.readouterr().out)[1])
    assert promised == pytest.approx((complete - kept) / 1e9, rel=0.02)
    check(caches, teachers, audio)
    # An index whose embeddings are gone from the end is believed as far as they reach.
    with open(folder / "one.0.f16", "ab") as file:
        file.truncate(1000)
    check(filled(folder, teachers, audio), teachers, audio)


def test_a_cache_and_its_audio_may_move(audio, teachers, tmp_path):
    u = audio[0][0]
    (tmp_path / "before/a/b/c").mkdir(parents=True)
    before = replace(u, path=shutil.copy(u.path, tmp_path / "before/a/b/c"))
    after = replace(u, path=before.path.replace("before", "after"))
    filled(tmp_path / "before/cache", teachers, ([before], []))
    (tmp_path / "before").rename(tmp_path / "after")
    calls = [teacher.calls for teacher in teachers]
    caches = filled(tmp_path / "after/cache", teachers, ([after], []))
    assert [teacher.calls for teacher in teachers] == calls
    check(caches, teachers, ([after], []))


# ---------------------------------------- what is refused


def test_what_a_cache_refuses(audio, teachers, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    filled(folder, teachers, audio)
    index = folder / "one.0.jsonl"
    lines = index.read_text().splitlines(keepends=True)

    def refused(*words, teachers=teachers, audio=audio):
        with pytest.raises(UserError) as error:
            filled(folder, teachers, audio)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    # Another teacher of the same name, or other layers or another width of it
    other = FakeTeacher("a/one", factor=1.2)
    refused("one.0.jsonl is stale", "are not what those", "delete", teachers=[other])
    wide = FakeTeacher("a/one")
    wide.dim = 4
    refused("dim was 3, is 4", teachers=[wide])

    # Two files of one key: .../a/train/1/2/x.wav and .../b/train/1/2/x.wav
    twice = [replace(audio[0][0], path=f"{tmp_path}/{name}/train/1/2/x.wav") for name in "ab"]
    refused("finds these twice", "rename", audio=(twice, []))

    # Audio of another length than it had, a damaged header
    changed = [re.sub(r'"seconds": [\d.]+', '"seconds": 9.75', line) for line in lines[1:]]
    index.write_text("".join(lines[:1] + changed))
    refused("9.75 s, now it has", "delete")
    index.write_text("nonsense\n" + "".join(lines[1:]))
    refused(str(index), "header is damaged")

    # One writer at a time, room on the disk, and a folder that can be written
    index.write_text("".join(lines[:3]))
    with open(index) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        refused("another process is filling", "wait")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=100))
    refused("1e-07 GB free", "are needed")
    folder = tmp_path / "a file"
    folder.write_text("")
    refused("cannot write --cache", "a file")


def test_teachers_of_one_name_have_files_of_their_own(audio, tmp_path):
    teachers = [FakeTeacher("a/one"), FakeTeacher("b/one", factor=2.0)]
    check(filled(tmp_path, teachers, audio), teachers, audio)
    assert sorted(path.name for path in tmp_path.glob("*.f16")) == ["a-one.0.f16", "b-one.0.f16"]


def one_of_two(rank, port, folder, training):
    """What each of two processes of torchrun does: fill a shared cache, then one of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    rank, world = start_processes(torch.device("cpu"))
    teachers = [FakeTeacher("a/one")]
    more = dict(rank=rank, world=world)
    fill(folder / "shared", teachers, training, [], SPEEDS, 4.0, **more)
    with pytest.raises(UserError, match="not one folder for all processes"):
        fill(folder / str(rank), teachers, training, [], SPEEDS, 4.0, **more)
    torch.distributed.destroy_process_group()


def test_two_processes_fill_one_cache(audio, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    start = multiprocessing.get_context("fork").Process
    ranks = []
    for rank in range(2):
        ranks.append(start(target=one_of_two, args=(rank, port, tmp_path, audio[0]), daemon=True))
        ranks[-1].start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    indices = sorted((tmp_path / "shared").glob("*.jsonl"))
    shares = [len(index.read_text().splitlines()) - 1 for index in indices]
    assert len(shares) == 2 and min(shares) > 5 and sum(shares) == 6 * 3
    teacher = FakeTeacher("a/one")
    check([Cache(tmp_path / "shared", teacher, "one")], [teacher], (audio[0], []))


# ---------------------------------------- runs of stage 1


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, demo_utterances, teacher_folders):
    """A run of stage 1 but --out: 6 utterances, 3 of development, three targets of two teachers"""
    folder = tmp_path_factory.mktemp("manifests")
    shortest = sorted(demo_utterances, key=lambda u: (u.seconds, u.id))
    for name, part in (("train", shortest[:6]), ("dev", shortest[6:9])):
        rows = [json.dumps({"audio_filepath": u.path, "text": u.text}) for u in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return [
        "--data",
        str(folder / "train.jsonl"),
        "--dev",
        str(folder / "dev.jsonl"),
        "--teachers",
        teacher_folders["hubert"] + ":1,last",
        teacher_folders["moonshine"],
        "--weights",
        "1",
        "2",
        "--steps",
        "3",
        "--eval-every",
        "2",
        "--batch-seconds",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]


def pretrain(arguments, out, *more):
    return pretrain_kd.main([*arguments, "--out", str(out), *map(str, more)])


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_training(a, b):
    a, b = [torch.load(out / "last.pt", weights_only=True)["raw_model"] for out in (a, b)]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def cached(arguments, tmp_path_factory):
    """(cache, run directory) of a run that filled it"""
    folder = tmp_path_factory.mktemp("cached")
    assert pretrain(arguments, folder / "out", "--cache", folder / "cache") == 0
    return folder / "cache", folder / "out"


def test_a_run_from_the_cache_equals_one_without(arguments, cached, tmp_path):
    """Within what float16 rounds; each target has its share of the loss."""
    assert pretrain(arguments, tmp_path / "live") == 0
    for live, row in zip(log(tmp_path / "live"), log(cached[1]), strict=True):
        assert live.keys() == row.keys()
        for key in live.keys() - {"audio_per_second"}:
            assert live[key] == pytest.approx(row[key], rel=0.02), key
        for loss, prefix in (("loss", "L1 "), ("dev L1", "dev L1 ")):
            if loss in row:
                parts = [row[prefix + name] for name in ("hubert:1", "hubert", "moonshine")]
                assert row[loss] == pytest.approx(np.dot(parts, [0.5, 0.5, 2]), rel=1e-4)


def test_an_interrupted_run_goes_on_bit_by_bit_where_its_cache_moved(
    arguments, cached, tmp_path, monkeypatch, capsys
):
    sum_gradients = training.Run.sum_gradients

    def interrupted(run):
        if run.position["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sum_gradients(run)

    monkeypatch.setattr(training.Run, "sum_gradients", interrupted)
    shutil.copytree(cached[0], tmp_path / "here")
    assert pretrain(arguments, tmp_path / "out", "--cache", tmp_path / "here") == 143
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    assert pretrain(arguments, tmp_path / "out", "--cache", tmp_path / "there") == 0
    same_training(cached[1], tmp_path / "out")
    assert contents(cached[0]) == contents(tmp_path / "there")
    assert "to write" not in capsys.readouterr().out


def test_one_head_for_all_and_no_audio_as_it_is(arguments, tmp_path):
    """Speeds without 1.0: the cache has nothing at that speed, and nobody asks for it."""
    more = ["--combine", "random", "--speeds", 0.9, 1.1, "--cache", tmp_path / "cache"]
    assert pretrain(arguments, tmp_path / "out", *more) == 0
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    rows = log(tmp_path / "out")
    assert best["config"]["head_dims"] == (32,) and "L1 random" in rows[0]
    assert 0 < rows[-1]["dev L1 hubert:1"] < 2


def test_options_that_do_not_fit_are_one_line(arguments, teacher_folders, tmp_path, capsys):
    hubert = teacher_folders["hubert"]
    wide = shutil.copytree(DEMO / "teachers/hubert", tmp_path / "wide")
    for more, *words in (
        (["--weights", "1", "2", "3"], "--weights needs one per teacher: 2, found 3"),
        (["--weights", "1", "0"], "--weights", "above 0"),
        (["--teachers", hubert, hubert], "twice"),
        (["--teachers", f"{hubert}:0,1", f"{hubert}/:1"], "a layer twice"),
        (["--teachers", f"{hubert}:7", wide], "layer '7'", ":0 to"),
        (["--teachers", hubert, wide, "--combine", "random"], "one width, found 32, 320"),
    ):
        assert pretrain(arguments, tmp_path / "out", *more) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and all(word in error for word in words), error


# ---------------------------------------- the probe


def test_what_a_linear_layer_can_and_cannot_read():
    generator = torch.Generator().manual_seed(0)
    letters = "ABCDE"
    code = torch.randn(5, 16, generator=generator)
    readable = []
    nothing = []
    for _ in range(60):
        labels = torch.randint(5, (12,), generator=generator).tolist()
        text = "".join(letters[label] for label in labels)
        frames = torch.zeros(36, 16)
        frames[::3] = code[labels]  # a letter, then two frames of rest
        readable.append((frames, text))
        nothing.append((torch.randn(36, 16, generator=generator), text))
    assert probe.character_errors(readable[:50], readable[50:]) < 2
    assert probe.character_errors(nothing[:50], nothing[50:]) > 60


def test_how_much_of_targets_few_dimensions_hold():
    torch.manual_seed(0)
    latent = torch.randn(500, 6)
    mixing = torch.randn(3, 20)
    # Two targets of three hidden dimensions each, alike and different, and one of white noise.
    first = latent[:, :3] @ mixing
    alike = latent[:, :3] @ mixing.flip(1)
    other = latent[:, 3:] @ mixing
    noise = torch.randn(500, 20)
    for other_target, least, most in ((alike, 1.99, 2), (other, 0.9, 1.5)):
        alone, shared = probe.reachable_variance([first, other_target], 3)
        assert min(alone) > 0.999
        assert least < sum(shared) <= most + 1e-3
    [alone], _ = probe.reachable_variance([noise], 5)
    assert 0.2 < alone < 0.5
    # No three directions can hold more than the singular values say.
    alone, _ = probe.reachable_variance([torch.cat([first, other], 1)], 3)
    standardised = torch.cat([first, other], 1)
    standardised = (standardised - standardised.mean(0)) / standardised.std(0)
    energy = torch.linalg.svdvals(standardised) ** 2
    assert alone[0] == pytest.approx((energy[:3].sum() / energy.sum()).item(), abs=1e-3)


def test_how_much_one_teacher_knows_of_another():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 2000, 10)
    y = x @ torch.randn(10, 15)
    halves = [(z[:1000], z[1000:]) for z in (x, y, x + noise, noise)]
    linear, mixed, other = [probe.predicted_variance(halves[0], half) for half in halves[1:]]
    assert linear > 0.99 and mixed == pytest.approx(0.5, abs=0.06) and abs(other) < 0.05


def test_a_student_is_probed(tmp_path, capsys):
    student = model.Student(model.Config(dim=32, layers=1, head_dims=(8,)))
    about = {"config": student.config, "stage": 1}
    model.save_checkpoint(tmp_path / "best.pt", model=student.state_dict(), **about)
    train = str(DEMO / "corpus/train")
    argv = [str(tmp_path), "--data", train, "--dev", str(DEMO / "corpus/dev/145")]
    assert probe.main(argv) == 0
    found = re.search(r"\| ([\d.]+) % \|", capsys.readouterr().out)
    assert 20 < float(found[1]) <= 100
    assert probe.main([*argv[:1], "--data", str(DEMO / "corpus/unlabelled/103")]) == 2


def test_the_probe_separates_a_teacher_from_noise(demo_utterances, teacher_folders, capsys):
    """The demo's teacher reads better than log-mel, a random network does not."""
    teachers = [Teacher(str(DEMO / "teachers/hubert")), Teacher(teacher_folders["whisper"])]
    dev = data.load_utterances(DEMO / "corpus/dev", transcribed=True)
    names = target_names(teachers)
    probe.probe(teachers, names, demo_utterances, dev, 30.0, 16, seconds=(60, 20))
    table = capsys.readouterr().out
    wrong = {}
    for name in ("hubert", "whisper", "log-mel features"):
        wrong[name] = float(re.search(rf"\| {name} \|.*\| ([\d.]+) % \|", table)[1])
    assert wrong["hubert"] < 0.7 * wrong["log-mel features"], table
    assert wrong["whisper"] > 0.9 * wrong["log-mel features"], table
    assert "| 1.9 M | 50 Hz | 320 |" in table

    silent = [replace(u, text=None) for u in demo_utterances[:4]]
    gone = [replace(u, path="gone.wav") for u in silent]
    with pytest.raises(UserError, match="none of the audio"):
        probe.probe(teachers, names, silent, gone, 30.0, 16)


def test_the_probe_of_audio_without_transcripts_trains_nothing(arguments, tmp_path, capsys):
    silent = next((DEMO / "corpus/unlabelled").iterdir())
    assert pretrain(arguments, tmp_path / "out", "--probe", "--data", silent) == 0
    table = capsys.readouterr().out
    assert "| hubert:1 |" in table and "| 41.67 Hz | 32 |" in table and "unknown" in table
    assert not (tmp_path / "out").exists()


def test_a_real_teacher_of_the_lab(loud_lab, tmp_path):
    """Moonshine on LibriSpeech, through the cache"""
    teacher = Teacher(str(loud_lab / "teachers/moonshine-tiny"))
    assert teacher.clocks[0].hop == 384 and teacher.dim == 2 * 288
    utterances = data.load_utterances(loud_lab / "LibriSpeech/dev-clean-part/84")[:2]
    check(filled(tmp_path, [teacher], (utterances, [])), [teacher], (utterances, []))


def test_a_name_that_begins_like_another_is_another_cache(tmp_path, audio):
    """whisper-tiny and whisper-tiny.en in one folder"""
    for name, factor in (("whisper-tiny.en", 1.0), ("whisper-tiny", 2.0)):
        teacher = FakeTeacher(factor=factor)
        cache = Cache(tmp_path, teacher, name)
        cache.open()
        embeddings, lengths = teacher.embed([data.load_audio(audio[0][0].path)])
        cache.append([audio[0][0]], 1.0, embeddings, lengths)
        cache.close()
    a = Cache(tmp_path, FakeTeacher(factor=1.0), "whisper-tiny.en")(audio[0][0], 1.0)
    b = Cache(tmp_path, FakeTeacher(factor=2.0), "whisper-tiny")(audio[0][0], 1.0)
    assert torch.equal(2 * a, b)
    index = tmp_path / "whisper-tiny.0.jsonl"
    index.write_text(index.read_text().replace('"frames"', '"frmes"'))
    with pytest.raises(UserError, match="whisper-tiny.0.jsonl is damaged; delete"):
        Cache(tmp_path, FakeTeacher(factor=2.0), "whisper-tiny")
