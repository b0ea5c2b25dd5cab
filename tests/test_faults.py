"""Runs that survive: kill -9, signals, a full disk, too little memory, numbers and files that go
wrong.

The victims are processes of their own, forked from one that has torch imported already (the
forkserver). They run the real finetune_rnnt.py on eight utterances of the demo, with a student of
3,000 parameters, dropout, SpecAugment and speed perturbation.
"""

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
from conftest import DEMO
from tools.command_line import UserError

TINY = model.Config(
    dim=8,
    layers=1,
    attention_heads=2,
    kernel=3,
    expansion=2,
    channels=2,
    predictor_dim=8,
    joiner_dim=8,
)


# ---------------------------------------- processes of their own


def child(function, *args, environment=None):
    """Call function(*args) in a process of its own -> (its exit code, what it printed)"""
    return finish(start(function, *args, environment=environment))


def start(function, *args, environment=None):
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # or the preloading finds nothing
    context.set_forkserver_preload(["torch._dynamo", "test_faults"])
    # A pipe, because a full disk would silence a file.
    output, input = context.Pipe(duplex=False)
    arguments = (input, environment or {}, function, args)
    process = context.Process(target=run_child, args=arguments)
    process.start()
    input.close()
    process.output = output
    return process


def finish(process, seconds=60):
    printed = b""
    descriptor = process.output.fileno()
    deadline = time.monotonic() + seconds
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        block = os.read(descriptor, 1 << 16)
        if not block:
            process.join()
            return process.exitcode, printed.decode(errors="replace")
        printed += block
    process.kill()
    raise AssertionError(f"it hangs: {printed.decode()}")


def run_child(output, environment, function, args):
    """What a child does first: its own output, one thread, the environment of its rank."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.exit(function(*args))


def tiny_run(out, *options, spoil=None):
    """finetune_rnnt.py with a tiny student -> exit code

    spoil(call, losses) -> losses may change the CTC losses (B,) of the call-th batch, the first of
    which is the rehearsal's, or break the process.
    """
    out = Path(out)
    model.PRESETS["tiny"] = TINY
    ctc_loss = model.ctc_loss
    calls = []

    def spoiled(*args):
        calls.append(1)
        return spoil(len(calls), ctc_loss(*args))

    if spoil:
        model.ctc_loss = spoiled
    arguments = [
        "--init",
        "none",
        "--size",
        "tiny",
        "--data",
        str(few_utterances(out.parent)),
        "--dev",
        str(few_utterances(out.parent, 2)),
        "--steps",
        "24",
        "--eval-every",
        "3",
        "--batch-seconds",
        "8",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    return finetune_rnnt.main([*arguments, *options])


def few_utterances(folder, count=8):
    """-> a manifest of the shortest utterances of the demo's development set"""
    path = folder / f"few-{count}.jsonl"
    if not path.exists():
        utterances = data.load_utterances(DEMO / "corpus/dev", True)
        utterances.sort(key=lambda u: (u.seconds, u.id))
        rows = []
        for u in utterances[:count]:
            rows.append(json.dumps({"audio_filepath": u.path, "text": u.text, "id": u.id}))
        temporary = folder / f"few-{count}.{os.getpid()}"
        temporary.write_text("\n".join(rows))
        temporary.replace(path)
    return path


def log_of(out, *without):
    rows = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in ("audio_per_second", *without):
            row.pop(key, None)
        rows.append(row)
    return rows


