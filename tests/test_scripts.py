"""The three scripts from end to end: tiny budgets, a few utterances of the demo, two tiny random teachers."""

import json
import os
import re
import resource
import shutil
import signal
import types
from pathlib import Path

import pytest
import soundfile
import torch

import data
import decode
import finetune_rnnt
import model
import pretrain_kd
import run
import training
from conftest import DEMO, ROOT

TINY = ["--steps", "4", "--batch-seconds", "12", "--workers", "0", "--eval-every", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """8 utterances to train on, 4 to evaluate on, in LibriSpeech layout."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 8), ("dev", 4)):
        for u in sorted(
            data.load_utterances(DEMO / "corpus" / split, transcribed=True), key=lambda u: (u.seconds, u.id)
        )[:count]:
            source = Path(u.path)
            target = folder / split / source.relative_to(DEMO / "corpus" / split)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            with open(target.parent / f"{source.parts[-3]}-{source.parts[-2]}.trans.txt", "a") as file:
                file.write(f"{source.stem} {u.text}\n")
    return folder


@pytest.fixture(scope="session")
def stage1(corpus, teacher_folders):
    """arguments of a stage-1 run, but --out"""
    return [
        "--data",
        str(corpus / "train"),
        "--dev",
        str(corpus / "dev"),
        "--teachers",
        teacher_folders["hubert"],
        teacher_folders["whisper"],
        *TINY,
    ]


@pytest.fixture(scope="session")
def pretrained(stage1, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "pretrain"
    assert pretrain_kd.main([*stage1, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def stage2(corpus, pretrained):
    return [
        "--data",
        str(corpus / "train"),
        "--dev",
        str(corpus / "dev"),
        "--init",
        str(pretrained),
        "--vocab-size",
        "40",
        *TINY,
    ]


@pytest.fixture(scope="session")
def finetuned(stage2, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "finetune"
    assert finetune_rnnt.main([*stage2, "--out", str(out)]) == 0
    return out


def refused(capsys, code, *words):
    """A user's mistake: exit code 2, one line on stderr that has the words in it."""
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and ": error: " in lines[0] and all(word in lines[0] for word in words), (
        code,
        captured.err,
    )


def same_training(a, b):
    a, b = (torch.load(x / "last.pt", weights_only=True) for x in (a, b))
    for part in ("model", "raw_model"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part].keys() | b[part].keys()), part
    assert {**a["progress"], "seconds": 0} == {**b["progress"], "seconds": 0}


@pytest.mark.parametrize("which", ["pretrained", "finetuned"])
def test_what_a_run_leaves(which, request):
    out = request.getfixturevalue(which)
    assert {"last.pt", "best.pt", "log.jsonl", "command.txt"} == {p.name for p in out.iterdir()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if any(k.startswith("dev ") for k in row)] == [2, 4] and any(
        "loss" in row for row in log
    )
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["config"]["dim"] == 144 and ("tokenizer" in best) == (which == "finetuned")


def test_what_stage_1_says(stage1, tmp_path, capsys):
    assert pretrain_kd.main([*stage1, "--combine", "average", "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert all(
        word in said
        for word in (
            "device cpu",
            "training on 8 utterances",
            "evaluating on 4",
            "50 Hz",
            "HubertModel",
            "WhisperEncoder",
            "M parameters",
            "average",
            "next: python finetune_rnnt.py --init",
        )
    )


@pytest.mark.parametrize(
    "which, main, arguments", [("pretrained", pretrain_kd.main, "stage1"), ("finetuned", finetune_rnnt.main, "stage2")]
)
def test_a_finished_run_is_left_alone_and_other_arguments_are_named(which, main, arguments, request, capsys):
    out, arguments = request.getfixturevalue(which), request.getfixturevalue(arguments)
    before = {p: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 0
    assert "is finished" in capsys.readouterr().out
    code = main([*arguments, "--lr", "0.5", "--out", str(out)])
    refused(capsys, code, "--lr was 0.00", "is 0.5", "--overwrite")
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_overwrite_takes_nothing_away_before_the_new_run_begins(stage2, finetuned, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finetuned, tmp_path / "old")
    again = [*stage2, "--overwrite", "--lr", "0.004", "--out", str(out)]
    for wrong in (["--data", "no/such"], ["--init", "no/run"], ["--init", str(out)], ["--teacher-transducer", str(out)]):
        assert finetune_rnnt.main([*again, *wrong]) == 2
    assert all((out / p.name).read_bytes() == p.read_bytes() for p in finetuned.iterdir())
    assert "taught by; choose another --out" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")                # torchrun tries again: still nothing is done
    assert finetune_rnnt.main(again) == 0 and "is finished" not in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {p.name for p in finetuned.iterdir()}
    assert finetune_rnnt.main(again) == 0 and "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("stage, arguments, whole", [(pretrain_kd, "stage1", "pretrained"),
                                                     (finetune_rnnt, "stage2", "finetuned")])
