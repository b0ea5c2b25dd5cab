"""The optimizer of both stages against torch's own."""

import copy

import pytest
import torch

from finetune_rnnt import new_optimizer, parse
from model import Config, Student
from tools import muon
from tools.muon import Muon, matrices_of, orthogonalise, parameters_but

DECAY = 1e-2


@pytest.mark.parametrize("shape", [(5, 3), (16, 64), (64, 16), (32, 32)])
def test_orthogonalised_is_nearly_u_times_v(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(3, 30, len(s))
    found = orthogonalise(u @ s.diag() @ v).float()
    sizes = (u.T @ found @ v.T).diagonal()
    # Every direction is about equally long, and none of them is turned.
    assert (sizes - 1).abs().max() < 0.35
    assert (found - u @ sizes.diag() @ v).abs().max() < 0.05


def groups_of(student):
    """What is new, and the encoder's vectors and matrices at their own rate"""
    matrices = matrices_of(student.encoder.blocks)
    others = parameters_but(matrices, student.encoder)
    new = parameters_but(student.encoder.parameters(), student)
    return new, others, matrices


def test_muon_takes_all_matrices_of_predictor_and_joiner():
    student = Student(Config(vocab_size=20))
    names = {id(p): name for name, p in student.named_parameters()}
    matrices = matrices_of(student.predictor, student.joiner)
    assert {names[id(p)] for p in matrices} == {
        "predictor.lstm.weight_ih_l0",
        "predictor.lstm.weight_hh_l0",
        "joiner.project_hidden.weight",
        "joiner.project_predicted.weight",
        "joiner.out.weight",
    }
    others = parameters_but(matrices, student)
    assert len(others) + len(matrices) == len(names)
    assert "predictor.embedding.weight" in {names[id(p)] for p in others}


@pytest.mark.parametrize(
    "inherits, rates, muon_takes",
    [
        ("nothing", (5e-3, 1e-3), {"encoder"}),
        ("encoder", (5e-3, 5e-4), {"encoder", "predictor", "joiner"}),
        ("everything", (2e-4, 2e-4), {"encoder", "predictor", "joiner"}),
    ],
)
def test_rates_and_muon_of_stage_2_depend_on_what_is_inherited(inherits, rates, muon_takes):
    student = Student(Config(dim=32, layers=2, kernel=7, channels=8, vocab_size=20))
    optimizer = new_optimizer(parse([]), student, None, inherits)
    names = {id(p): name for name, p in student.named_parameters()}
    found = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.pop(id(p))
            assert group["lr"] == rates[name.startswith("encoder.")], name
            if group["muon"]:
                assert p.dim() == 2, name
                found.add(name.split(".")[0])
    assert found == muon_takes
    assert not names, "a parameter that no group has would never learn"


def our_optimizer(student):
    new, others, matrices = groups_of(student)
    groups = [
        {"params": new},
        {"params": others, "lr": 2e-3},
        {"params": matrices, "lr": 2e-3, "muon": True},
    ]
    return Muon(groups, 1e-2)


def test_one_optimizer_is_torchs_muon_and_torchs_adamw(monkeypatch):
    """Ten updates, saved and loaded in the middle; the encoder frozen at first, as in stage 2."""
    monkeypatch.setattr(muon, "EVERY", 1)
    torch.manual_seed(0)
    ours = Student(Config(dim=32, layers=2, kernel=7, channels=8, vocab_size=20))
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    matrices = set()
    for name, p in ours.named_parameters():
        if name.startswith("encoder.blocks.") and p.dim() == 2:
            matrices.add(name)
    assert len(matrices) == 2 * 8 and "encoder.blocks.1.attention.qkv.weight" in matrices
    optimizer = our_optimizer(ours)
    new, others, muons = groups_of(theirs)
    # Its updates have half the size of ours: twice the rate, half the decay.
    references = [
        torch.optim.Muon(muons, lr=4e-3, weight_decay=DECAY / 2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=DECAY),
        torch.optim.AdamW(new, lr=1e-2, betas=(0.9, 0.98), weight_decay=DECAY),
    ]
    for step in range(10):
        if step == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = our_optimizer(ours)
            optimizer.load_state_dict(state)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            if step >= 2 or not name.startswith("encoder."):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        for one in (optimizer, *references):
            one.step()
    students = ours.named_parameters(), theirs.parameters(), start.parameters()
    for (name, p), q, before in zip(*students):
        # torch's Muon computes in bfloat16 on every machine, ours where that is fast.
        tolerance = 0.06 if name in matrices else 1e-4
        assert (p - q).norm() < tolerance * (p - before).norm(), name


def test_matrices_take_turns_and_arrive_at_the_same_place(monkeypatch):
    """With a gradient that does not change, one long step is as good as EVERY short ones."""
    torch.manual_seed(0)
    start = torch.randn(8, 8, 16)
    gradients = torch.randn(8, 8, 16)
    ends = {}
    moves = {}
    for every in (1, 4):
        monkeypatch.setattr(muon, "EVERY", every)
        matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        optimizer = Muon([{"params": matrices, "muon": True}], 1e-3)
        moves[every] = 0
        for _ in range(16):
            before = torch.stack([p.detach().clone() for p in matrices])
            for p, gradient in zip(matrices, gradients):
                p.grad = gradient.clone()
            optimizer.step()
            after = torch.stack([p.detach() for p in matrices])
            moves[every] += (after != before).any(-1).any(-1).int()
        ends[every] = after
    assert (moves[1] == 16).all() and (moves[4] == 4).all()
    way = (ends[1] - start).norm()
    assert (ends[4] - ends[1]).norm() < 0.01 * way and way > 0.1
