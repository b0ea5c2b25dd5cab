"""The optimizer of both stages against torch's own. (The loop's tests: test_faults.py, test_distributed.py.)"""
import copy

import pytest
import torch

import model
import training


@pytest.mark.parametrize("shape", [(5, 3), (16, 64), (64, 16), (32, 32)])
def test_orthogonalised_is_nearly_u_times_v(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(3, 30, len(s))
    found = training.orthogonalised(u @ s.diag() @ v).float()
    assert (u.T @ found @ v.T).diagonal().sub(1).abs().max() < 0.35        # every direction about equally long
    assert (found - u @ (u.T @ found @ v.T).diagonal().diag() @ v).abs().max() < 0.05       # and none of them turned


def test_one_optimizer_is_torchs_muon_and_torchs_adamw():
    """Ten steps, saved and loaded in the middle; the encoder frozen at first, as in stage 2."""
    torch.manual_seed(0)
    ours = model.Student(model.Config(dim=32, layers=2, kernel=7, channels=8, vocab_size=20))
    theirs = copy.deepcopy(ours)
    matrices = {name for name, p in ours.named_parameters() if name.startswith("encoder.blocks.") and p.dim() == 2}
    assert len(matrices) == 2 * 8 and "encoder.blocks.1.attention.qkv.weight" in matrices
    groups = [[p for name, p in theirs.named_parameters() if kind == (name in matrices, name.startswith("encoder."))]
              for kind in ((True, True), (False, True), (False, False))]
    options = dict(betas=(0.9, 0.98), weight_decay=1e-2)
    # its adjustment is 0.2, ours 0.4: twice the rate, half the decay
    reference = [torch.optim.Muon(groups[0], lr=4e-3, weight_decay=0.5e-2, adjust_lr_fn="match_rms_adamw"),
                 torch.optim.AdamW(groups[1], lr=2e-3, **options), torch.optim.AdamW(groups[2], lr=1e-2, **options)]
    optimizer, start = training.Muon(ours, 1e-2, 2e-3), copy.deepcopy(ours)
    for step in range(10):
        if step == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = training.Muon(ours, 1e-2, 2e-3)
            optimizer.load_state_dict(state)
        gradients = {name: torch.randn_like(p) for name, p in ours.named_parameters()
                     if step >= 2 or not name.startswith("encoder.")}
        for student in (ours, theirs):
            for name, p in student.named_parameters():
                p.grad = gradients[name].clone() if name in gradients else None
        optimizer.step()
        for one in reference:
            one.step()
    for (name, p), q, before in zip(ours.named_parameters(), theirs.parameters(), start.parameters()):
        # (torch's Muon computes in bfloat16 on every machine, ours where that is fast)
        assert (p - q).norm() < (0.06 if name in matrices else 1e-4) * (p - before).norm(), name
