"""The optimizer of both stages: Muon for matrices of the student's inner layers, AdamW for the
rest."""

import math

import torch

from tools.machine import fast_dtype

EVERY = 4  # updates, in one of which a matrix takes its step


def matrices_of(*modules):
    """-> the matrices of their layers. An embedding is none: it is a table of vectors."""
    matrices = []
    for module in modules:
        for layer in module.modules():
            if not isinstance(layer, torch.nn.Embedding):
                matrices += [p for p in layer.parameters(recurse=False) if p.dim() == 2]
    return matrices


def parameters_but(known, module):
    """-> the parameters of a module that are not among those"""
    known = set(map(id, known))
    return [p for p in module.parameters() if id(p) not in known]


class Muon(torch.optim.AdamW):
    """AdamW, but groups with "muon": True, which hold matrices, take the orthogonalised momentum.

    All directions of a matrix then learn at one pace, which a short training gains most from. The
    update is scaled to about twice the size of AdamW's (arXiv 2502.16982 has 0.2 instead of 0.4),
    so one learning rate suits both. torch.optim.Muon takes nothing but matrices, and computes in
    bfloat16 where a CPU has to emulate it.

    To orthogonalise all matrices costs as much as half a backward pass of a batch of 24 s. The
    momentum hardly changes from one update to the next, so the matrices take turns: each takes a
    step of EVERY times the size in one of EVERY updates. [ours]
    """

    def __init__(self, groups, lr):
        for group in groups:
            group.setdefault("muon", False)
        super().__init__(groups, lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                group["updates"] = group.get("updates", 0) + 1
                for i, p in enumerate(group["params"]):
                    if p.grad is not None:
                        its_turn = (group["updates"] + i) % EVERY == 0
                        self.step_of_matrix(p, its_turn, EVERY * group["lr"], group["weight_decay"])
        super().step()

    def step_of_matrix(self, p, its_turn, lr, weight_decay):
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one in every state
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 0.05)
        if its_turn:
            nesterov = p.grad.lerp(state["momentum"], 0.95)
            p.mul_(1 - lr * weight_decay)
            p.add_(orthogonalise(nesterov), alpha=-0.4 * math.sqrt(max(p.shape)) * lr)
        p.grad = None  # AdamW's own step comes next and passes over it


def orthogonalise(matrix):
    """(m, n) = U S V^T -> nearly U V^T

    Five steps of a Newton-Schulz iteration bring every singular value that is not tiny to between
    0.7 and 1.2 (https://kellerjordan.github.io/posts/muon).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.to(fast_dtype(matrix.device))
    for _ in range(5):
        # 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    return x