def state_of(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


def same(a, b):
    """Two runs left the same: every tensor bit by bit, the position, the log."""
    for name in ("last.pt", "best.pt"):
        x = state_of(a, name)
        y = state_of(b, name)
        for part in {"model", "raw_model"} & x.keys():
            for key in x[part].keys() | y[part].keys():
                assert torch.equal(x[part][key], y[part][key]), (name, part, key)
    x = state_of(a)
    y = state_of(b)
    for i, state in x["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, y["optimizer"]["state"][i][key])
    assert x["position"] | {"seconds": 0} == y["position"] | {"seconds": 0}
    assert log_of(a) == log_of(b)
    return True


@pytest.fixture(scope="session")
def corner(tmp_path_factory):
    """The folder in which all runs of this file lie: the same manifests, so the same settings."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def whole(corner):
    """A run that nothing happens to."""
    code, printed = child(tiny_run, corner / "whole")
    assert code == 0, printed
    return corner / "whole"


@pytest.fixture
def out(corner, request):
    folder = corner / f"out-{random.Random(request.node.name).getrandbits(40)}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------- killed


def killed(out, at_call, seconds):
    """kill -9 from another thread, so long after the given batch"""

    def kill_later(call, losses):
        if call == at_call:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return losses

    return tiny_run(out, spoil=kill_later)


def test_kill_9_at_eight_random_moments(whole, out):
    """Whatever the moment, the same command goes on; whenever it gets through, it is the
    undisturbed run."""
    moments = random.Random(0)
    found = []
    while len(found) < 8:
        code, printed = child(killed, out, moments.randint(3, 12), moments.uniform(0, 0.1))
        if code == 0:  # it was through before
            same(whole, out)
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL, printed
        step = 0
        if (out / "last.pt").exists():
            step = state_of(out)["position"]["step"]
        found.append(step)
    print(f"checkpoints that the kills left: steps {found}")
    code, printed = child(tiny_run, out)
    assert code == 0 and len(set(found)) > 2, printed
    same(whole, out)


@pytest.mark.parametrize("where", ["write", "replace"])
def test_power_lost_in_the_middle_of_a_save(whole, out, where):
    """Dead with half of last.pt written, or with all of it written and not yet renamed."""
    code, _ = child(dies_while_saving, out, where)
    assert code == -signal.SIGKILL and (out / "last.pt.tmp").exists()
    assert state_of(out)["position"]["step"] == 6
    code, printed = child(tiny_run, out)
    assert code == 0 and "at step 6" in printed and same(whole, out)
    left = sorted(path.name for path in out.iterdir())
    assert left == ["best.pt", "command.txt", "last.pt", "log.jsonl"]


def dies_while_saving(out, where):
    replace = os.replace
    fsync = os.fsync
    saves = []

    def die(name):
        if name == "last.pt.tmp":
            saves.append(name)
        if len(saves) == 3:
            if where == "write":
                os.truncate(out / name, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(a, b):
        die(Path(a).name)
        replace(a, b)

    def dying_fsync(file):
        die(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    if where == "replace":
        os.replace = dying_replace
    else:
        os.fsync = dying_fsync
    return tiny_run(out)


# ---------------------------------------- signals


def with_workers(out):
    # As a script would; in this process it would be the forkserver.
    multiprocessing.set_start_method("fork", force=True)
    return tiny_run(out, "--workers", "2")


def signalled(out, *numbers):
    """A signal in the first update; a second one while that update goes on for minutes."""

    def send(call, losses):
        if call == 3:
            os.kill(os.getpid(), numbers[0])
            if len(numbers) > 1:
                threading.Timer(0.5, os.kill, (os.getpid(), numbers[1])).start()
                time.sleep(300)
        return losses

    return tiny_run(out, spoil=send)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_a_second_leaves_at_once(whole, out, number, code):
    left, printed = child(signalled, out, number)
    assert left == code and "Traceback" not in printed
    assert f"stopped by signal {int(number)} at step " in printed
    assert "saved, then the run stops" in printed
    assert child(with_workers, out)[0] == 0 and same(whole, out)
    shutil.rmtree(out)
    began = time.monotonic()
    left, printed = child(signalled, out, number, number)
    assert left == code and "leaving at once" in printed
    assert time.monotonic() - began < 30 and not (out / "last.pt").exists()


# ---------------------------------------- a full disk


def with_files_of_at_most(size, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return tiny_run(out)


@pytest.mark.parametrize("size", [0, 100, 30_000])
def test_a_full_disk_is_one_line_and_what_is_there_stays(whole, out, size):
    """No room for anything; for a line of the log; for half a checkpoint. Then there is room
    again."""
    assert child(signalled, out, signal.SIGTERM)[0] == 143
    before = (out / "last.pt").read_bytes()
    assert len(before) > 2 * 30_000
    code, printed = child(with_files_of_at_most, size, out)
    [line] = [line for line in printed.splitlines() if ": error: " in line]
    assert code == 2 and "Traceback" not in printed, printed
    assert "cannot write" in line and str(out) in line and "free some space" in line
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert child(tiny_run, out)[0] == 0 and same(whole, out)


# ---------------------------------------- too little memory


def too_large_from(first, out):
    def fill(call, losses):
        return losses + torch.zeros(1 << 45 if call == first else 1).mean()  # 140 TB

    return tiny_run(out, spoil=fill)


@pytest.mark.parametrize("call", [1, 4])
def test_out_of_memory_names_seconds_shapes_and_option(out, call):
    """In the rehearsal before the first update, or later: real refusals of torch's allocator."""
    code, printed = child(too_large_from, call, out)
    [line] = [line for line in printed.splitlines() if ": error: " in line]
    assert code == 2 and "Traceback" not in printed
    for words in ("out of memory", " utterances, ", " s, ", ", 80]", "--batch-seconds from 8"):
        assert words in line
    assert call > 1 or not log_of(out)


# ---------------------------------------- numbers that go wrong


def with_bad_numbers(out, kind, first, last):
    def spoil(call, losses):
        if not first <= call <= last:
            return losses
        if kind == "gradient":
            return losses + torch.sqrt(0 * losses)  # finite, its gradient is not
        return losses * kind

    return tiny_run(out, spoil=spoil)


@pytest.mark.parametrize("kind", [math.nan, math.inf, "gradient"])
def test_a_bad_number_costs_its_update_and_is_named(out, kind):
    code, printed = child(with_bad_numbers, out, kind, 8, 9)
    assert code == 0 and "Traceback" not in printed, printed
    assert printed.count("update skipped, loss or gradient is not finite (") == 2
    assert "2 updates were skipped" in printed
    skipped = [row["skipped"] for row in log_of(out) if "skipped" in row]
    assert len(skipped) == 2
    for ids in skipped:
        assert ids and all(id in printed for id in ids[:5])
    last = state_of(out)
    assert last["position"]["skipped"] == 2 and last["position"]["step"] == 24
    for part in ("model", "raw_model"):
        assert all(value.isfinite().all() for value in last[part].values())


def test_ten_bad_updates_in_a_row_end_the_run_and_leave_the_checkpoints(out):
    code, printed = child(with_bad_numbers, out, math.nan, 9, 1000)
    [line] = [line for line in printed.splitlines() if ": error: " in line]
    assert code == 2 and "10 updates in a row" in line and "--lr" in line
    assert "Traceback" not in printed
    assert len([row for row in log_of(out) if "skipped" in row]) == 10
    last = state_of(out)
    for part in ("model", "raw_model"):
        assert all(value.isfinite().all() for value in last[part].values())
    assert state_of(out, "best.pt")["step"] <= last["position"]["step"]


def test_audio_that_is_only_a_header_is_one_line(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "whole.wav", 0.1 * torch.randn(32_000).numpy(), 16_000)
    header = (tmp_path / "whole.wav").read_bytes()[:44]
    rows = []
    for i in range(4):
        (tmp_path / f"in/{i}.wav").write_bytes(header + bytes(64_000))  # silence
        rows.append(json.dumps({"audio_filepath": f"in/{i}.wav", "text": "A WORD"}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    code = finetune_rnnt.main(
        [
            "--data",
            str(tmp_path / "train.jsonl"),
            "--dev",
            str(DEMO / "corpus/dev"),
            "--init",
            "none",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 2
    assert "none of the training audio can be used any more" in capsys.readouterr().err


# ---------------------------------------- data that changed


def test_data_that_changed_between_two_starts_is_named(out, corner, tmp_path):
    assert child(signalled, out, signal.SIGTERM)[0] == 143
    code, printed = child(tiny_run, out, "--data", str(few_utterances(corner, 7)))
    assert code == 2 and "--data was" in printed
    # The same manifest by name, with a line less.
    shutil.rmtree(out)
    manifest = few_utterances(corner)
    copy = tmp_path / "few.jsonl"
    copy.write_text(manifest.read_text())
    assert child(interrupted_on, out, str(copy))[0] == 143
    copy.write_text("\n".join(manifest.read_text().splitlines()[:-1]))
    code, printed = child(interrupted_on, out, str(copy))
    assert code == 2 and "the training audio was 6 utterances" in printed and "is 5" in printed


def interrupted_on(out, manifest):
    def send(call, losses):
        if call == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    return tiny_run(out, "--data", manifest, spoil=send)


# ---------------------------------------- damaged files


def damage(rng, content):
    """Bits turned, bytes exchanged, cut out, doubled, or the end cut off; most of it where headers
    are."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 50])):
        if not content:
            break
        end = len(content)
        if rng.random() < 0.5:
            end = min(end, 200)
        at = rng.randrange(end)
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            patterns = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", rng.randbytes(4)]
            content[at : at + 4] = rng.choice(patterns)
        elif kind == 2:
            del content[at : at + rng.choice([1, 4, 100])]
        elif kind == 3:
            content[at:at] = content[at : at + rng.choice([1, 4, 100])]
        elif rng.random() < 0.2:
            del content[at:]
    return bytes(content)


FORMATS = {
    "a.wav": {},
    "b.wav": {"subtype": "FLOAT"},
    "c.wav": {"subtype": "PCM_24"},
    "d.flac": {},
    "e.ogg": {},
    "f.opus": {"format": "OGG", "subtype": "OPUS"},
    "g.mp3": {},
    "h.aiff": {},
    "i.au": {},
    "j.caf": {},
    "k.w64": {},
    "l.wav": {"subtype": "GSM610"},
}


def fuzz_audio(folder, count):
    rng = random.Random(0)
    folder = Path(folder)
    outcomes = {"read": 0, "refused": 0}
    wave = data.load_audio(next((DEMO / "corpus/dev").rglob("*.opus")))[:8000].numpy()
    whole = {}
    for name, options in FORMATS.items():
        soundfile.write(folder / name, wave, 16_000, **options)
        whole[name] = (folder / name).read_bytes()
    for number in range(count):
        name = rng.choice(list(whole))
        path = folder / f"x-{name}"
        path.write_bytes(damage(rng, whole[name]))
        try:
            [utterance] = data.load_utterances(path)
            sound = data.load_audio(path)
        except UserError as error:
            assert "\n" not in str(error), error
            outcomes["refused"] += 1
            continue
        assert sound.dtype == torch.float32 and sound.dim() == 1 and sound.abs().max() < 200, name
        difference = abs(len(sound) / 16_000 - utterance.seconds)
        assert difference < 0.11, (number, name, len(sound), utterance.seconds)
        outcomes["read"] += 1
    print(f"{count} damaged audio files: {outcomes}")
    return 0 if min(outcomes.values()) > count / 20 else 1


VALUES = [
    "a.wav",
    "",
    ".",
    "..",
    "gone.wav",
    "/dev/zero",
    "/dev/stdin",
    "a\0b",
    "a\nb.wav",
    "x" * 5000,
    "\ud800",
    "🎧",
    None,
    True,
    0,
    -1,
    1e308,
    [],
    {},
    ["a.wav"],
    "words",
    "你好",
]
LINES = ["[" * 20_000, "9" * 5000, "NaN", '{"audio_filepath": NaN}', "\x00", "null"]
KEYS = ("audio_filepath", "text", "id", "duration", "offset", "start", "end", "weight", "keep")


def fuzz_manifests(folder, count):
    rng = random.Random(0)
    folder = Path(folder)
    outcomes = {"read": 0, "refused": 0}
    soundfile.write(folder / "a.wav", 0.1 * torch.randn(8000).numpy(), 16_000)
    good = json.dumps({"audio_filepath": "a.wav", "text": "the good one", "id": "good"})
    for number in range(count):
        rows = []
        for _ in range(3):
            rows.append(json.dumps({key: rng.choice(VALUES) for key in KEYS if rng.random() < 0.7}))
        rows.append(good)
        rows.insert(rng.randrange(4), rng.choice(LINES))
        encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
        content = "\n".join(rows).encode(encoding, "surrogatepass")
        whole = number % 2 and content.find(b"\0") < 0 and "\ud800" not in "\n".join(rows)
        (folder / "m.jsonl").write_bytes(content if whole else damage(rng, content))
        found = data.load_utterances(folder / "m.jsonl", skipped=[])
        readable = 0
        for utterance in found:
            f"{utterance.id}{utterance.path}{utterance.text}".encode()
            try:
                data.load_audio(utterance.path, utterance.offset, utterance.seconds)
                readable += 1
            except UserError:
                pass
        assert not whole or any(u.text == "the good one" for u in found), "a valid line was lost"
        outcomes["read" if readable else "refused"] += 1
    print(f"{count} damaged manifests: {outcomes}")
    return 0 if min(outcomes.values()) > count / 20 else 1


def fuzz_checkpoints(checkpoint, folder, count):
    rng = random.Random(0)
    outcomes = {"the same": 0, "refused": 0}
    path = Path(folder) / "x.pt"
    whole = Path(checkpoint).read_bytes()
    expected = model.load_checkpoint(checkpoint)["model"]
    for _ in range(count):
        path.write_bytes(damage(rng, whole))
        try:
            loaded = model.load_checkpoint(path)
            model.load_student(loaded)
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        for key, value in expected.items():
            assert torch.equal(value, loaded["model"][key]), "silently other weights"
        outcomes["the same"] += 1
    print(f"{count} damaged checkpoints: {outcomes}")
    return 0 if outcomes["refused"] > count / 2 else 1


@pytest.mark.parametrize(
    "fuzz, count", [(fuzz_audio, 1000), (fuzz_manifests, 500), (fuzz_checkpoints, 600)]
)
def test_damaged_files_are_read_or_refused(fuzz, count, request, tmp_path):
    """Never a traceback, a crash, a hang or a number that is silently wrong."""
    before = []
    if fuzz is fuzz_checkpoints:
        before = [request.getfixturevalue("whole") / "best.pt"]
    code, printed = child(fuzz, *before, tmp_path, count)
    assert code == 0 and "Traceback" not in printed, printed[-3000:]


def test_a_checkpoint_of_another_size_is_one_line(whole, tmp_path):
    other = state_of(whole, "best.pt")
    config = other["config"]
    for wrong in (config | {"dim": 16}, config | {"unknown_field": 1}, None):
        torch.save(other | {"config": wrong}, tmp_path / "other.pt")
        with pytest.raises(UserError, match="other.pt") as error:
            model.load_student(model.load_checkpoint(tmp_path / "other.pt"))
        assert "\n" not in str(error.value)
    torch.save(other | {"format": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another version of this code"):
        model.load_checkpoint(tmp_path / "other.pt")
