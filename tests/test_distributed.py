"""Several processes on this machine, with gloo: as one, together to the end, and again after one
has died."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pretrain_kd
from conftest import DEMO, ROOT
from methods import interaed
from test_faults import child, few_utterances, finish, log_of, same, start, state_of, tiny_run
from test_interaed import save_bert
from tools import training
from tools.command_line import UserError, one_line_errors
from tools.machine import start_processes


def together(function, *args, world=2, **environment):
    """function(*args) on `world` ranks, as torchrun would call it -> [(exit code, what it
    printed)]"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        ranks.append(start(function, *args, environment={**own, **shared, **environment}))
    return [finish(rank) for rank in ranks]


# ---------------------------------------- as one


@dataclass
class ToyBatch:
    """Eight rows of numbers, or a part of them, in the form that a training loop wants."""

    x: torch.Tensor
    seconds: float = 1.0
    failed: list = field(default_factory=list)

    @property
    def utterances(self):
        return [argparse.Namespace(id=str(i)) for i in range(len(self.x))]

    def to(self, device):
        return self


class ToyLoader:
    """Batches of eight rows, of which each process, or each of `accumulate` turns, gets 3 or 5."""

    def __init__(self, accumulate, rank, world):
        self.accumulate = accumulate
        self.rank = rank
        self.world = world

    def epoch(self, number, skip):
        parts = [slice(0, 8)]
        if self.world * self.accumulate > 1:
            parts = [slice(0, 3), slice(3, 8)]
        for k in range(skip, 5 * self.accumulate):
            generator = torch.Generator().manual_seed(1000 * number + k // self.accumulate)
            x = torch.randn(8, 6, generator=generator)
            yield ToyBatch(x[parts[k % self.accumulate * self.world + self.rank]])

    def worst(self):
        return []


@one_line_errors
def toy_training(argv):
    """The loop of the stages around a small regression, written as the docstring of training.py
    has it."""
    parser = argparse.ArgumentParser()
    training.add_training_options(parser, "exp", steps=60, dropout=0.0, spec_augment=0)
    args = parser.parse_args(argv)
    run = training.Run(args)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6)]
    student = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loader = ToyLoader(args.accumulate, run.rank, run.world)
    with run.start(student, optimizer, {}, "row"):
        for step, batches in run.steps(loader):
            training.set_learning_rates(optimizer, run.progress)
            optimizer.zero_grad()
            for batch in batches:
                loss = (student(batch.x) - batch.x.sin()).square().mean(1).sum()
                loss.backward()
                run.add(batch, count=len(batch.x), loss=loss)
            if run.sum_gradients():
                optimizer.step()
            run.average_weights()
            run.log()
            if run.evaluation_is_due():
                run.keep_best("dev x", {"dev x": 0.0})
    return run.finish("nothing")


@pytest.mark.parametrize("how", ["two processes", "accumulated"])
def test_parts_of_a_batch_give_the_curve_of_the_whole(tmp_path, how):
    """Parts of 3 and 5 rows, on two processes or one after the other: loss, gradient norms and
    weights."""
    common = ["--device", "cpu", "--eval-every", "20", "--out"]
    code, printed = child(toy_training, [*common, str(tmp_path / "whole")])
    assert code == 0, printed
    parts = [*common, str(tmp_path / "parts")]
    if how == "two processes":
        done = together(toy_training, parts)
    else:
        done = [child(toy_training, [*parts, "--accumulate", "2"])]
    assert [code for code, _ in done] == [0] * len(done), done
    a = log_of(tmp_path / "whole")
    b = log_of(tmp_path / "parts")
    assert [row["step"] for row in a] == [row["step"] for row in b] and len(a) > 6
    worst = 0
    for x, y in zip(a, b):
        worst = max(worst, *(abs(x[key] - y[key]) for key in x))
    losses = [row["loss"] for row in a if "loss" in row]
    print(f"{how}: the curves differ by {worst:.1e}, from {losses[0]:.3f} to {losses[-1]:.3f}")
    assert worst < 1e-4 and losses[-1] < 0.3 * losses[0]
    x = state_of(tmp_path / "whole")["raw_model"]
    y = state_of(tmp_path / "parts")["raw_model"]
    assert all(torch.allclose(x[key], y[key], atol=1e-4) for key in x)


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    """The real script, with dropout, SpecAugment and speed perturbation, on an even number of
    batches."""
    eight = ["--data", str(few_utterances(tmp_path, 10))]  # two are the development set
    code, printed = child(tiny_run, tmp_path / "one", "--accumulate", "2", *eight)
    assert code == 0, printed
    done = together(tiny_run, tmp_path / "two", *eight)
    assert [code for code, _ in done] == [0, 0], done
    assert sum("24 steps in" in printed for _, printed in done) == 1
    assert all(printed.count("step 3: ") < 2 for _, printed in done)
    worst = 0
    for x, y in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        worst = max(worst, *(abs(x[key] - y[key]) / max(1, abs(x[key])) for key in x))
    print(f"they differ by {worst:.1e}")
    assert worst < 1e-4


# ---------------------------------------- to the end


def few(out, count):
    return tiny_run(out, "--data", str(few_utterances(Path(out).parent, count)), "--steps", "7")


def test_uneven_batches_never_hang(tmp_path):
    """Three processes, batches that three does not divide, fewer utterances than processes."""
    for count in (8, 4):  # two of them are the development set
        few_utterances(tmp_path, count)
        done = together(few, tmp_path / str(count), count, world=3)
        assert [code for code, _ in done] == [0, 0, 0], done


