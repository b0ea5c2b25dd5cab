"""Runs that survive: kill -9, signals, a full disk, too little memory, numbers and files that go wrong.

The victims are processes of their own, forked from one that has torch imported already (the forkserver), which train a
real student of 3,000 parameters on eight utterances of the demo, with dropout, SpecAugment and speed perturbation.
"""
import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile
import torch

import data
import finetune_rnnt
import model
import plot
import run
import training
from conftest import DEMO
from run import UserError

SMALL = model.Config(dim=8, layers=1, heads=2, kernel=3, expansion=2, channels=2, vocab_size=40, predictor_dim=8,
                     joiner_dim=8)


def child(function, *args, environment=None):
    """Call function(*args) in a process of its own -> (its exit code, what it printed)."""
    return finish(start(function, *args, environment=environment))


def start(function, *args, environment=None):
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # or the preloading finds nothing (Python 3.11)
    context.set_forkserver_preload(["torch._dynamo", "test_faults"])
    said, mouth = context.Pipe(duplex=False)  # a pipe, because a full disk would silence a file
    process = context.Process(target=act, args=(mouth, environment or {}, function, args))
    process.start()
    mouth.close()
    process.said = said
    return process


def finish(process, seconds=60):
    said, fd, deadline = b"", process.said.fileno(), time.monotonic() + seconds
    while select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
        block = os.read(fd, 1 << 16)
        if not block:
            process.join()
            return process.exitcode, said.decode(errors="replace")
        said += block
    process.kill()
    raise AssertionError(f"it hangs: {said.decode()}")


def act(mouth, environment, function, args):
    """What a child does first: its own output, one thread, the environment of its rank."""
    os.dup2(mouth.fileno(), 1)
    os.dup2(mouth.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.exit(function(*args))


def tiny_run(out, spoil=None, dtype=torch.float32, utterances=8, workers=0, **options):
    """Both a script and not: everything of stage 2 but the reading of its arguments. spoil(calls, batch, loss) ->
    loss may change a loss or break the process. -> exit code"""
    def main(_):
        args = argparse.Namespace(**dict(steps=24, minutes=None, batch_seconds=8.0, accumulate=1, warmup=0.1, clip=5.0,
                                         eval_every=3, seed=0, out=Path(out), overwrite=False) | options)
        rank, world = run.start_processes(torch.device("cpu"))
        this = run.Run(args, rank, world, model.load_checkpoint, model.save_checkpoint)
        if this.finished:
            return 0
        few = sorted(data.load_utterances(DEMO / "corpus/dev", True), key=lambda u: (u.seconds, u.id))[:utterances]
        tokenizer = data.train_tokenizer([u.text for u in few], 40, 2)
        torch.manual_seed(args.seed)
        student, calls = model.Student(SMALL), []
        loader = data.Loader(few, args.batch_seconds, tokenizer, augment=True, speeds=(0.9, 1.0, 1.1), masks=4,
                             rank=rank, world=world, workers=workers)
        weights = finetune_rnnt.parse([])

        def compute_loss(batch):
            loss, count, parts = finetune_rnnt.stage2_loss(student, batch, weights)
            calls.append(batch.ids)
            return (spoil(calls, batch, loss) if spoil else loss), count, parts

        def evaluate(student):
            score = sum(p.square().sum() for p in student.parameters()).item()
            return {"dev size": score}, score
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        return training.Training(this, student, loader, compute_loss, evaluate, optimizer,
                                 {"config": SMALL, "tokenizer": tokenizer.to_str()}, torch.device("cpu"), dtype, rank,
                                 world).loop()
    main.__module__ = __name__
    return run.polite(main)()


def log_of(out, *without):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("audio_per_second", *without)} for row in rows]


def same(a, b):
    """Two runs left the same: every tensor bit by bit, the position, the log."""
    for name in ("last.pt", "best.pt"):
        x, y = (torch.load(out / name, weights_only=True) for out in (a, b))
        for part in {"model", "raw_model"} & x.keys():
            assert all(torch.equal(x[part][k], y[part][k]) for k in x[part].keys() | y[part].keys()), (name, part)
        if name == "last.pt":
            for i, state in x["optimizer"]["state"].items():
                assert all(torch.equal(v, y["optimizer"]["state"][i][k]) for k, v in state.items())
            assert x["progress"] | {"seconds": 0} == y["progress"] | {"seconds": 0}
    assert log_of(a) == log_of(b)
    return True


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = child(tiny_run, folder / "out")
    assert code == 0, said
    return folder / "out"


# ---------------------------------------------------------------------------- killed

