"""The three scripts from end to end: tiny budgets, a few utterances of the demo, two tiny random
teachers."""

import importlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch

import data
import decode
import finetune_rnnt
import model
import pretrain_kd
from conftest import DEMO, ROOT
from tools import training

TINY = [
    "--steps",
    "4",
    "--batch-seconds",
    "12",
    "--workers",
    "0",
    "--eval-every",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """8 utterances to train on, 4 to evaluate on, in LibriSpeech layout."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 8), ("dev", 4)):
        utterances = data.load_utterances(DEMO / "corpus" / split, transcribed=True)
        utterances.sort(key=lambda u: (u.seconds, u.id))
        for u in utterances[:count]:
            source = Path(u.path)
            target = folder / split / source.relative_to(DEMO / "corpus" / split)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            speaker, chapter = source.parts[-3:-1]
            with open(target.parent / f"{speaker}-{chapter}.trans.txt", "a") as file:
                file.write(f"{source.stem} {u.text}\n")
    return folder


@pytest.fixture(scope="session")
def stage1(corpus, teacher_folders):
    """The arguments of stage 1, but --out."""
    teachers = [teacher_folders["hubert"], teacher_folders["whisper"]]
    sources = ["--data", str(corpus / "train"), "--dev", str(corpus / "dev")]
    return [*sources, "--teachers", *teachers, *TINY]


@pytest.fixture(scope="session")
def pretrained(stage1, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "pretrain"
    assert pretrain_kd.main([*stage1, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def stage2(corpus, pretrained):
    """The arguments of stage 2, but --out."""
    sources = ["--data", str(corpus / "train"), "--dev", str(corpus / "dev")]
    return [*sources, "--init", str(pretrained), "--vocab-size", "40", *TINY]


@pytest.fixture(scope="session")
def finetuned(stage2, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "finetune"
    assert finetune_rnnt.main([*stage2, "--out", str(out)]) == 0
    return out


def refused(capsys, code, *words):
    """A user's mistake: exit code 2, one line on stderr that has the words in it."""
    error = capsys.readouterr().err
    lines = error.strip().splitlines()
    assert code == 2 and len(lines) == 1 and ": error: " in lines[0], (code, error)
    assert all(word in lines[0] for word in words), error


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def evaluated_steps(out):
    return [row["step"] for row in log_of(out) if any(key.startswith("dev ") for key in row)]


def state_of(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


def same_training(a, b):
    a = state_of(a)
    b = state_of(b)
    for part in ("model", "raw_model"):
        for key in a[part].keys() | b[part].keys():
            assert torch.equal(a[part][key], b[part][key]), (part, key)
    assert {**a["position"], "seconds": 0} == {**b["position"], "seconds": 0}


# ---------------------------------------- what runs leave and print


@pytest.mark.parametrize("which", ["pretrained", "finetuned"])
def test_what_a_run_leaves(which, request):
    out = request.getfixturevalue(which)
    left = {path.name for path in out.iterdir()}
    assert left == {"last.pt", "best.pt", "log.jsonl", "command.txt"}
    assert evaluated_steps(out) == [2, 4]
    assert any("loss" in row for row in log_of(out))
    best = state_of(out, "best.pt")
    assert best["config"]["dim"] == 144 and ("tokenizer" in best) == (which == "finetuned")


def test_what_stage_1_prints(stage1, tmp_path, capsys):
    arguments = [*stage1, "--combine", "average", "--out", str(tmp_path / "x")]
    assert pretrain_kd.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "device cpu",
        "training on 8 utterances",
        "evaluating on 4",
        "50 Hz",
        "HubertModel",
        "WhisperEncoder",
        "M parameters",
        "average",
        "dev L1",
        "next: python finetune_rnnt.py --init",
    ):
        assert words in printed, words


@pytest.mark.parametrize(
    "which, main, arguments",
    [("pretrained", pretrain_kd.main, "stage1"), ("finetuned", finetune_rnnt.main, "stage2")],
)
def test_a_finished_run_is_left_alone_and_other_arguments_are_named(
    which, main, arguments, request, capsys
):
    out = request.getfixturevalue(which)
    arguments = [*request.getfixturevalue(arguments), "--out", str(out)]
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    code = main([*arguments, "--lr", "0.5"])
    refused(capsys, code, "--lr was ", "is 0.5", "--overwrite")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_overwrite_takes_nothing_away_before_the_new_run_begins(
    stage2, finetuned, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(finetuned, tmp_path / "old")
    again = [*stage2, "--overwrite", "--lr", "0.004", "--out", str(out)]
    for wrong in (
        ["--data", "no/such"],
        ["--init", "no/run"],
        ["--init", str(out)],
        ["--teacher-transducer", str(out)],
    ):
        assert finetune_rnnt.main([*again, *wrong]) == 2
    for path in finetuned.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert "taught by; choose another --out" in capsys.readouterr().err
    # torchrun tries again: still nothing of the new run is done.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert finetune_rnnt.main(again) == 0
    assert "is finished" not in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in finetuned.iterdir()}
    assert finetune_rnnt.main(again) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "main, arguments, whole",
    [(pretrain_kd.main, "stage1", "pretrained"), (finetune_rnnt.main, "stage2", "finetuned")],
)
def test_an_interrupted_run_goes_on_bit_by_bit(
    main, arguments, whole, request, tmp_path, monkeypatch, capsys
):
    """SIGTERM in the third step; the evaluation of step 2 lies behind it, that of step 4 ahead."""
    whole = request.getfixturevalue(whole)
    arguments = [*request.getfixturevalue(arguments), "--out", str(tmp_path / "out")]
    sum_gradients = training.Run.sum_gradients

    def interrupted(run):
        if run.position["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sum_gradients(run)

    monkeypatch.setattr(training.Run, "sum_gradients", interrupted)
    assert main(arguments) == 143
    monkeypatch.undo()
    assert "stopped by signal 15 at step 3" in capsys.readouterr().out
    with open(tmp_path / "out/log.jsonl", "a") as file:
        file.write('{"step": 4, "lost": 1}\n{"ste')  # what a crash after the last checkpoint leaves
    assert main(arguments) == 0
    assert "continuing" in capsys.readouterr().out
    same_training(whole, tmp_path / "out")
    assert evaluated_steps(tmp_path / "out") == [2, 4]
    assert not any("lost" in row for row in log_of(tmp_path / "out"))


# ---------------------------------------- stage 2


def test_stage_2_inherits_the_encoder_and_freezes_it_at_first(stage2, pretrained, tmp_path, capsys):
    """20 updates: in the first two the encoder keeps the weights of stage 1, bit by bit."""
    first = state_of(pretrained, "best.pt")["model"]
    arguments = [*stage2, "--steps", "20", "--eval-every", "1", "--out", str(tmp_path / "x")]
    moved = []
    sum_gradients = training.Run.sum_gradients

    def observed(run):
        weights = run.student.state_dict()
        moved.append(
            not all(torch.equal(weights[k], v) for k, v in first.items() if "encoder" in k)
        )
        if len(moved) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return sum_gradients(run)

    training.Run.sum_gradients = observed
    try:
        assert finetune_rnnt.main(arguments) == 143
    finally:
        training.Run.sum_gradients = sum_gradients
    # The rehearsal, two frozen updates, the first one that moves; seen at the beginning of each
    # step.
    assert moved == [False, False, False, False, True, True]
    printed = capsys.readouterr().out
    assert "inherited from" in printed and "taught by" in printed


def test_a_finished_recogniser_is_adapted_whole(corpus, stage2, finetuned, tmp_path, capsys):
    """--init with a checkpoint of stage 2 keeps its predictor, joiner, CTC head and tokens, but
    learns how long the new utterances are: decode.py cuts what is much longer."""
    before = state_of(finetuned, "best.pt")
    rates = ["--lr", "1e-9", "--encoder-lr", "1e-9"]
    other = ["--data", str(corpus / "dev"), "--dev", str(corpus / "train")]
    arguments = [*stage2, *other, "--init", str(finetuned), *rates]
    assert finetune_rnnt.main([*arguments, "--out", str(tmp_path / "x")]) == 0
    after = state_of(tmp_path / "x", "best.pt")
    lengths = [u.seconds for u in data.load_utterances(corpus / "dev")]
    assert after["config"].pop("seconds") == pytest.approx(statistics.median(lengths))
    assert before["config"].pop("seconds") != pytest.approx(statistics.median(lengths))
    assert after["tokenizer"] == before["tokenizer"] and after["config"] == before["config"]
    for key, value in before["model"].items():
        assert torch.allclose(value, after["model"][key], atol=1e-6), key
    assert "a finished recogniser" in capsys.readouterr().out


def test_pseudo_labels_are_more_data_and_are_not_evaluated_on(tmp_path, demo_utterances):
    true = []
    pseudo = []
    for i, u in enumerate(demo_utterances):
        row = {"audio_filepath": u.path, "text": u.text}
        if i < 20:
            true.append(json.dumps(row))
        else:
            pseudo.append(json.dumps({**row, "weight": 0.8, "keep": i != 25}))
    (tmp_path / "true.jsonl").write_text("\n".join(true))
    (tmp_path / "pseudo.jsonl").write_text("\n".join(pseudo))
    sources = ["--data", str(tmp_path / "true.jsonl"), str(tmp_path / "pseudo.jsonl")]
    args = finetune_rnnt.parse([*sources, "--init", "none"])
    train, dev = data.load_training_data(args, transcribed=True, quiet=True)
    assert len(dev) == 1 and {u.path for u in dev} < {u.path for u in demo_utterances[:20]}
    assert len(train) + len(dev) == len(demo_utterances) - 1
    assert {u.weight for u in train} == {1.0, 0.8} and dev[0].weight == 1.0


def test_one_batch_can_be_learned_by_heart(demo_utterances):
    """The whole of stage 2, from audio to text: two utterances are transcribed without an
    error."""
    utterances = sorted(demo_utterances, key=lambda u: u.seconds)[20:22]
    tokenizer = data.train_tokenizer([u.text for u in utterances], 64)
    [batch] = data.Loader(utterances, 60, tokenizer=tokenizer).epoch()
    torch.manual_seed(0)
    config = model.Config(
        dim=64,
        layers=2,
        kernel=15,
        channels=16,
        dropout=0,
        vocab_size=tokenizer.get_vocab_size(),
        predictor_dim=64,
        joiner_dim=64,
    )
    student = model.Student(config)
    optimizer = torch.optim.AdamW(student.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20)
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
        labelled = batch.targets, lengths, batch.target_lengths
        predicted = student.predict(batch.targets)
        transducer = model.transducer_loss_from_joiner(student.joiner, hidden, predicted, *labelled)
        ctc = model.ctc_loss(student.ctc(hidden), *labelled).mean()
        loss = transducer + 0.3 * ctc
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        if loss < 0.05:
            break
    student.eval()
    methods = ["transducer", "ctc"]
    for texts in decode.transcribe(student, tokenizer, batch, methods=methods):
        for utterance, text in zip(batch.utterances, texts):
            errors = decode.word_errors(utterance.text, text)
            assert errors.words > 2 and errors.total == 0, (utterance.text, text)


# ---------------------------------------- the other papers


def test_an_ensemble_teaches_on_transcribed_and_other_audio(
    stage2, finetuned, corpus, tmp_path, capsys
):
    """Its tokens are taken over, its soft labels enter the loss, it transcribes what has no
    text."""
    arguments = [
        *stage2,
        "--teacher-transducer",
        str(finetuned),
        str(finetuned / "last.pt"),
        "--essence-top-k",
        "4",
        "--kd-shift",
        "1",
        "--unlabelled",
        str(DEMO / "corpus/dev"),
    ]
    assert finetune_rnnt.main([*arguments, "--out", str(tmp_path / "taught")]) == 0
    printed = capsys.readouterr().out
    ours = model.load_checkpoint(tmp_path / "taught")
    assert ours["tokenizer"] == model.load_checkpoint(finetuned)["tokenizer"]
    assert f"taught by the transducers {finetuned}" in printed
    assert any(row.get("kd", 0) > 0 for row in log_of(tmp_path / "taught"))
    arguments = ["--checkpoint", str(tmp_path / "taught"), "--data", str(corpus / "dev")]
    assert decode.main([*arguments, "--device", "cpu"]) == 0


def test_kd_weight_0_is_training_without_a_teacher(stage2, finetuned, tmp_path):
    taught = [*stage2, "--teacher-transducer", str(finetuned), "--kd-weight", "0"]
    assert finetune_rnnt.main([*taught, "--out", str(tmp_path / "taught")]) == 0
    assert finetune_rnnt.main([*stage2, "--out", str(tmp_path / "alone")]) == 0
    a = state_of(tmp_path / "taught")["raw_model"]
    b = state_of(tmp_path / "alone")["raw_model"]
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_transducer_teachers_that_do_not_fit_are_one_line(
    stage2, finetuned, pretrained, tmp_path, capsys
):
    other = state_of(finetuned, "best.pt")
    other["tokenizer"] = data.train_tokenizer(["quite other words"] * 200, 40).to_str()
    torch.save(other, tmp_path / "other.pt")
    capsys.readouterr()
    taught = ["--teacher-transducer", str(finetuned)]
    for more, words in (
        (["--essence-top-k", "3"], ["--teacher-transducer"]),
        (["--unlabelled", "y"], ["--teacher-transducer"]),
        (["--teacher-transducer", str(pretrained)], ["stage 1"]),
        ([*taught, str(tmp_path / "other.pt")], ["another tokenizer"]),
        ([*taught, "--init", str(tmp_path / "other.pt")], ["another tokenizer"]),
    ):
        code = finetune_rnnt.main([*stage2, *more, "--out", str(tmp_path / "x")])
        refused(capsys, code, *words)


# ---------------------------------------- mistakes


def test_mistakes_are_one_line(stage1, stage2, pretrained, tmp_path, capsys):
    capsys.readouterr()
    out = ["--out", str(tmp_path / "x")]
    for main, arguments, words in [
        (pretrain_kd.main, [*stage1, "--data", "no/such/data", *out], ["no/such/data"]),
        (pretrain_kd.main, [*stage1, "--teachers", "no/teacher", *out], ["no/teacher"]),
        (pretrain_kd.main, [*stage1, "--weights", "1", "2", "3", *out], ["--weights"]),
        (pretrain_kd.main, [*stage1, "--device", "nonsense", *out], ["--device nonsense"]),
        (pretrain_kd.main, [*stage1, "--setps", "3", *out], ["--setps"]),
        (finetune_rnnt.main, [*stage2, "--init", "no/run", *out], ["no/run"]),
        (finetune_rnnt.main, [*stage2, "--size", "small", *out], ["--size", "--init none"]),
        (finetune_rnnt.main, [*stage2, "--steps", "0", *out], ["--steps", "above 0"]),
        (finetune_rnnt.main, [*stage2, "--accumulate", "0", *out], ["--accumulate", "above 0"]),
        (finetune_rnnt.main, [*stage2, "--dropout", "1", *out], ["--dropout", "below 1"]),
        (decode.main, ["--checkpoint", "no/run"], ["no/run"]),
        (decode.main, ["--checkpoint", str(pretrained)], ["stage 1", "finetune_rnnt.py --init"]),
    ]:
        refused(capsys, main(arguments), *words)


def write_bad_data(corpus, folder):
    """Manifests of at most five lines that cannot be used, beside valid audio of every kind. ->
    their paths"""
    folder.mkdir()
    long = [u for u in data.load_utterances(corpus / "train", True) if u.seconds > 1.5]
    text = long[0].text
    wave = data.load_audio(long[0].path).numpy()
    stereo = torch.tensor(wave).repeat(2, 1).T.numpy()
    for name, subtype, rate, samples in [
        ("loud.wav", "FLOAT", 16_000, 3e4 * wave),
        ("nan.wav", "FLOAT", 16_000, wave + float("nan")),
        ("silent.wav", "PCM_16", 16_000, 0 * wave),
        ("odd.wav", "PCM_16", 16_001, wave),
        ("short.wav", "PCM_16", 16_000, wave[:800]),
        ("cut.flac", "PCM_16", 16_000, wave),
        ("24bit.wav", "PCM_24", 16_000, wave),
        ("8bit.wav", "PCM_U8", 16_000, wave),
        ("32bit.wav", "PCM_32", 48_000, wave.repeat(3)),
        ("float.wav", "FLOAT", 44_100, wave.repeat(3)),
        ("stereo.wav", "PCM_16", 22_050, stereo),
    ]:
        soundfile.write(folder / name, samples, rate, subtype=subtype)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:-4000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "letter.wav").write_text("not a sound")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")

    def row(name, text=text, **more):
        return json.dumps({"audio_filepath": str(name), "text": text, **more})

    not_audio = ["empty.wav", "letter.wav", "folder.wav", "pipe.wav", "gone.wav"]
    manifests = {
        "audio.jsonl": [row(name) for name in (*not_audio, "float.wav")],
        "more.jsonl": [
            row("odd.wav"),
            row("short.wav"),
            row("nan.wav"),
            row("loud.wav"),
            row("cut.flac"),
            row("float.wav"),
        ],
        "lines.jsonl": [
            "{broken",
            json.dumps({"text": "no path"}),
            row("24bit.wav", 5),
            "[" * 9999,
            row("\ud800.wav"),
            row("float.wav"),
        ],
        "texts.jsonl": [
            row("24bit.wav", ""),
            row("8bit.wav", " ?! "),
            row("silent.wav"),
            row("stereo.wav", 99 * text),
        ],
        "valid.jsonl": [
            row("24bit.wav"),
            row(folder / "8bit.wav"),
            row("32bit.wav", "我们 ЖЖЖ"),
            row("float.wav"),
        ],
    }
    for name, lines in manifests.items():
        content = "\ufeff" + "\r\n".join(lines) + "\r\n"
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    return [str(folder / name) for name in manifests]