def test_an_interrupted_run_goes_on_bit_by_bit(stage, arguments, whole, request, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of the third step; the evaluation of step 2 lies behind it, that of step 4 ahead."""
    whole = request.getfixturevalue(whole)
    arguments = [*request.getfixturevalue(arguments), "--out", str(tmp_path / "out")]
    update, calls = training.Training.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)
    monkeypatch.setattr(training.Training, "update", interrupted)
    assert stage.main(arguments) == 143
    assert "stopped by signal 15 at step 3" in capsys.readouterr().out and len(calls) == 3
    with open(tmp_path / "out/log.jsonl", "a") as file:
        file.write('{"step": 4, "lost": 1}\n{"ste')  # what a crash after the last checkpoint leaves
    assert stage.main(arguments) == 0
    assert "continuing" in capsys.readouterr().out
    same_training(whole, tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if any(k.startswith("dev ") for k in row)] == [2, 4] and not any(
        "lost" in row for row in log
    )


def test_under_autocast_losses_and_counts_stay_whole():
    """In bfloat16 a sum of 2,000 nats would be off by eight, and 321 utterances would be 320."""
    torch.manual_seed(0)
    student = model.Student(model.Config(vocab_size=20)).eval()
    batch = data.Batch(["a", "b"], torch.randn(2, 200, 80), torch.tensor([200, 180]), None,
                       torch.randint(1, 20, (2, 12)), torch.tensor([12, 9]), torch.tensor([1.0, 0.7]), 4.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        loss, count, parts = finetune_rnnt.stage2_loss(student, batch, finetune_rnnt.parse([]))
    assert {x.dtype for x in (loss, *parts.values())} == {torch.float32} and count == 2


def test_what_a_model_wrote_is_not_evaluated_on(tmp_path, demo_utterances):
    rows = [{"audio_filepath": u.path, "text": u.text, "keep": True} for u in demo_utterances]
    (tmp_path / "true.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "pseudo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    pseudo = ["--pseudo", str(tmp_path / "pseudo.jsonl")]
    args = finetune_rnnt.parse(["--data", str(tmp_path / "true.jsonl"), *pseudo])
    train, dev = data.load_training_data(args, lambda line: None, transcribed=True)
    assert len(dev) == 1 and {u.path for u in dev} < {row["audio_filepath"] for row in rows[:20]}
    assert len(train) + len(dev) == len(rows)
    train, dev = data.load_training_data(finetune_rnnt.parse(pseudo), lambda line: None, transcribed=True)
    assert dev and not {u.path for u in train} & {u.path for u in dev}


def test_stage_2_inherits_the_encoder(stage2, pretrained, tmp_path, monkeypatch, capsys):
    seen, asked = {}, []

    def look(run, student, loader, *rest):
        seen.update({k: v.clone() for k, v in student.encoder.state_dict().items()})
        asked.append((student.config.dropout, loader.masks))
        return types.SimpleNamespace(loop=lambda: 0)
    monkeypatch.setattr(finetune_rnnt.training, "Training", look)
    assert finetune_rnnt.main([*stage2, "--out", str(tmp_path / "x")]) == 0
    assert finetune_rnnt.main([*stage2, "--dropout", "0.3", "--spec-augment", "0", "--out", str(tmp_path / "y")]) == 0
    assert asked == [(0.1, 4), (0.3, 0)]
    first = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    assert first and seen and all(torch.equal(first["encoder." + k], v) for k, v in seen.items())
    said = capsys.readouterr()
    assert "inherited from" in said.out + said.err


def test_a_frozen_encoder_does_not_move(stage2, pretrained, tmp_path):
    assert finetune_rnnt.main([*stage2, "--freeze-steps", "4", "--out", str(tmp_path / "x")]) == 0
    first, last = (
        torch.load(pretrained / "best.pt", weights_only=True)["model"],
        torch.load(tmp_path / "x/last.pt", weights_only=True)["raw_model"],
    )
    assert all(torch.equal(first[k], last[k]) for k in first if k.startswith("encoder."))


def test_decode_scores(finetuned, corpus, capsys):
    assert (
        decode.main(
            [
                "--data",
                str(corpus / "dev"),
                "--checkpoint",
                str(finetuned),
                "--device",
                "cpu",
                "--workers",
                "0",
                "--out",
                str(finetuned.parent / "s.jsonl"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (finetuned.parent / "s.jsonl").read_text().splitlines()]
    words = sum(len(row["reference"].split()) for row in rows)
    assert len(rows) == 4 and out.startswith("%WER ") and f"/ {words}, " in out and "RTF" in out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_decode_files(finetuned, corpus, tmp_path, capsys, workers):
    """One good file, one that is no audio, one of NaN: the good one is transcribed, each of the others is a line."""
    good = next((corpus / "dev").rglob("*.opus"))
    (tmp_path / "letter.wav").write_text("not a sound")
    soundfile.write(tmp_path / "nan.wav", torch.full((48_000,), float("nan")).numpy(), 16_000, subtype="FLOAT")
    files = [str(good), str(tmp_path / "letter.wav"), str(tmp_path / "nan.wav")]
    code = decode.main(
        [*files, "--checkpoint", str(finetuned), "--device", "cpu", "--workers", workers, "--batch-seconds", "5"]
    )
    captured = capsys.readouterr()
    assert code == 0 and [line.split("\t")[0] for line in captured.out.splitlines()] == [str(good)], captured.err
    skipped = [line for line in captured.err.splitlines() if "skipped: " in line]
    assert (
        len(skipped) == 2
        and "letter.wav" in captured.err
        and "nan.wav" in captured.err
        and "Traceback" not in captured.err
    )


def test_mistakes_are_one_line(stage1, stage2, pretrained, corpus, tmp_path, capsys):
    capsys.readouterr()
    out = ["--out", str(tmp_path / "x")]
    for main, arguments, words in [
        (pretrain_kd.main, [*stage1, "--data", "no/such/data", *out], ["no/such/data"]),
        (pretrain_kd.main, [*stage1, "--teachers", "no/teacher", *out], ["no/teacher"]),
        (pretrain_kd.main, [*stage1, "--weights", "1", "2", "3", *out], ["--weights"]),
        (pretrain_kd.main, [*stage1, "--device", "nonsense", *out], ["--device nonsense"]),
        (finetune_rnnt.main, [*stage2, "--init", "no/run", *out], ["no/run"]),
        (finetune_rnnt.main, [*stage2, "--size", "small", *out], ["--size small", "nano"]),
        (decode.main, ["--checkpoint", "no/run"], ["no/run"]),
        (decode.main, ["--checkpoint", str(pretrained)], ["stage 1", "finetune_rnnt.py --init"]),
        (decode.main, ["a.wav", "--data", "b"], ["not both"]),
        (decode.main, ["--stream", "a.wav", "--output", "b.jsonl"], ["--output", "for AUDIO"]),
    ]:
        refused(capsys, main(arguments), *words)


def test_a_budget_of_nothing_is_one_line(stage2, tmp_path, capsys):
    capsys.readouterr()
    for option in ("--steps", "--minutes", "--accumulate"):
        refused(capsys, finetune_rnnt.main([*stage2, option, "0", "--out", str(tmp_path / option)]), option)
    refused(capsys, finetune_rnnt.main([*stage2, "--dropout", "1", "--out", str(tmp_path / "x")]), "--dropout")
    refused(capsys, finetune_rnnt.main([*stage2, "--self-condition", "--out", str(tmp_path / "x")]), "--bert")


def test_one_batch_can_be_learned_by_heart(demo_utterances):
    """The whole of stage 2, from audio to text: four utterances are transcribed without an error by both outputs."""
    four = sorted(demo_utterances, key=lambda u: u.seconds)[20:24]
    tokenizer = data.train_tokenizer([u.text for u in four], 64, 2)
    [batch] = data.Loader(four, 60, tokenizer).epoch()
    torch.manual_seed(0)
    student = model.Student(
        model.Config(
            dim=64,
            layers=2,
            kernel=15,
            channels=16,
            dropout=0,
            vocab_size=tokenizer.get_vocab_size(),
            predictor_dim=64,
            joiner_dim=64,
        )
    )
    optimizer, options = torch.optim.AdamW(student.parameters(), lr=3e-3), finetune_rnnt.parse([])
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        loss, count, _ = finetune_rnnt.stage2_loss(student, batch, options)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        if loss / count < 0.05:
            break
    student.eval()
    for method in ("transducer", "ctc"):
        [texts] = decode.transcribe(student, tokenizer, batch, torch.device("cpu"), methods=[method])
        errors = [decode.word_errors(reference, text) for reference, text in zip(batch.texts, texts)]
        assert sum(e.words for e in errors) > 8 and sum(e.total for e in errors) == 0, (method, texts, batch.texts)


def test_readme_points_at_the_lines_it_names():
    """The table from equation to code in README.md: [file:line `name`](file#Lline)."""
    links = re.findall(r"\[(\w+\.py):(\d+) `(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 10
    for file, line, name, target, anchor in links:
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert file == target and line == anchor and re.match(rf"\s*(def|class) {name}\b", found), f"{file}:{line} is {found!r}, not {name}"


# ---------------------------------------------------------------------------- bad data

def write_bad_data(corpus, folder):
    """Four manifests of at most five lines that cannot be used, beside valid audio of every kind. -> (their paths,
    {file or line that must be named: how many words of the reason}, valid utterances)"""
    folder.mkdir()
    [good, *_] = [u for u in data.load_utterances(corpus / "train", True) if u.seconds > 1.5]
    wave = data.load_audio(good.path).numpy()
    kinds = {"loud.wav": ("FLOAT", 16_000, 3e4 * wave), "nan.wav": ("FLOAT", 16_000, wave + float("nan")),
             "silent.wav": ("PCM_16", 16_000, 0 * wave), "odd.wav": ("PCM_16", 16_001, wave),
             "short.wav": ("PCM_16", 16_000, wave[:800]), "cut.flac": ("PCM_16", 16_000, wave),
             "24bit.wav": ("PCM_24", 16_000, wave), "8bit.wav": ("PCM_U8", 16_000, wave),
             "32bit.wav": ("PCM_32", 48_000, wave.repeat(3)), "float.wav": ("FLOAT", 44_100, wave.repeat(3)),
             "stereo.wav": ("PCM_16", 22_050, torch.tensor(wave).repeat(2, 1).T.numpy())}
    for name, (subtype, rate, samples) in kinds.items():
        soundfile.write(folder / name, samples, rate, subtype=subtype)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:-4000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "letter.wav").write_text("not a sound")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    row = lambda name, text=good.text, **more: json.dumps({"audio_filepath": str(name), "text": text, **more})
    manifests = {
        "audio.jsonl": [row(name) for name in ("empty.wav", "letter.wav", "folder.wav", "pipe.wav", "gone.wav", "float.wav")],
        "more.jsonl": [row("odd.wav"), row("short.wav"), row("nan.wav"), row("loud.wav"), row("cut.flac"),
                       row("float.wav")],
        "lines.jsonl": ["{broken", json.dumps({"text": "no path"}), row("24bit.wav", 5), "[" * 9999, row("\ud800.wav"),
                        row("float.wav")],
        "texts.jsonl": [row("24bit.wav", ""), row("8bit.wav", " ?! "), row("silent.wav"), row("stereo.wav", 99 * good.text)],
        "valid.jsonl": [row("24bit.wav"), row(folder / "8bit.wav"), row("32bit.wav", "我们 ЖЖЖ"), row("float.wav", duration=9)]}
    for name, lines in manifests.items():
        (folder / name).write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode("utf-8", "surrogatepass"))
    return [str(folder / name) for name in manifests]


def test_bad_data_through_all_three_scripts(stage1, stage2, finetuned, corpus, tmp_path, capfd):
    """Each is one line that names it and says why, the valid utterances are used as if they were alone."""
    sources = write_bad_data(corpus, tmp_path / "bad")
    scanned = ["empty.wav: the file is empty", "letter.wav: not readable as audio", "folder.wav: there is no such file",
               "pipe.wav: there is no such file", "gone.wav: there is no such file", "odd.wav: not readable as audio (a sample "
               "rate of 16001 Hz", "short.wav: 0.05 s long", *(f"lines.jsonl:{n}: expected" for n in range(1, 6))]
    read = [f"{name}: not readable as audio" for name in ("nan.wav", "loud.wav", "cut.flac")]
    untranscribed, trained = ["24bit.wav: no transcript", "8bit.wav: no transcript"], ["silent.wav: silence"]
    capfd.readouterr()

    def skipped(main, arguments, expected, code=0):
        assert main(arguments) == code
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if "skipped: " in line]
        assert [sum(words in line for line in lines) for words in expected] == [1] * len(expected), err
        assert len(lines) == len(expected) and "Traceback" not in err, err
        return out
    for name, main, arguments, expected in (
            ("pretrain", pretrain_kd.main, stage1, scanned + read + trained),
            ("finetune", finetune_rnnt.main, stage2, scanned + untranscribed + read + trained + ["stereo.wav: its transcript"])):
        out = skipped(main, [*arguments, "--data", *sources, "--out", str(tmp_path / name), "--steps", "12"], expected)
        assert f"; {len(set(expected) & {*read, *trained, 'stereo.wav: its transcript'})} files could not be used" in out
    score = ["--checkpoint", str(finetuned), "--device", "cpu", "--workers", "0", "--output", str(tmp_path / "scores.jsonl")]
    skipped(decode.main, [*score, "--data", sources[-1]], [])
    alone = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    out = skipped(decode.main, [*score, "--data", *sources], scanned + untranscribed + read)
    among = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(alone) == 4 and all(row["hypothesis"] in [r["hypothesis"] for r in among] for row in alone)
    assert len(among) == 6 and f"{len(scanned + untranscribed + read)} could not be used" in out


