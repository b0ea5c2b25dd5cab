"""Stage 1 beside the teachers themselves (test_teachers.py): clocks, combinations, losses, whole runs, cache, probe."""
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import transformers

import data
import losses
import model
import pretrain_kd
import run as running
from conftest import DEMO
from teachers import Cache, Clock, Teacher, align


def noise(*seconds):
    return [0.1 * torch.randn(int(16_000 * s), generator=torch.Generator().manual_seed(int(100 * s))) for s in seconds]


# ---------------------------------------------------------------------------- clocks

@pytest.mark.parametrize("hop, offset", [(320, -80), (640, 0), (384, -511), (1280, 1120), (2560, 2160), (160, 160)])
def test_a_teacher_that_tells_the_time_lines_up_with_the_student(hop, offset):
    """Frame i of this teacher says on which sample it is centred. Target t must say the student's, 640 t + 320."""
    samples, clock = 12 * 16_000, Clock(hop, offset, 3)
    frames = (samples + offset) // hop
    told = (torch.arange(frames) * hop + (hop - offset) / 2)[:, None].repeat(1, 3)
    target = align(told, samples, clock)
    assert target.shape == (300, 3 * clock.stack)
    error = target.view(300, clock.stack, 3).mean((1, 2)) - (640 * torch.arange(300) + 320)
    # side by side as they are: off by what the frames' middles are off; in between: not at all, until the last is held
    assert error[3:-5].abs().max() <= (0.1 if 640 % hop else 161) and error[-1].abs() <= 1.5 * hop


def test_where_a_students_frame_is_centred():
    """An impulse in each feature frame in turn: output t hears frames whose middle is 4t + 2: 40 t + 20 ms."""
    torch.manual_seed(0)
    subsampling, silence = model.Subsampling(model.Config(channels=8)).eval(), torch.zeros(1, 48, 80)
    with torch.no_grad():
        response = torch.zeros(48, 12)
        for f in range(48):
            impulse = silence.clone()
            impulse[0, f] = 10
            response[f] = (
                (subsampling(impulse, torch.tensor([48]))[0] - subsampling(silence, torch.tensor([48]))[0])[0]
                .square()
                .sum(-1)
            )
    for t in range(1, 11):
        heard = response[:, t].nonzero()[:, 0]
        assert (heard.min() + heard.max()).item() / 2 == 4 * t + 2
        mean = (response[:, t] * torch.arange(48)).sum() / response[:, t].sum()
        assert abs(mean - (4 * t + 2)) < 1  # random weights: within 10 ms of the middle


# ---------------------------------------------------------------------------- standardisation

