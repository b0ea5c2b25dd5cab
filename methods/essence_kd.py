"""Trained transducers teach a transducer: one-best path distillation, ensembles, essence.

    python finetune_rnnt.py --teacher-transducer exp/finetune --out exp/taught
    python finetune_rnnt.py --teacher-transducer exp/a exp/b exp/c --essence-top-k 4 \\
        --out exp/essence

Walk the teachers' lattice along the transcript. At each node on the way the student learns their
whole distribution q, or its essence, the likeliest entries (arXiv 2110.03334, 1906.10834):

    q(t, u) = mean_m softmax(z_m(t, u) / tau)       of M teachers; its top k, renormalised
    L_KD    = tau^2 * sum over the path of - q(t, u) log softmax(z_student(t + shift, u) / tau)

[ours]: the sum over the path (not its mean), so that L_KD weighs like the transducer loss; the
mean of several teachers along their common path; top k as the rule of selection.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import decode
from model import BLANK
from tools.command_line import UserError


class OneBestPath(NamedTuple):
    """The nodes of a walk through a lattice, N = T + U of them at most; (B, N) each."""

    t: torch.Tensor
    u: torch.Tensor
    exists: torch.Tensor  # bool; False behind the end of shorter walks
    q: torch.Tensor  # soft labels there, (B, N, V)


def load_transducers(folders, device):
    """-> (frozen transducers, the tokenizer they share)

    folders: run directories or checkpoints of stage 2. Raises UserError if their tokenizers differ.
    """
    transducers = []
    shared = None
    for folder in folders:
        transducer, tokenizer = decode.load_recogniser(folder, device)
        if shared is not None and tokenizer.to_str() != shared.to_str():
            raise UserError(
                f"--teacher-transducer {folder} has another tokenizer than {folders[0]}: teachers "
                f"of one ensemble must write the same tokens"
            )
        shared = tokenizer
        transducers.append(transducer.requires_grad_(False))
    return transducers, shared


@torch.no_grad()
def distil_path(transducers, batch, temperature=1.0, top_k=None):
    """-> (the batch, with the first teacher's transcripts where it has none; their OneBestPath)

    The teachers encode the audio without SpecAugment.
    """
    device = batch.features.device
    features = [data.log_mel(waveform) for waveform in batch.waveforms]
    features = pad_sequence(features, batch_first=True).to(device)
    encoded = []
    for transducer in transducers:
        hidden, lengths = transducer.encoder(features, batch.feature_lengths)
        encoded.append((transducer, hidden))
    batch = transcribe_untranscribed(transducers[0], encoded[0][1], lengths, batch)
    ensemble = []
    for transducer, hidden in encoded:
        ensemble.append((transducer.joiner, hidden, transducer.predict(batch.targets)))
    path = one_best_path(ensemble, batch.targets, lengths, batch.target_lengths, temperature)
    if top_k is not None:
        path = path._replace(q=essence(path.q, top_k))
    return batch, path


def transcribe_untranscribed(transducer, hidden, lengths, batch):
    """Utterances without text get what a greedy search writes. -> batch"""
    without = [b for b, utterance in enumerate(batch.utterances) if utterance.text is None]
    if not without:
        return batch
    with torch.autocast(hidden.device.type, enabled=False):
        search = decode.GreedyTransducer(transducer, len(without))
        search.advance(hidden[without].float(), lengths[without])
    targets = []
    for row, length in zip(batch.targets, batch.target_lengths):
        targets.append(row[:length])
    for b, [best] in zip(without, search.results()):
        labels = [token.label for token in best.tokens]
        targets[b] = torch.tensor(labels, device=hidden.device, dtype=torch.long)
    target_lengths = [len(labels) for labels in targets]
    return replace(
        batch,
        targets=pad_sequence(targets, batch_first=True),
        target_lengths=torch.tensor(target_lengths, device=hidden.device),
    )


def one_best_path(ensemble, targets, logit_lengths, target_lengths, temperature=1.0):
    """Walk the lattice along the transcript (arXiv 2110.03334) -> OneBestPath

    From (t, u) to (t+1, u) where blank is the teachers' best guess or no label is left, else to
    (t, u+1). ensemble: list of (joiner, hidden (B, T, d), predicted (B, U+1, P)); targets (B, U);
    lengths (B,). Several teachers walk together, by the mean of their distributions.
    """
    row = torch.arange(len(targets), device=targets.device)
    projected = []
    for joiner, hidden, predicted in ensemble:
        projected.append(
            (joiner.join, joiner.project_hidden(hidden), joiner.project_predicted(predicted))
        )
    t = torch.zeros_like(logit_lengths)
    u = torch.zeros_like(logit_lengths)
    nodes = []
    for _ in range(int((logit_lengths + target_lengths).max())):
        # What a walk visits behind its end are nodes that do not exist.
        exists = t < logit_lengths
        frame = t.minimum(logit_lengths - 1)
        q = 0
        for join, encoded, predicted in projected:
            logits = join(encoded[row, frame], predicted[row, u]).float()
            q = q + (logits / temperature).softmax(-1) / len(projected)
        nodes.append(OneBestPath(t, u, exists, q))
        writes = (q.argmax(-1) != BLANK) & (u < target_lengths)
        t = t + ~writes
        u = u + (writes & exists)
    return OneBestPath(*(torch.stack(values, dim=1) for values in zip(*nodes)))


def essence(q, top_k):
    """Soft labels (..., V) -> their top_k largest entries, the rest 0, made to sum to 1 again"""
    values, labels = q.topk(min(top_k, q.shape[-1]), dim=-1)
    kept = torch.zeros_like(q).scatter(-1, labels, values)
    return kept / kept.sum(-1, keepdim=True)


def path_distillation_loss(
    joiner, hidden, predicted, path, logit_lengths, temperature=1.0, shift=0
):
    """L_KD above, summed over the batch

    joiner, hidden (B, T, d) and predicted (B, U+1, P): the student's. shift: frames by which a
    streaming student may emit later than its teachers. tau^2 keeps the gradient's size, whatever
    tau.
    """
    row = torch.arange(len(hidden), device=hidden.device)[:, None]
    exists = path.exists & (path.t + shift < logit_lengths[:, None])
    frame = (path.t + shift).clamp(max=hidden.shape[1] - 1)
    encoded = joiner.project_hidden(hidden)[row, frame]
    predicted = joiner.project_predicted(predicted)[row, path.u]
    log_p = (joiner.join(encoded, predicted).float() / temperature).log_softmax(-1)  # (B, N, V)
    cross_entropy = -(path.q * log_p).sum(-1)
    return temperature**2 * cross_entropy.where(exists, 0).sum()