def killed(out, call, seconds):
    """kill -9 from another thread, so long after the given forward pass"""
    def begin(calls, batch, loss):
        if len(calls) == call:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return loss
    return tiny_run(out, begin)


def test_kill_9_at_twenty_random_moments(whole, tmp_path):
    """Whatever the moment, the same command goes on; whenever the run gets through, it is the undisturbed one."""
    moments, kills, out, found = random.Random(0), 0, tmp_path / "out", []
    while kills < 20:
        code, said = child(killed, out, moments.randint(1, 10), moments.uniform(0, 0.06))
        if code == 0:  # it was through before
            same(whole, out)
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL, said
        kills += 1
        found.append(model.load_checkpoint(out / "last.pt")["progress"]["step"] if (out / "last.pt").exists() else 0)
    code, said = child(tiny_run, out)
    print(f"checkpoints that the kills left: steps {found}")
    assert code == 0 and len(set(found)) > 3, said
    same(whole, out)


def test_a_budget_of_minutes_is_evaluated_ten_times(tmp_path):
    """However many updates that is: --steps does not count."""
    assert tiny_run(tmp_path / "out", minutes=0.04, steps=100_000, eval_every=None) == 0
    evaluated = [row["step"] for row in log_of(tmp_path / "out") if "dev size" in row]
    assert 3 <= len(evaluated) <= 10 and len(set(evaluated)) == len(evaluated)
    assert evaluated[-1] == model.load_checkpoint(tmp_path / "out/last.pt")["progress"]["step"]