@pytest.mark.parametrize("script", ["stage1", "stage2", "decode"])
def test_a_source_of_which_nothing_is_left_is_one_line(script, stage1, stage2, finetuned, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x.wav").write_bytes(b"")
    arguments = {"stage1": stage1, "stage2": stage2, "decode": ["--checkpoint", str(finetuned), "--device", "cpu"]}[script]
    main = {"stage1": pretrain_kd.main, "stage2": finetune_rnnt.main, "decode": decode.main}[script]
    capsys.readouterr()
    out = ["--output", str(tmp_path / "x.jsonl")] if script == "decode" else ["--out", str(tmp_path / "x")]
    code = main([*arguments, "--data", str(tmp_path / "source"), *out])
    err = capsys.readouterr().err
    assert code == 2 and "source/x.wav" in err and err.count(": error: ") == 1 and "Traceback" not in err


def test_a_full_disk_is_one_line_when_decoding(finetuned, corpus, tmp_path, capsys, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        code = decode.main(["--data", str(corpus / "dev"), "--checkpoint", str(finetuned), "--device", "cpu", "--workers", "0",
                            "--out", str(tmp_path / "scores.jsonl")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 2 and err.count(": error: ") == 1 and "too large" in err and "Traceback" not in err


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:5000] + b"?" + b[5001:]])
def test_a_damaged_checkpoint_is_one_line_in_all_three_scripts(damage, stage1, stage2, pretrained, finetuned, tmp_path, capsys):
    capsys.readouterr()
    for main, arguments, source in ((pretrain_kd.main, stage1, pretrained), (finetune_rnnt.main, stage2, finetuned)):
        out = tmp_path / source.name
        out.mkdir()
        (out / "last.pt").write_bytes(damage((source / "last.pt").read_bytes()))
        refused(capsys, main([*arguments, "--out", str(out)]), str(out / "last.pt"), "damaged")
    (tmp_path / "best.pt").write_bytes(damage((finetuned / "best.pt").read_bytes()))
    refused(capsys, decode.main(["--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu"]), "best.pt", "damaged")
    refused(capsys, finetune_rnnt.main([*stage2, "--init", str(tmp_path / "best.pt"), "--out", str(tmp_path / "y")]), "best.pt")


# ---------------------------------------------------------------------------- output distillation

def test_an_ensemble_teaches_on_transcribed_and_other_audio(stage2, finetuned, corpus, tmp_path, capsys):
    """Its tokenizer is taken over, its soft labels enter the loss, it transcribes what nobody wrote down; an interrupted
    run goes on; the pruned loss goes with it."""
    taught = [*stage2, "--teacher-transducer", str(finetuned), str(finetuned / "last.pt"), "--essence-top-k", "4",
              "--kd-shift", "1", "--unlabelled", str(DEMO / "corpus/dev"), "--loss", "pruned"]
    assert finetune_rnnt.main([*taught, "--out", str(tmp_path / "taught")]) == 0
    said = capsys.readouterr().out
    ours, theirs = (model.load_checkpoint(x) for x in (tmp_path / "taught", finetuned))
    assert ours["tokenizer"] == theirs["tokenizer"] and f"taught by {finetuned}" in said
    steps = [json.loads(line) for line in (tmp_path / "taught/log.jsonl").read_text().splitlines()]
    assert any(step.get("kd", 0) > 0 and step.get("simple", 0) > 0 for step in steps)
    assert decode.main(["--checkpoint", str(tmp_path / "taught"), "--data", str(corpus / "dev")]) == 0


def test_kd_weight_0_is_training_without_a_teacher(stage2, finetuned, tmp_path):
    alone, [*taught] = ([*stage2, "--out", str(tmp_path / name), "--teacher-transducer", str(finetuned)] for name in "ab")
    assert finetune_rnnt.main([*taught, "--kd-weight", "0"]) == finetune_rnnt.main([*alone[:-2]]) == 0
    a, b = (model.load_checkpoint(tmp_path / name / "last.pt")["raw_model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_essence_drop_leaves_out_what_contradicts_the_transcript(finetuned, demo_utterances):
    """Node by node, of two teachers that know next to nothing."""
    teachers, tokenizer = finetune_rnnt.load_teachers([finetuned, finetuned / "last.pt"], "cpu")
    [batch] = data.Loader(demo_utterances[:3], 100, tokenizer, waveforms=True).epoch()
    for teacher in teachers:                                                                   # they write anything
        torch.manual_seed(0)
        torch.nn.init.normal_(teacher.joiner.out.weight)
    exists, kept = (finetune_rnnt.listen(teachers, batch, finetune_rnnt.parse(
        ["--teacher-transducer", "x", "--init", "none", *drop]))[1] for drop in ([], ["--essence-drop"]))
    _, (t, u, exist), q = finetune_rnnt.listen(teachers, batch, finetune_rnnt.parse([]))
    for b in range(3):
        label = [*batch.targets[b][:batch.target_lengths[b]].tolist(), None]
        for n in range(exist.shape[1]):
            best = q[b, n].argmax().item()
            assert kept[2][b, n] == (exist[b, n] and best in (0, label[u[b, n]] if exist[b, n] else 0))
    assert torch.equal(exists[2], exist) and 0 < kept[2].sum() < exist.sum()


def test_teachers_that_do_not_fit_are_one_line(stage2, finetuned, pretrained, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")]
    capsys.readouterr()
    refused(capsys, finetune_rnnt.main([*stage2, *out, "--essence-top-k", "3"]), "--teacher-transducer")
    refused(capsys, finetune_rnnt.main([*stage2, *out, "--unlabelled", "y"]), "--teacher-transducer")
    refused(capsys, finetune_rnnt.main([*stage2, *out, "--teacher-transducer", str(pretrained)]), "stage 1")
    other = model.load_checkpoint(finetuned)
    other["tokenizer"] = data.train_tokenizer(["quite other words"] * 200, 40, 1).to_str()
    torch.save(other, tmp_path / "other.pt")
    refused(capsys, finetune_rnnt.main([*stage2, *out, "--teacher-transducer", str(finetuned), str(tmp_path / "other.pt")]),
            "another tokenizer")
