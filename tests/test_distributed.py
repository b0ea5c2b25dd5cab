"""Several processes on this machine, with gloo: as one, together to the end, and again after one has died."""
import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import bert
import data
import model
import pretrain_kd
import run
import training
from conftest import DEMO, ROOT
from test_bert import save_bert
from test_faults import child, finish, log_of, same, start, tiny_run


def together(function, *args, world=2, **environment):
    """function(*args) on `world` ranks, as torchrun would call it -> [(exit code, what it printed)]"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [start(function, *args, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), **environment}) for rank in range(world)]
    return [finish(rank) for rank in ranks]


# ---------------------------------------------------------------------------- as one

def halves(out, accumulate):
    """A run on batches of eight utterances of which each process, or each of `accumulate` turns, gets a part."""
    def compute_loss(batch):
        hidden = student(batch.x)
        loss = (hidden - batch.y).square().mean(1)
        return loss.sum(), torch.tensor(len(batch.ids)), {"mean": loss.mean()}

    class Loader:
        batch_seconds = 8.0

        def epoch(self, number, skip):
            for k in range(skip, 5 * accumulate):
                g = torch.Generator().manual_seed(1000 * number + k // accumulate)
                x, part = torch.randn(8, 6, generator=g), k % accumulate * world + rank
                mine = slice(*[(0, 8), (0, 3), (3, 8)][0 if world * accumulate == 1 else 1 + part])  # uneven, 3 and 5
                yield argparse.Namespace(x=x[mine], y=x.sin()[mine], ids=["id"] * len(x[mine]), seconds=1.0, failed=(),
                                         to=lambda device, k=mine, x=x: argparse.Namespace(x=x[k], y=x.sin()[k], ids=x[k]))

        def worst(self):
            return []
    args = argparse.Namespace(steps=60, minutes=None, batch_seconds=8.0, accumulate=accumulate, warmup=0.1, clip=1.0,
                              eval_every=20, seed=0, out=out, overwrite=False)
    rank, world = run.start_processes(torch.device("cpu"))
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6))
    this = run.Run(args, rank, world, model.load_checkpoint, model.save_checkpoint)
    return training.Training(this, student, Loader(), compute_loss, lambda student: ({"dev x": 0.0}, 0.0),
                             torch.optim.AdamW(student.parameters(), lr=1e-2), {}, torch.device("cpu"), torch.float32, rank,
                             world).loop()


@pytest.mark.parametrize("how", ["two processes", "accumulated"])
def test_parts_of_a_batch_give_the_curve_of_the_whole(tmp_path, how):
    """Parts of 3 and 5 utterances, on two processes or one after the other: loss curve, gradient norms and weights."""
    [(code, said)] = [child(halves, tmp_path / "whole", 1)]
    assert code == 0, said
    done = together(halves, tmp_path / "parts", 1) if how == "two processes" else [child(halves, tmp_path / "parts", 2)]
    assert [code for code, _ in done] == [0] * len(done), done
    a, b = (log_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["step"] for row in a] == [row["step"] for row in b] and len(a) > 6
    worst = max(abs(x[key] - y[key]) for x, y in zip(a, b) for key in x)
    print(f"{how}: the curves differ by {worst:.1e}, from {a[0]['loss']:.3f} to {a[-2]['loss']:.3f}")
    assert worst < 1e-4 and a[-2]["loss"] < 0.3 * a[0]["loss"]
    x, y = (torch.load(tmp_path / name / "last.pt", weights_only=True)["raw_model"] for name in ("whole", "parts"))
    assert all(torch.allclose(x[key], y[key], atol=1e-4) for key in x)


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    """The real thing, dropout, SpecAugment and an odd number of batches included: the same batches, the same weights."""
    code, said = child(accumulating, tmp_path / "one")
    assert code == 0, said
    done = together(tiny_run, tmp_path / "two")
    assert [code for code, _ in done] == [0, 0], done
    assert sum("24 steps in" in said for _, said in done) == 1 and all(said.count("step 3: ") < 2 for _, said in done)
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    worst = max(abs(x[key] - y[key]) / max(1, abs(x[key])) for x, y in zip(one, two, strict=True) for key in x)
    print(f"they differ by {worst:.1e}")
    assert worst < 1e-4


def accumulating(out):
    return tiny_run(out, accumulate=2)


# ---------------------------------------------------------------------------- to the end

def test_uneven_batches_never_hang(tmp_path):
    """Three processes, batches that three does not divide, fewer utterances than processes."""
    for utterances in (8, 2):
        done = together(few, tmp_path / str(utterances), utterances, world=3)
        assert [code for code, _ in done] == [0, 0, 0], done


def test_two_processes_follow_one_clock(tmp_path):
    done = together(by_the_clock, tmp_path / "out")
    assert [code for code, _ in done] == [0, 0] and sum("steps in" in said for _, said in done) == 1, done
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["progress"]["seconds"] >= 0.6


def by_the_clock(out):
    return tiny_run(out, minutes=0.01)


def few(out, utterances):
    return tiny_run(out, utterances=utterances, steps=7)


def fails_on_rank_1(out, how):
    def fail(calls, batch, loss):
        if dist.get_rank() == 1 and len(calls) == 6:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise run.UserError("its own message: a.wav is broken, mend it")
        return loss
    return tiny_run(out, fail)


@pytest.mark.parametrize("how", ["killed", "its own message"])
def test_a_failing_rank_ends_all_with_its_own_message(tmp_path, how):
    began = time.monotonic()
    (first, said), (second, other) = together(fails_on_rank_1, tmp_path / "out", how)
    assert time.monotonic() - began < 30
    assert first == 2 and "another process of this run has ended" in said and "Traceback" not in said
    assert (second == -9 or second == 2 and "its own message: a.wav" in other) and "Traceback" not in other
    if how == "killed":
        again = [together(tiny_run, tmp_path / name) for name in ("out", "undisturbed")]
        assert [code for done in again for code, _ in done] == [0] * 4
        same(tmp_path / "out", tmp_path / "undisturbed")


def bad_number_on_rank_1(out):
    def spoil(calls, batch, loss):
        return loss * float("nan") if dist.get_rank() == 1 and len(calls) in (5, 6) else loss
    return tiny_run(out, spoil)


def test_a_bad_number_on_one_process_is_skipped_by_all_and_only_its_utterances_named(tmp_path):
    done = together(bad_number_on_rank_1, tmp_path / "out")
    assert [code for code, _ in done] == [0, 0], done
    [first, second] = [row["skipped"] for row in log_of(tmp_path / "out") if "skipped" in row]
    assert first and second and done[0][1].count("update skipped") == 2 and "update skipped" not in done[1][1]
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in last["raw_model"].values()) and last["progress"]["skipped"] == 2


def not_the_same_folder(out):
    return tiny_run(out / os.environ["RANK"])


def test_machines_that_do_not_share_the_folder_are_told(tmp_path):
    together(few, tmp_path / "0", 8)
    done = together(not_the_same_folder, tmp_path)
    assert all(code == 2 for code, _ in done), done


def a_cache_for_each(out, teacher):
    return pretrain_kd.main(["--data", str(out / "few.jsonl"), "--teachers", teacher, "--speeds", "1", "--steps", "1",
                             "--cache", str(out / os.environ["RANK"]), "--out", str(out / "run")])


def test_machines_that_do_not_share_the_cache_are_told(tmp_path, teacher_folders):
    rows = [json.dumps({"audio_filepath": u.path}) for u in data.load_utterances(DEMO / "corpus/dev")[:5]]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    done = together(a_cache_for_each, tmp_path, teacher_folders["hubert"])
    assert all(code == 2 and "is not one folder for all processes" in said for code, said in done), done


def labels_of_bert(folder, name):
    rank, world = run.start_processes(torch.device("cpu"))
    texts = [None, *"the cat sat on a mat".split(), "a cat"]
    labels = bert.label_texts(name, texts, folder, "cpu", rank, world)
    dist.barrier()
    by_hand, bert.soft_labels = bert.soft_labels, None                                         # kept: never again
    again = bert.label_texts(name, texts, folder, "cpu", rank, world)
    one, lm = bert.load_bert(name, "cpu")
    assert set(labels) == set(again) == set(texts[1:])
    for text in labels:
        for a, b, c in zip(labels[text], again[text], by_hand(one, lm, text)):
            assert torch.equal(a, b) and torch.allclose(a, c)
    dist.destroy_process_group()


def test_two_processes_share_the_work_of_bert(tmp_path):
    done = together(labels_of_bert, tmp_path, save_bert(tmp_path / "bert"))
    assert [code for code, _ in done] == [0, 0], done
    assert [said.count("BERT: ") > 0 for _, said in done] == [True, False]


def test_gradients_of_two_processes_are_those_of_one_large_batch():
    """average_gradients: sums over unequal parts, divided by the global count, against the plain mean over all."""
    assert [code for code, _ in together(unequal_parts)] == [0, 0]


def unequal_parts():
    rank, _ = run.start_processes(torch.device("cpu"))
    x, w = torch.arange(15.0).reshape(5, 3), torch.ones(3, requires_grad=True)
    mine = x[:4] if rank == 0 else x[4:]
    ((mine @ w) ** 2).sum().backward()
    sums = training.average_gradients([w], torch.tensor([float(len(mine)), 1.0]))
    v = torch.ones(3, requires_grad=True)
    ((x @ v) ** 2).mean().backward()
    torch.testing.assert_close(w.grad, v.grad)
    assert sums.tolist() == [5, 2]
    dist.destroy_process_group()


# ---------------------------------------------------------------------------- torchrun itself

def test_torchrun_restarts_the_real_script_where_it_was(tmp_path):
    """finetune_rnnt.py on two processes; rank 1 is killed once, --overwrite notwithstanding the run goes on from its
    last checkpoint."""
    script = tmp_path / "killed_once.py"
    script.write_text(f"""import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import finetune_rnnt, training
update, calls = training.Training.update, []
def die(*args):
    calls.append(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    update(*args)
training.Training.update = die
sys.exit(finetune_rnnt.main())""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1",
               str(script), "--init", "none", "--data", str(ROOT / "demo/corpus/dev"), "--device", "cpu", "--batch-seconds",
               "12", "--steps", "5", "--eval-every", "2", "--overwrite", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing") == 1 and "at step 2" in done.stdout and done.stdout.count("next: ") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)["progress"]
    assert last["finished"] and last["step"] == 5 and last["settings"]["processes"] == "2"