@pytest.mark.parametrize("where", ["write", "replace"])
def test_power_lost_in_the_middle_of_a_save(whole, tmp_path, where):
    """Dead with half of last.pt written, or with all of it written and not yet renamed."""
    code, _ = child(dies_while_saving, tmp_path / "out", where)
    assert code == -signal.SIGKILL and (tmp_path / "out/last.pt.tmp").exists()
    assert model.load_checkpoint(tmp_path / "out/last.pt")["progress"]["step"] == 6
    code, said = child(tiny_run, tmp_path / "out")
    assert code == 0 and "at step 6" in said and same(whole, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["best.pt", "command.txt", "last.pt", "log.jsonl"]


def dies_while_saving(out, where):
    replace, fsync, saves = os.replace, os.fsync, []

    def die(file, name, act):
        saves.append(1) if name == "last.pt.tmp" else None
        if len(saves) == 3:
            os.truncate(out / name, 1000) if where == "write" else None
            os.kill(os.getpid(), signal.SIGKILL)
        act()
    if where == "replace":
        os.replace = lambda a, b: die(None, Path(a).name, lambda: replace(a, b))
    else:
        os.fsync = lambda file: die(file, Path(os.readlink(f"/proc/self/fd/{file}")).name, lambda: fsync(file))
    return tiny_run(out)


# ---------------------------------------------------------------------------- signals

def with_workers(out):
    multiprocessing.set_start_method("fork", force=True)  # as a script would; here it would be the forkserver
    return tiny_run(out, workers=2)


def signalled(out, *numbers):
    """A signal in the first or second step, a second one while that step goes on for minutes."""
    def stop(calls, batch, loss):
        if len(calls) == 3:
            os.kill(os.getpid(), numbers[0])
            if len(numbers) > 1:
                threading.Timer(0.5, os.kill, (os.getpid(), numbers[1])).start()
                time.sleep(300)
        return loss
    return tiny_run(out, stop)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_a_second_leaves_at_once(whole, tmp_path, number, code):
    left, said = child(signalled, tmp_path / "out", number)
    assert left == code and f"stopped by signal {int(number)} at step " in said and "Traceback" not in said
    assert child(with_workers, tmp_path / "out")[0] == 0 and same(whole, tmp_path / "out")
    began = time.monotonic()
    left, said = child(signalled, tmp_path / "twice", number, number)
    assert left == code and time.monotonic() - began < 30 and not (tmp_path / "twice/last.pt").exists()


# ---------------------------------------------------------------------------- a full disk

def with_files_of_at_most(size, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return tiny_run(out)


@pytest.mark.parametrize("size", [0, 100, 50_000])
def test_a_full_disk_is_one_line_and_what_is_there_stays(whole, tmp_path, size):
    """No room for anything; for a line of the log; for half a checkpoint. Then there is room again."""
    assert child(signalled, tmp_path / "out", signal.SIGTERM)[0] == 143
    before = (tmp_path / "out/last.pt").read_bytes()
    code, said = child(with_files_of_at_most, size, tmp_path / "out")
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert "cannot write" in errors[0] and str(tmp_path / "out") in errors[0] and "free some space" in errors[0]
    assert (tmp_path / "out/last.pt").read_bytes() == before and not list(tmp_path.glob("out/*.tmp"))
    assert child(tiny_run, tmp_path / "out")[0] == 0 and same(whole, tmp_path / "out")


# ---------------------------------------------------------------------------- too little memory

def too_large_from_call(number, out):
    def fill(calls, batch, loss):
        return loss + torch.zeros(1 << 45 if len(calls) == number else 1).mean()  # 140 TB
    return tiny_run(out, fill)


@pytest.mark.parametrize("call", [1, 3])
def test_out_of_memory_says_seconds_shapes_and_option(tmp_path, call):
    """In the rehearsal before the first update, or later: real refusals of torch's allocator."""
    code, said = child(too_large_from_call, call, tmp_path / "out")
    [line] = [line for line in said.splitlines() if ": error: " in line]
    assert code == 2 and "Traceback" not in said
    assert all(word in line for word in ("out of memory", " utterances, ", " s, ", ", 80]", "--batch-seconds from 8"))
    assert call > 1 or not log_of(tmp_path / "out")


def test_the_worst_batch_is_rehearsed(demo_utterances):
    """As large and as long as any of three epochs but for the speeds, whatever the rank."""
    loader = data.Loader(demo_utterances, 20, augment=True, rank=1, world=3)
    worst = list(loader.worst())
    epochs = [data.Loader(demo_utterances, 20, augment=True).batches(number) for number in range(3)]
    seconds = [[demo_utterances[i].seconds for i in batch] for epoch in epochs for batch in epoch]
    sizes = [len(batch.ids) * batch.features.shape[1] / 100 for batch in worst]
    assert max(sizes) > 0.95 * max(max(s) * len(s) for s in seconds)
    assert max(batch.features.shape[1] for batch in worst) / 100 == pytest.approx(max(map(max, seconds)), abs=0.05)


def test_audio_that_is_only_a_header_is_one_line(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "whole.wav", 0.1 * torch.randn(32_000).numpy(), 16_000)
    for i in range(4):
        (tmp_path / f"in/{i}.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:44] + bytes(64_000))  # silence
    rows = [json.dumps({"audio_filepath": f"in/{i}.wav", "text": "A WORD"}) for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    assert finetune_rnnt.main(["--data", str(tmp_path / "train.jsonl"), "--dev", str(DEMO / "corpus/dev"), "--init", "none",
                               "--min-frequency", "1", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "none of the training audio can be used any more" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_beaten_by_any(tmp_path):
    scores = iter([math.nan, 3.0, 5.0, math.nan])
    written = []
    training_ = argparse.Namespace(evaluate=lambda _: ({}, next(scores)), averaged=torch.nn.Linear(1, 1), say=print,
                                   progress={"step": 1, "best": math.inf}, export=dict,
                                   run=argparse.Namespace(log=lambda **_: None, out=tmp_path),
                                   write=lambda name, **_: (written.append(name), (tmp_path / name).touch()))
    for _ in range(4):
        training.Training.evaluation(training_)
    assert len(written) == 2 and training_.progress["best"] == 3.0


@pytest.mark.parametrize("room, expected", [(30, None), (36, 36.0), (120, 36 * 1.25 ** 4), (10_000, 36 * 1.25 ** 20)])
def test_auto_finds_the_largest_batch_that_fits_less_one_step(demo_utterances, room, expected):
    """On a pretended GPU with room for so many seconds; a run that goes on keeps what it found."""
    few = [u for u in demo_utterances if u.seconds < 36][:200] * 8
    loader = data.Loader(few, run.Auto(36), augment=True)

    def forward_backward(batch):
        if loader.batch_seconds > room:
            raise MemoryError("as it would be")
    loader.worst = lambda: [argparse.Namespace(ids=["some"])]
    fake = argparse.Namespace(loader=loader, forward_backward=forward_backward, device=torch.device("cuda"), parameters=[],
                              optimizer=torch.optim.SGD([torch.zeros(1)]), progress={}, say=lambda line: None,
                              args=argparse.Namespace(batch_seconds=run.Auto(36)), run=argparse.Namespace(state=None))
    if expected is None:
        with pytest.raises(MemoryError):
            training.Training.rehearse(fake)
        return
    training.Training.rehearse(fake)
    found = loader.batch_seconds
    assert found == fake.progress["batch_seconds"] and found * 1.25 <= max(room, 45) or len(loader.batches(0)) == 1
    if room < 10_000:
        assert found == pytest.approx(expected)
    fake.run.state, loader.batch_seconds = {"some": "run"}, run.Auto(36)
    training.Training.rehearse(fake)
    assert loader.batch_seconds == found


def test_auto_on_a_cpu_is_a_constant_and_an_argument_of_the_run(tmp_path):
    for steps in (2, 2):
        code, said = child(tiny_run_auto, tmp_path / "out", steps)
        assert code == 0, said
    assert model.load_checkpoint(tmp_path / "out/last.pt")["progress"]["batch_seconds"] == 36.0
    assert model.load_checkpoint(tmp_path / "out/last.pt")["progress"]["settings"]["batch_seconds"] == "auto"


def tiny_run_auto(out, steps):
    return tiny_run(out, steps=steps, batch_seconds=run.seconds_or_auto("auto"))


# ---------------------------------------------------------------------------- numbers that go wrong

def with_bad_numbers(out, kind, calls_that_go_wrong, dtype):
    def spoil(calls, batch, loss):
        if len(calls) not in calls_that_go_wrong:
            return loss
        return loss * kind if isinstance(kind, float) else loss + torch.sqrt(0 * loss)  # finite, its gradient is not
    return tiny_run(out, spoil, dtype)


@pytest.mark.parametrize("kind, dtype", [(math.nan, torch.float32), (math.inf, torch.bfloat16),
                                         ("gradient", torch.float32), ("gradient", torch.bfloat16)])
def test_a_bad_number_costs_its_update_and_is_named(tmp_path, kind, dtype):
    code, said = child(with_bad_numbers, tmp_path / "out", kind, {8, 9}, dtype)
    assert code == 0 and "Traceback" not in said, said
    assert said.count("update skipped, loss or gradient is not finite (") == 2 and "2 updates were skipped" in said
    skipped = [row["skipped"] for row in log_of(tmp_path / "out") if "skipped" in row]
    assert len(skipped) == 2 and all(ids and all(id in said for id in ids[:5]) for ids in skipped)
    last = model.load_checkpoint(tmp_path / "out/last.pt")
    assert last["progress"]["skipped"] == 2 and last["progress"]["step"] == 24
    assert all(v.isfinite().all() for part in ("model", "raw_model") for v in last[part].values())


def test_ten_bad_updates_in_a_row_end_the_run_and_leave_the_checkpoints(whole, tmp_path):
    code, said = child(with_bad_numbers, tmp_path / "out", math.nan, set(range(9, 100)), torch.float32)
    [line] = [line for line in said.splitlines() if ": error: " in line]
    assert code == 2 and "10 updates in a row" in line and "--lr" in line and "Traceback" not in said
    assert len([row for row in log_of(tmp_path / "out") if "skipped" in row]) == 10
    last = model.load_checkpoint(tmp_path / "out/last.pt")
    assert all(v.isfinite().all() for part in ("model", "raw_model") for v in last[part].values())
    assert torch.load(tmp_path / "out/best.pt", weights_only=True)["step"] <= last["progress"]["step"]


# ---------------------------------------------------------------------------- what a run shows

def test_runs_are_drawn(whole, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    half = tmp_path / "half"
    half.mkdir()
    (half / "log.jsonl").write_text((whole / "log.jsonl").read_text()[:-20])  # a run in the middle of a line
    assert plot.main([str(whole), str(half), "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert plot.main([str(tmp_path / "none"), "--out", str(tmp_path / "q.png")]) == 2
    assert "none has no readable log.jsonl" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(whole)]) == 2 and "pip install matplotlib" in capsys.readouterr().err


# ---------------------------------------------------------------------------- fuzz

def damage(rng, content):
    """Bits turned, bytes exchanged, cut out, doubled, or the end cut off; most of it where headers are."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 50])):
        if not content:
            break
        end = len(content) if rng.random() < 0.5 else min(len(content), 200)
        at = rng.randrange(end)
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", rng.randbytes(4)])
        elif kind == 2:
            del content[at:at + rng.choice([1, 4, 100])]
        elif kind == 3:
            content[at:at] = content[at:at + rng.choice([1, 4, 100])]
        elif rng.random() < 0.2:
            del content[at:]
    return bytes(content)


def fuzz_audio(folder, count):
    import soundfile
    rng, folder, outcomes, whole = random.Random(0), Path(folder), {"read": 0, "refused": 0}, {}
    wave = data.load_audio(next((DEMO / "corpus/dev").rglob("*.opus")))[:8000].numpy()
    for name, options in [("a.wav", {}), ("b.wav", {"subtype": "FLOAT"}), ("c.wav", {"subtype": "PCM_24"}), ("d.flac", {}),
                          ("e.ogg", {}), ("f.opus", {"format": "OGG", "subtype": "OPUS"}), ("g.mp3", {}), ("h.aiff", {}),
                          ("i.au", {}), ("j.caf", {}), ("k.w64", {})]:
        soundfile.write(folder / name, wave, 16_000, **options)
        whole[name] = (folder / name).read_bytes()
    for number in range(count):
        name = rng.choice([*whole])
        path = folder / f"x-{name}"
        path.write_bytes(damage(rng, whole[name]))
        try:
            [utterance], _ = data.scan(path)
            sound = data.load_audio(path)
        except (UserError, ValueError) as error:
            assert isinstance(error, UserError) or "to unpack" in str(error), error  # scan: nothing usable
            outcomes["refused"] += 1
            continue
        assert sound.dtype == torch.float32 and sound.dim() == 1 and sound.abs().max() < 200, name
        assert abs(len(sound) / 16_000 - utterance.seconds) < 0.11, (number, name, len(sound), utterance.seconds)
        outcomes["read"] += 1
    print(f"{count} damaged audio files: {outcomes}")
    return 0 if min(outcomes.values()) > count / 20 else 1


def fuzz_manifests(folder, count):
    import soundfile
    rng, folder, outcomes = random.Random(0), Path(folder), {"read": 0, "refused": 0}
    soundfile.write(folder / "a.wav", 0.1 * torch.randn(8000).numpy(), 16_000)
    values = ["a.wav", str(folder / "a.wav"), "", ".", "..", "gone.wav", "/dev/zero", "/dev/stdin", "a\0b", "a\nb.wav",
              "x" * 5000, "\ud800", "🎧", None, True, 0, -1, 1e308, [], {}, ["a.wav"], "words", "你好"]
    for number in range(count):
        rows = [json.dumps({key: rng.choice(values) for key in ("audio_filepath", "text", "id", "duration", "offset")
                            if rng.random() < 0.8}) for _ in range(3)]
        rows.append(json.dumps({"audio_filepath": "a.wav", "text": "the good one", "id": "good"}))
        rows.insert(rng.randrange(4), rng.choice(["[" * 20_000, "9" * 5000, "NaN", '{"audio_filepath": NaN}', "\x00", "null"]))
        content = "\n".join(rows).encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]), "surrogatepass")
        whole = number % 2 and content.find(b"\0") < 0
        (folder / "m.jsonl").write_bytes(content if whole else damage(rng, content))
        try:
            found, problems = data.scan(folder / "m.jsonl")
        except UserError:
            found = []
        assert all(Path(u.path).samefile(folder / "a.wav") and f"{u.id}{u.path}{u.text}".encode() for u in found)
        assert not whole or any(u.text == "the good one" for u in found), "a valid line was lost"
        outcomes["read" if found else "refused"] += 1
    print(f"{count} damaged manifests: {outcomes}")
    return 0 if min(outcomes.values()) > count / 20 else 1


def fuzz_checkpoints(checkpoint, folder, count):
    rng, outcomes, path = random.Random(0), {"the same": 0, "refused": 0}, Path(folder) / "x.pt"
    whole = Path(checkpoint).read_bytes()
    expected = model.load_checkpoint(checkpoint)["model"]
    for number in range(count):
        path.write_bytes(damage(rng, whole))
        try:
            loaded = model.load_checkpoint(path)
            model.load_student(loaded)
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        assert all(torch.equal(expected[key], loaded["model"][key]) for key in expected), "silently other weights"
        outcomes["the same"] += 1
    print(f"{count} damaged checkpoints: {outcomes}")
    return 0 if outcomes["refused"] > count / 2 else 1


@pytest.mark.parametrize("fuzz, count", [(fuzz_audio, 2000), (fuzz_manifests, 1000), (fuzz_checkpoints, 1000)])
def test_damaged_files_are_read_or_refused(fuzz, count, request, tmp_path, capfd):
    """Never a traceback, a crash, a hang or a number that is silently wrong."""
    before = [request.getfixturevalue("whole") / "best.pt"] if fuzz is fuzz_checkpoints else []
    code, said = child(fuzz, *before, tmp_path, count)
    print(said[-2000:])
    assert code == 0 and "Traceback" not in said, said[-3000:]


def test_a_checkpoint_of_another_size_is_one_line(whole, tmp_path):
    other = torch.load(whole / "best.pt", weights_only=True)
    for config in (other["config"] | {"dim": 16}, other["config"] | {"unheard_of": 1}, None):
        torch.save(other | {"config": config}, tmp_path / "other.pt")
        with pytest.raises(UserError, match="other.pt") as error:
            model.load_student(model.load_checkpoint(tmp_path / "other.pt"))
        assert "\n" not in str(error.value)