def fails_on_rank_1(out, how):
    def fail(call, losses):
        if dist.get_rank() == 1 and call == 6:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("its own message: a.wav is broken, mend it")
        return losses

    return tiny_run(out, spoil=fail)


@pytest.mark.parametrize("how", ["killed", "its own message"])
def test_a_failing_rank_ends_all_with_its_own_message(tmp_path, how):
    few_utterances(tmp_path)
    began = time.monotonic()
    (first, printed), (second, other) = together(fails_on_rank_1, tmp_path / "out", how)
    assert time.monotonic() - began < 30
    assert first == 2 and "another process of this run has ended" in printed
    assert "Traceback" not in printed + other
    if how == "killed":
        assert second == -signal.SIGKILL
    else:
        assert second == 2 and "its own message: a.wav" in other
        return
    for name in ("out", "undisturbed"):
        done = together(tiny_run, tmp_path / name)
        assert [code for code, _ in done] == [0, 0]
    same(tmp_path / "out", tmp_path / "undisturbed")


def bad_number_on_rank_1(out):
    def spoil(call, losses):
        if dist.get_rank() == 1 and call in (5, 6):
            return losses * float("nan")
        return losses

    return tiny_run(out, spoil=spoil)


def test_a_bad_number_on_one_process_is_skipped_by_all_and_only_its_utterances_named(tmp_path):
    done = together(bad_number_on_rank_1, tmp_path / "out")
    assert [code for code, _ in done] == [0, 0], done
    [first, second] = [row["skipped"] for row in log_of(tmp_path / "out") if "skipped" in row]
    assert first and second
    assert done[0][1].count("update skipped") == 2 and "update skipped" not in done[1][1]
    last = state_of(tmp_path / "out")
    assert last["position"]["skipped"] == 2
    assert all(value.isfinite().all() for value in last["raw_model"].values())


def a_folder_for_each(out):
    return tiny_run(Path(out) / os.environ["RANK"] / "run")


def test_machines_that_do_not_share_the_folder_are_named(tmp_path):
    """Rank 0 finds a run in its folder, rank 1 none."""
    for rank in "01":
        (tmp_path / rank).mkdir()
        few_utterances(tmp_path / rank)
        few_utterances(tmp_path / rank, 2)
    assert child(tiny_run, tmp_path / "0/run")[0] == 0
    done = together(a_folder_for_each, tmp_path)
    assert all(code == 2 and "not the same folder" in printed for code, printed in done), done


def a_cache_for_each(out, teacher):
    return pretrain_kd.main(
        [
            "--data",
            str(out / "few-5.jsonl"),
            "--teachers",
            teacher,
            "--speeds",
            "1",
            "--steps",
            "1",
            "--cache",
            str(out / os.environ["RANK"]),
            "--out",
            str(out / "run"),
            "--device",
            "cpu",
        ]
    )


def test_machines_that_do_not_share_the_cache_are_named(tmp_path, teacher_folders):
    few_utterances(tmp_path, 5)
    done = together(a_cache_for_each, tmp_path, teacher_folders["hubert"])
    for code, printed in done:
        assert code == 2 and "is not one folder for all processes" in printed, done


def label_with_bert(folder, name):
    rank, world = start_processes(torch.device("cpu"))
    texts = [None, *"the cat sat on a mat".split(), "a cat"]
    labels = interaed.label_texts(name, texts, folder, "cpu", rank, world)
    dist.barrier()
    again = interaed.label_texts("a name that is not asked again", [], folder, "cpu", rank, world)
    assert again == {}
    kept = interaed.label_texts(name, texts, folder, "cpu", rank, world)
    tokenizer, bert = interaed.load_bert(name, "cpu")
    assert set(labels) == set(kept) == set(texts[1:])
    for text in labels:
        by_hand = interaed.soft_labels(tokenizer, bert, text)
        for a, b, c in zip(labels[text], kept[text], by_hand):
            assert torch.equal(a, b) and torch.allclose(a, c)
    dist.destroy_process_group()


def test_two_processes_share_the_work_of_bert(tmp_path):
    done = together(label_with_bert, tmp_path, save_bert(tmp_path / "bert"))
    assert [code for code, _ in done] == [0, 0], done
    assert [printed.count("BERT: ") > 0 for _, printed in done] == [True, False]


# ---------------------------------------- torchrun itself

KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import finetune_rnnt, model
ctc_loss = model.ctc_loss
calls = []
def dying(*args):
    calls.append(1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return ctc_loss(*args)
model.ctc_loss = dying
sys.exit(finetune_rnnt.main())
"""


def test_torchrun_restarts_the_real_script_where_it_was(tmp_path):
    """finetune_rnnt.py on two processes; rank 1 is killed once. In spite of --overwrite the run
    goes on from its last checkpoint."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.format(root=str(ROOT)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
        str(script),
        "--init",
        "none",
        "--data",
        str(DEMO / "corpus/dev"),
        "--device",
        "cpu",
        "--batch-seconds",
        "12",
        "--steps",
        "5",
        "--eval-every",
        "2",
        "--overwrite",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing") == 1 and "at step 2" in done.stdout
    assert done.stdout.count("next: ") == 1
    steps = [row["step"] for row in log_of(tmp_path / "out")]
    assert steps == sorted(steps)
    last = state_of(tmp_path / "out")["position"]
    assert last["finished"] and last["step"] == 5
    assert last["settings"]["the number of processes"] == "2"