NOT_SCANNED = [
    "empty.wav: the file is empty",
    "letter.wav: not readable as audio",
    "folder.wav: there is no such file",
    "pipe.wav: there is no such file",
    "gone.wav: there is no such file",
    "odd.wav: not readable as audio (a sample rate of 16001 Hz",
    "short.wav: 0.05 s long",
    "lines.jsonl:1: ",
    "lines.jsonl:2: ",
    "lines.jsonl:3: ",
    "lines.jsonl:4: ",
    "lines.jsonl:5: ",
]
NOT_READ = [f"{name}: not readable as audio" for name in ("nan.wav", "loud.wav", "cut.flac")]
NO_TEXT = ["24bit.wav: no transcript", "8bit.wav: no transcript"]
SILENT = ["silent.wav: silence"]
TOO_LONG = ["stereo.wav: its transcript"]


@pytest.fixture(scope="module")
def bad_sources(corpus, tmp_path_factory):
    return write_bad_data(corpus, tmp_path_factory.mktemp("bad") / "data")


def names_each_once(capfd, expected):
    """The "skipped:" lines are one for each of `expected`. -> stdout"""
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if "skipped: " in line]
    for words in expected:
        assert sum(words in line for line in lines) == 1, (words, err)
    assert len(lines) == len(expected) and "Traceback" not in err, err
    return out


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_bad_data_is_named_and_skipped_in_training(
    stage, request, bad_sources, corpus, tmp_path, capfd
):
    """Each is one line that names it and says why, the valid utterances are used as if they were
    alone; so for what is evaluated on, too."""
    main = pretrain_kd.main if stage == "stage1" else finetune_rnnt.main
    expected = [*NOT_SCANNED, *NOT_READ, *SILENT, "dev.wav: not readable as audio"]
    unusable = 5
    if stage == "stage2":
        expected += NO_TEXT + TOO_LONG
        unusable = 6
    shutil.copy(Path(bad_sources[0]).parent / "nan.wav", tmp_path / "dev.wav")
    row = {"audio_filepath": str(tmp_path / "dev.wav"), "text": "A TEXT"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    sources = ["--data", *bad_sources, "--dev", str(corpus / "dev"), str(tmp_path / "dev.jsonl")]
    arguments = [*request.getfixturevalue(stage), *sources, "--steps", "12"]
    capfd.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = names_each_once(capfd, expected)
    assert f"; {unusable} files could not be used" in printed


def test_bad_data_is_named_and_skipped_in_decoding(bad_sources, finetuned, tmp_path, capfd):
    scores = tmp_path / "scores.jsonl"
    arguments = [
        "--checkpoint",
        str(finetuned),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output",
        str(scores),
    ]
    capfd.readouterr()
    assert decode.main([*arguments, "--data", bad_sources[-1]]) == 0
    names_each_once(capfd, [])
    alone = [json.loads(line) for line in scores.read_text().splitlines()]
    assert decode.main([*arguments, "--data", *bad_sources]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    for words in (*NOT_SCANNED, *NOT_READ):
        assert words in err.replace("\r", "\n"), words
    among = [json.loads(line) for line in scores.read_text().splitlines()]
    hypotheses = [row["hypothesis"] for row in among]
    assert len(alone) == 4 and all(row["hypothesis"] in hypotheses for row in alone)


@pytest.mark.parametrize("script", ["stage1", "stage2", "decode"])
def test_a_source_of_which_nothing_is_left_is_one_line(
    script, stage1, stage2, finetuned, tmp_path, capsys
):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x.wav").write_bytes(b"")
    scripts = {
        "stage1": (pretrain_kd.main, [*stage1, "--out", str(tmp_path / "x")]),
        "stage2": (finetune_rnnt.main, [*stage2, "--out", str(tmp_path / "x")]),
        "decode": (decode.main, ["--checkpoint", str(finetuned), "--device", "cpu"]),
    }
    main, arguments = scripts[script]
    capsys.readouterr()
    code = main([*arguments, "--data", str(tmp_path / "source")])
    err = capsys.readouterr().err
    assert code == 2 and "source/x.wav" in err
    assert err.count(": error: ") == 1 and "Traceback" not in err


def test_a_full_disk_is_one_line_when_decoding(finetuned, corpus, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        code = decode.main(
            [
                "--data",
                str(corpus / "dev"),
                "--checkpoint",
                str(finetuned),
                "--device",
                "cpu",
                "--workers",
                "0",
                "--output",
                str(tmp_path / "scores.jsonl"),
            ]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 2 and err.count(": error: ") == 1 and "Traceback" not in err


def cut_in_half(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def one_byte_changed(content):
    return content[:5000] + b"?" + content[5001:]


@pytest.mark.parametrize("damage", [cut_in_half, emptied, one_byte_changed])
def test_a_damaged_checkpoint_is_one_line_in_all_three_scripts(
    damage, stage1, stage2, pretrained, finetuned, tmp_path, capsys
):
    capsys.readouterr()
    for main, arguments, source in (
        (pretrain_kd.main, stage1, pretrained),
        (finetune_rnnt.main, stage2, finetuned),
    ):
        out = tmp_path / source.name
        out.mkdir()
        (out / "last.pt").write_bytes(damage((source / "last.pt").read_bytes()))
        code = main([*arguments, "--out", str(out)])
        refused(capsys, code, str(out / "last.pt"), "damaged")
    best = tmp_path / "best.pt"
    best.write_bytes(damage((finetuned / "best.pt").read_bytes()))
    refused(
        capsys, decode.main(["--checkpoint", str(best), "--device", "cpu"]), "best.pt", "damaged"
    )
    code = finetune_rnnt.main([*stage2, "--init", str(best), "--out", str(tmp_path / "y")])
    refused(capsys, code, "best.pt")


# ---------------------------------------- the repository

SCRIPTS = [
    "pretrain_kd",
    "finetune_rnnt",
    "decode",
    "methods.pseudo_label",
    "tools.librispeech",
    "tools.plot",
    "tools.results",
    "tools.benchmark",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_has_a_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("script", ["pretrain_kd.py", "finetune_rnnt.py", "decode.py"])
def test_ctrl_c_while_libraries_load_is_no_traceback(script):
    process = subprocess.Popen([sys.executable, script], cwd=ROOT, stderr=subprocess.PIPE)
    # As soon as the handler is there: bit 2 of the mask of caught signals.
    status = Path(f"/proc/{process.pid}/status")
    caught = "SigCgt:\t0"
    while process.poll() is None and not int(caught.split()[1], 16) & 2:
        [caught] = [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].decode()
    assert process.returncode == 130 and error == "interrupted\n", error


def test_imports_run_one_way():
    """model and data know nobody above them, nobody knows a training stage."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("methods/*.py"), *ROOT.glob("tools/*.py")]:
        imported = re.findall(r"^\s*(?:import|from) ([\w.]+)", path.read_text(), re.MULTILINE)
        if path.name != "benchmark.py":
            assert not {"pretrain_kd", "finetune_rnnt"} & set(imported), path
        if path.name in ("model.py", "data.py"):
            assert not {"decode", "methods", "tools.training"} & set(imported), path


def test_the_readme_names_functions_that_exist():
    """`file.function` or `folder/file.function` in backticks."""
    names = re.findall(r"`((?:\w+/)?\w+)\.(\w+)`", (ROOT / "README.md").read_text())
    checked = 0
    for file, name in names:
        path = ROOT / f"{file}.py"
        if path.exists() and name != "py":
            assert re.search(rf"(def|class) {name}\b", path.read_text()), f"{file}.{name}"
            checked += 1
    assert checked >= 6


# ---------------------------------------- changes of one's own


OWN_TEACHER = """
import torch

class MyTeacher(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({seed})
        self.layer = torch.nn.Linear(320, 8)

    def forward(self, waveforms, lengths):
        frames = waveforms[:, :waveforms.shape[1] // 320 * 320].unflatten(1, (-1, 320))
        return self.layer(frames), lengths // 320
"""


def test_a_teacher_that_changed_is_named_and_other_code_too(corpus, tmp_path, monkeypatch, capsys):
    """An interrupted run goes on with the same teacher and the same student, or not at all."""
    teacher = tmp_path / "mine.py"
    teacher.write_text(OWN_TEACHER.format(seed=0))
    sources = ["--data", str(corpus / "train"), "--dev", str(corpus / "dev")]
    arguments = [
        *sources,
        "--teachers",
        f"{teacher}:MyTeacher",
        *TINY,
        "--out",
        str(tmp_path / "x"),
    ]
    sum_gradients = training.Run.sum_gradients

    def interrupted(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return sum_gradients(run)

    monkeypatch.setattr(training.Run, "sum_gradients", interrupted)
    assert pretrain_kd.main(arguments) == 143
    monkeypatch.undo()
    capsys.readouterr()
    teacher.write_text(OWN_TEACHER.format(seed=1))
    refused(capsys, pretrain_kd.main(arguments), "gives other embeddings than when this run began")
    teacher.write_text(OWN_TEACHER.format(seed=0))
    monkeypatch.setattr(model, "projection_head", two_layers)
    refused(capsys, pretrain_kd.main(arguments), "holds a run of another model")
    monkeypatch.undo()
    assert "edited" not in capsys.readouterr().out
    # What still fits an edited code goes on, but not in silence.
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/new.py").write_text("")
    monkeypatch.setattr(training, "__file__", str(tmp_path / "tools/new.py"))
    assert pretrain_kd.main(arguments) == 0
    assert "the code was edited" in capsys.readouterr().out


def two_layers(config, target_dim):
    return torch.nn.Sequential(torch.nn.Linear(config.dim, 16), torch.nn.Linear(16, target_dim))
