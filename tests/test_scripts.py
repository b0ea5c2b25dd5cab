"""The three scripts from end to end: tiny budgets, a few utterances of the demo, two tiny random teachers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import decode
import finetune_rnnt
import model
import pretrain_kd
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


@pytest.mark.parametrize(
    "stage, main, arguments", [(pretrain_kd, pretrain_kd.main, "stage1"), (finetune_rnnt, finetune_rnnt.main, "stage2")]
)
def test_an_interrupted_run_goes_on_bit_by_bit(stage, main, arguments, request, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of the third step; the evaluation of step 2 lies behind it, that of step 4 ahead."""
    whole = request.getfixturevalue("pretrained" if stage is pretrain_kd else "finetuned")
    arguments = [*request.getfixturevalue(arguments), "--out", str(tmp_path / "out")]
    name = "stage1_loss" if stage is pretrain_kd else "stage2_loss"
    loss, calls = getattr(stage, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)
    monkeypatch.setattr(stage, name, interrupted)
    assert main(arguments) == 143
    assert "stopped by signal 15 at step 3" in capsys.readouterr().out and len(calls) == 3
    monkeypatch.setattr(stage, name, loss)
    with open(tmp_path / "out/log.jsonl", "a") as file:
        file.write('{"step": 4, "lost": 1}\n{"ste')  # what a crash after the last checkpoint leaves
    assert main(arguments) == 0
    assert "continuing" in capsys.readouterr().out
    same_training(whole, tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if any(k.startswith("dev ") for k in row)] == [2, 4] and not any(
        "lost" in row for row in log
    )


def test_stage_2_inherits_the_encoder(stage2, pretrained, tmp_path, monkeypatch, capsys):
    seen = {}

    def look(run, student, *rest):
        seen.update({k: v.clone() for k, v in student.encoder.state_dict().items()})
        return 0
    monkeypatch.setattr(finetune_rnnt.running, "train", look)
    assert finetune_rnnt.main([*stage2, "--out", str(tmp_path / "x")]) == 0
    first = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    assert seen and all(torch.equal(first["encoder." + k], v) for k, v in seen.items())
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
    import soundfile
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
    ]:
        refused(capsys, main(arguments), *words)


def test_a_budget_of_nothing_is_one_line(stage2, tmp_path, capsys):
    capsys.readouterr()
    for option in ("--steps", "--minutes", "--accumulate"):
        refused(capsys, finetune_rnnt.main([*stage2, option, "0", "--out", str(tmp_path / option)]), option)


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


@pytest.mark.parametrize("budget", [["--steps", "3"], ["--minutes", "0.03"]])
def test_two_processes_end_together_with_equal_weights(budget, stage2, tmp_path):
    """torchrun with gloo: rank 0 writes, both follow one clock, and neither waits for the other at the end."""
    arguments = stage2[: stage2.index("--steps")] + ["--batch-seconds", "12", "--workers", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "finetune_rnnt.py")]
    done = subprocess.run([*command, *arguments, *budget, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: python decode.py") == 1 and done.stdout.count("training on") == 1
    assert torch.load(tmp_path / "two/last.pt", weights_only=True)["progress"]["settings"]["processes"] == "2"


def test_gradients_of_two_processes_are_those_of_one_large_batch(tmp_path):
    """average_gradients: sums over unequal parts, divided by the global count, against the plain mean over all."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, run
rank, world = run.start_processes(torch.device("cpu"))
x = torch.arange(15.0).reshape(5, 3); w = torch.ones(3, requires_grad=True)
mine = x[:4] if rank == 0 else x[4:]
((mine @ w) ** 2).sum().backward()
run.average_gradients([w], torch.tensor(float(len(mine))))
v = torch.ones(3, requires_grad=True); ((x @ v) ** 2).mean().backward()
torch.testing.assert_close(w.grad, v.grad)
torch.distributed.destroy_process_group()""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


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