def test_standardise_gives_mean_0_and_variance_1(teacher_folders):
    teacher, batches = Teacher(teacher_folders["hubert"]), [noise(1.0, 2.0), noise(1.5, 0.8)]
    raw, _ = teacher.embed(batches[0])
    for _ in range(2):  # twice: it must not standardise what is standardised
        teacher.standardise([teacher.embed(batch) for batch in batches])
    frames = torch.cat([e[:n] for batch in batches for e, n in zip(*teacher(batch))])
    torch.testing.assert_close(frames.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(teacher(batches[0])[0] * teacher.std + teacher.mean, raw, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (DEMO / "teachers").exists(), reason="demo/teachers is not there")
@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_the_demos_teachers(name, demo_utterances):
    teacher = Teacher(str(DEMO / "teachers" / name))
    waves = [data.load_audio(u.path) for u in demo_utterances[:2]]
    embeddings, lengths = teacher(waves)
    assert teacher.clocks[0].rate == 50 and torch.isfinite(embeddings).all()
    assert all(abs(n - len(w) / 640) <= 1 for n, w in zip(lengths, waves))
    speech = embeddings[0, :lengths[0]]
    assert (speech[1:] - speech[:-1]).norm() > 0.1 * speech.norm()  # it says different things at different times


# ---------------------------------------------------------------------------- combinations

class FakeTeacher:
    """Says level + utterance everywhere; of each layer 4 wide."""

    def __init__(self, *levels):
        self.levels, self.widths = levels, [4] * len(levels)

    def standardised(self, embeddings):
        return embeddings

    def embed(self, waves):
        said = torch.tensor(self.levels, dtype=torch.float).repeat_interleave(4)
        said = said + torch.arange(len(waves))[:, None, None]
        return said.expand(len(waves), 10, -1), torch.tensor([len(w) // 640 for w in waves])


def test_combine():
    batch = types.SimpleNamespace(embeddings=None, waveforms=[torch.zeros(6400), torch.zeros(3200)])
    teachers, weights = [FakeTeacher(1), FakeTeacher(5, 9)], [2.0, 1.0, 1.0]
    heads = pretrain_kd.teacher_targets(teachers, batch)
    assert [(tuple(e.shape), e[0, 0, 0].item(), e[1, 9, 3].item()) for e in heads] == [
        ((2, 10, 4), 1, 2), ((2, 10, 4), 5, 6), ((2, 10, 4), 9, 10)]
    [average] = pretrain_kd.teacher_targets(teachers, batch, "average", weights)
    assert average.shape == (2, 10, 4) and (average[0] == 4).all() and (average[1] == 5).all()
    torch.manual_seed(0)
    drawn = Counter()
    for _ in range(400):
        [random] = pretrain_kd.teacher_targets(teachers, batch, "random", weights)
        who = tuple(int(random[b, 0, 0]) - b for b in range(2))
        assert all((random[b] == who[b] + b).all() for b in range(2))
        drawn[who] += 1
    assert len(drawn) == 9  # each utterance draws for itself, by weight
    assert sum(n for who, n in drawn.items() if who[0] == 1) == pytest.approx(200, abs=40)


def test_distances_by_hand():
    p, e = torch.randn(2, 5, 6), torch.randn(2, 6, 6)
    lengths, rows = torch.tensor([5, 3]), [(b, t) for b, n in ((0, 5), (1, 3)) for t in range(n)]
    cosine = [1 - (p[b, t] @ e[b, t] / p[b, t].norm() / e[b, t].norm()).item() for b, t in rows]
    l1, l2 = ([(p[b, t] - e[b, t]).norm(k).item() ** k / 6 for b, t in rows] for k in (1, 2))
    for kind, by_hand in {"l1": l1, "l2": l2, "cosine": cosine, "l1+cosine": [*l1, *cosine]}.items():
        loss = losses.distillation_loss(p, e, lengths, kind)
        assert loss.item() == pytest.approx(sum(by_hand), rel=1e-4), kind
    with pytest.raises(ValueError, match="at most 2"):
        losses.distillation_loss(p, torch.randn(2, 8, 6), lengths)


def test_stage1_loss_by_hand():
    torch.manual_seed(0)
    student = model.Student(model.Config(dim=16, layers=1, kernel=3, channels=4, head_dims=(4, 6))).eval()
    batch = types.SimpleNamespace(features=torch.randn(2, 40, 80), feature_lengths=torch.tensor([40, 22]))
    targets = [torch.randn(2, 10, 4), torch.randn(2, 10, 6)]
    with torch.no_grad():
        total, frames, parts = pretrain_kd.stage1_loss(student, batch, targets, [1.0, 0.25], ["l1", "l2"])
        hidden, _ = student.encoder(batch.features, batch.feature_lengths)
        by_hand = [
            sum(distance(head(hidden[b, t]), target[b, t]).item() for b, n in ((0, 10), (1, 5)) for t in range(n))
            for head, target, distance in zip(student.heads, targets, (F.l1_loss, F.mse_loss))
        ]
    assert frames == 15 and [p.item() for p in parts] == pytest.approx([x / 15 for x in by_hand], rel=1e-4)
    assert total.item() == pytest.approx(by_hand[0] + 0.25 * by_hand[1], rel=1e-4)


# ---------------------------------------------------------------------------- whole runs, and the cache

@pytest.fixture(scope="module")
def arguments(tmp_path_factory, demo_utterances, teacher_folders):
    """A run of stage 1 without --out: 6 utterances to train on, 3 to evaluate on, three targets of two teachers."""
    folder = tmp_path_factory.mktemp("manifests")
    shortest = sorted(demo_utterances, key=lambda u: (u.seconds, u.id))
    for name, part in (("train", shortest[:6]), ("dev", shortest[6:9])):
        rows = [{"audio_filepath": str(Path(u.path).resolve()), "text": u.text} for u in part]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data", str(folder / "train.jsonl"), "--dev", str(folder / "dev.jsonl"), "--teachers",
            teacher_folders["hubert"] + ":1,last", teacher_folders["moonshine"], "--steps", "4", "--eval-every", "2",
            "--batch-seconds", "8", "--workers", "0", "--device", "cpu", "--loss", "l1", "l1+cosine",
            "--weights", "1", "2"]


def pretrain(arguments, out, *more):
    return pretrain_kd.main([*arguments, "--out", str(out), *map(str, more)])


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cached(arguments, tmp_path_factory):
    """(cache, run directory) of a run that filled it"""
    folder = tmp_path_factory.mktemp("cached")
    assert pretrain(arguments, folder / "out", "--cache", folder / "cache") == 0
    return folder / "cache", folder / "out"


def close(a, b):
    """Within what the batch matters to bfloat16, where the CPU has it."""
    return (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def every_row(arguments, folder):
    """[(teacher, cache, utterance, speed)] of the arguments' teachers and data"""
    train, dev = (data.load_utterances(arguments[i]) for i in (1, 3))
    rows = []
    for spec, name in zip(arguments[5:7], ("hubert-1,last", "moonshine-last")):
        teacher = Teacher(spec, dtype=running.inference_dtype(torch.device("cpu")))
        cache = Cache(folder, teacher, name)
        rows += [(teacher, cache, u, speed) for us, speeds in ((train, (0.9, 1.0, 1.1)), (dev, (1.0,))) for u in us
                 for speed in speeds]
    return rows


def test_the_cache_holds_what_the_teachers_say(arguments, cached):
    for teacher, cache, u, speed in every_row(arguments, cached[0]):
        waveform = data.load_audio(u.path)
        waveform = waveform if speed == 1 else torchaudio.transforms.Speed(16_000, speed)(waveform)[0]
        [expected], [n] = teacher.embed([waveform])
        found = cache(u, speed)
        assert found.dtype == torch.float16 and found.shape == (n, teacher.dim)
        assert close(found, expected), (u, speed, teacher.spec)


def test_a_cached_run_learns_the_same_without_teachers(arguments, cached, tmp_path, monkeypatch, capsys):
    assert pretrain(arguments, tmp_path / "live") == 0
    for a, b in zip(log(tmp_path / "live"), log(cached[1])):
        assert a.keys() == b.keys()
        for key in a.keys() - {"audio_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=0.02), key
    assert {"hubert:1", "hubert", "moonshine"} < log(cached[1])[0].keys()                 # the loss of each target
    before = {p: p.read_bytes() for p in cached[0].iterdir()}
    heard, listen = [], Teacher._listen
    monkeypatch.setattr(Teacher, "_listen", lambda self, waves: heard.append(len(waves)) or listen(self, waves))
    assert pretrain(arguments, tmp_path / "again", "--cache", cached[0]) == 0
    assert heard == [1, 2, 1, 2, 1, 1]  # for each teacher: is it batched (1, 2)? is it the same (1)? and no more
    same_training(cached[1], tmp_path / "again")
    assert {p: p.read_bytes() for p in cached[0].iterdir()} == before and "to write" not in capsys.readouterr().out


def test_no_cache_at_a_speed_that_nobody_asked_for(arguments, tmp_path):
    assert pretrain(arguments, tmp_path / "out", "--cache", tmp_path / "cache", "--speeds", "0.9", "1.1", "--steps", 1) == 0


def same_training(a, b):
    a, b = (torch.load(x / "last.pt", weights_only=True) for x in (a, b))
    assert all(torch.equal(a["raw_model"][k], b["raw_model"][k]) for k in a["raw_model"].keys() | b["raw_model"].keys())


def test_interrupted_filling_goes_on(arguments, cached, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the fifth batch, then what a crash leaves: half an embedding, half a line. The rest is appended."""
    embed, calls = Teacher.embed, []

    def interrupted(self, waves):
        calls.append(len(waves))
        if len(calls) == 11:
            raise KeyboardInterrupt
        return embed(self, waves)
    monkeypatch.setattr(Teacher, "embed", interrupted)
    folder = tmp_path / "cache"
    assert pretrain(arguments, tmp_path / "out", "--cache", folder) == 130
    done = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert len(done) == 4 and all(0 < size < (cached[0] / name).stat().st_size for name, size in done.items())
    for name, rest in (("hubert-1,last.0.f16", bytes(100)), ("hubert-1,last.0.jsonl", b'{"audio": "x", "sp')):
        with open(folder / name, "ab") as file:
            file.write(rest)
    capsys.readouterr()
    monkeypatch.setattr(Teacher, "embed", embed)
    assert pretrain(arguments, tmp_path / "out", "--cache", folder) == 0
    said = re.search(r"([\d.e-]+) GB to write", capsys.readouterr().out)[1]
    whole = sum(p.stat().st_size for p in cached[0].glob("*.f16"))
    written = whole - sum(size for name, size in done.items() if name.endswith(".f16"))
    assert float(said) == pytest.approx(written / 1e9, rel=0.02)        # what it promised is what it wrote
    assert sum(p.stat().st_size for p in folder.glob("*.f16")) == whole
    for (_, old, u, speed), (_, new, _, _) in zip(every_row(arguments, cached[0]), every_row(arguments, folder)):
        assert close(new(u, speed), old(u, speed))
    assert len((folder / "hubert-1,last.0.jsonl").read_text().splitlines()) == 1 + 6 * 3 + 3


def test_a_cached_run_goes_on_bit_by_bit_where_the_cache_moved(arguments, cached, tmp_path, monkeypatch):
    loss, calls = pretrain_kd.stage1_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)
    shutil.copytree(cached[0], tmp_path / "here")
    monkeypatch.setattr(pretrain_kd, "stage1_loss", interrupted)
    assert pretrain(arguments, tmp_path / "out", "--cache", tmp_path / "here") == 143
    monkeypatch.setattr(pretrain_kd, "stage1_loss", loss)
    (tmp_path / "here").rename(tmp_path / "there")
    assert pretrain(arguments, tmp_path / "out", "--cache", tmp_path / "there") == 0
    same_training(cached[1], tmp_path / "out")


def test_what_a_cache_refuses(arguments, cached, tmp_path, monkeypatch, capsys):
    capsys.readouterr()

    def refused(*words, arguments=arguments):
        code, error = pretrain(arguments, tmp_path / "out", "--cache", folder), capsys.readouterr().err.strip()
        assert code == 2 and "\n" not in error and all(word in error for word in words), error

    folder = tmp_path / "cache"
    shutil.copytree(cached[0], folder)
    other = shutil.copytree(arguments[6], tmp_path / "moonshine")                # same name, other weights
    network = transformers.AutoModel.from_pretrained(other)
    torch.nn.init.normal_(network.encoder.layers[0].mlp.fc1.weight)
    network.save_pretrained(other)
    changed = [str(other) if a == arguments[6] else a for a in arguments]
    refused("moonshine-last.0.jsonl is stale", "does not say what", "delete", arguments=changed)

    for corpus in "ab":                                                           # .../a/train/1/2/x.wav and .../b
        path = tmp_path / corpus / "train/1/2/x.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, 0.1 * torch.randn(16_000).numpy(), 16_000)
    refused("finds these twice", "rename", arguments=[*arguments, "--data", str(tmp_path / "a"), str(tmp_path / "b")])

    index = folder / "hubert-1,last.0.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:1] + [re.sub(r'"seconds": [\d.]+', '"seconds": 9.75', line) for line in lines[1:]]))
    refused("9.75 s, now it has", "delete")
    index.write_text("nonsense\n" + "".join(lines[1:]))
    refused(str(index), "header is damaged")
    index.write_text("".join(lines[:3]))
    with open(index) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        refused("another process is filling", "wait")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    refused("1e-06 GB free", "are needed")
    folder = tmp_path / "a file"
    folder.write_text("")
    refused("cannot write --cache", "a file")


def test_two_processes_fill_one_cache(arguments, cached, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, Path(pretrain_kd.__file__), *arguments, "--steps", "1", "--out", tmp_path / "out",
                           "--cache", tmp_path / "cache"], text=True, capture_output=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [len(p.read_text().splitlines()) - 1 for p in sorted((tmp_path / "cache").glob("hubert*.jsonl"))]
    assert len(parts) == 2 and min(parts) > 5 and sum(parts) == 6 * 3 + 3
    both = every_row(arguments, cached[0]), every_row(arguments, tmp_path / "cache")
    for (_, old, u, speed), (_, new, _, _) in zip(*both):
        assert close(new(u, speed), old(u, speed))


def test_options_that_do_not_fit_are_one_line(arguments, teacher_folders, tmp_path, capsys):
    hubert, whisper = teacher_folders["hubert"], teacher_folders["whisper"]
    for more, *words in (
        (["--loss", "l1", "l2", "l1"], "--loss needs one per teacher: 2, found 3"),
        (["--weights", "1", "0"], "--weights must be above 0"),
        (["--combine", "average"], "takes one --loss"),
        (["--combine", "average", "--loss", "l1", "--teachers", hubert, f"{hubert}:1", "--weights", "1"], "--weights"),
        (["--teachers", hubert, hubert], "twice"),
        (["--teachers", f"{hubert}:7", whisper], "layer '7'", ":0 to"),
    ):
        assert pretrain(arguments, tmp_path / "out", *more) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and all(word in error for word in words), error


@pytest.mark.parametrize("combine", ["average", "random"])
def test_one_head_for_all(arguments, combine, tmp_path, capsys):
    assert pretrain(arguments, tmp_path / "out", "--combine", combine, "--loss", "cosine") == 0
    assert torch.load(tmp_path / "out/best.pt", weights_only=True)["config"]["head_dims"] == (32,)
    assert combine in log(tmp_path / "out")[0] and 0 < log(tmp_path / "out")[-1]["dev hubert:1"] < 2


# ---------------------------------------------------------------------------- the probe

def test_what_a_probe_can_and_cannot_read():
    generator, letters = torch.Generator().manual_seed(0), "ABCDE"
    texts = ["".join(letters[i] for i in torch.randint(5, (12,), generator=generator)) for _ in range(60)]
    code = torch.randn(5, 16, generator=generator)
    frame = lambda c: torch.cat([code[[letters.index(c)]], torch.zeros(2, 16)])  # a letter, then rest
    said = [(torch.cat([frame(c) for c in text]), text) for text in texts]
    nothing = [(torch.randn(36, 16, generator=generator), text) for text in texts]
    assert pretrain_kd.character_errors(said[:50], said[50:]) < 2
    assert pretrain_kd.character_errors(nothing[:50], nothing[50:]) > 60


def test_the_probe_tells_a_teacher_from_noise(teacher_folders, tmp_path, monkeypatch, capsys):
    """The demo's teacher reads better than log-mel, a random network does not; without transcripts it says so."""
    monkeypatch.setattr(pretrain_kd, "PROBE_SECONDS", (90, 25))
    demo = str(DEMO / "teachers/hubert")
    probe = ["--probe", "--device", "cpu", "--out", str(tmp_path / "out"),
             "--teachers", demo, teacher_folders["whisper"]]
    assert pretrain_kd.main(probe) == 0
    said = capsys.readouterr().out
    good, noise, mel = (float(re.search(rf"\| {name} \|.*\| ([\d.]+) % \|", said)[1])
                        for name in ("hubert", "whisper", "log-mel features"))
    assert good < 0.7 * mel and noise > 0.9 * mel, said
    assert "| 1.9 M | 50 Hz | 320 |" in said and not (tmp_path / "out").exists()
    assert pretrain_kd.main([*probe, "--data", str(next((DEMO / "corpus/unlabelled").iterdir()))]) == 0
    assert "unknown" in capsys.readouterr().out


def test_a_real_teacher_of_the_lab(loud_lab, tmp_path):
    """Moonshine on LibriSpeech: it tells phones apart, alone or beside others, and through the cache."""
    teacher = Teacher(str(loud_lab / "teachers/moonshine-tiny"))
    utterances = [u for u in data.load_utterances(loud_lab / "LibriSpeech/dev-clean-part/84") if u.seconds > 5][:3]
    waves = [data.load_audio(u.path)[:80_000] for u in utterances]
    embeddings, lengths = teacher.embed(waves)
    assert teacher.clocks[0].hop == 384 and teacher.dim == 2 * 288 and lengths.tolist() == [125] * 3
    cache = Cache(tmp_path, teacher, "moonshine")
    cache.open()
    cache.append(utterances, 1.0, embeddings, lengths)
    cache.close()
    cache.read()
    cache = pickle.loads(pickle.dumps(cache))  # as it goes to a process that was not forked
    for u, e in zip(utterances, embeddings):
        assert (cache(u, 1.0) - e).norm() < 1e-3 * e.norm()
