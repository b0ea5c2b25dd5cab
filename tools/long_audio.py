"""Recordings of any length, in bounded memory: cut where it is quietest, encoded piece by piece.

For students that encode whole utterances; those that stream have tools/stream.py.
"""

import itertools

import torch
import torch.nn.functional as F

import data
from data import FRAME, FRAME_SECONDS, HOP
from tools.machine import autocast

MARGIN = 50  # encoder frames that both sides of a cut encode where there is no pause: 2 s
PAUSE = 0.25  # log-mel units below the median, 4 dB: what is quieter is a pause


def loudness(features):
    """log-mel (F, 80) -> (ceil(F / 4),): mean of the 0.3 s around each encoder frame of 40 ms"""
    means = features.mean(1)[None]
    return F.avg_pool1d(means, 31, stride=4, padding=15, count_include_pad=False)[0]


def quiet_cut(levels, low, high):
    """Where to cut a recording, given levels (T,) of `loudness` from the start of a piece

    -> (the quietest frame from `low` to below `high`, which is the piece's length; is it a pause?)
    """
    frame = low + levels[low:high].argmin().item()
    pause = levels[frame] < levels[:high].median() - PAUSE
    return frame, bool(pause)


@torch.no_grad()
def encode_pieces(student, audio, device, dtype=torch.float32):
    """A recording of any length, for a student that encodes whole utterances, in bounded memory.

    audio: iterable of float32 tensors (S_i,) of 16 kHz
    -> iterator of (hidden states (1, T_i, d) that follow one another, is there a pause before?)

    Pieces have about the length of the utterances of training and are cut where it is quietest.
    Where even that is no pause, both sides encode MARGIN beyond the cut: hidden states are joined
    there, not texts, so no word is lost or doubled.
    """
    typical = student.config.seconds / FRAME_SECONDS
    low = round(0.5 * typical)
    high = round(1.6 * typical)

    def encode(features):
        lengths = torch.tensor([len(features)], device=device)
        with autocast(device, dtype):
            hidden, _ = student.encoder(features[None].to(device), lengths, chunk=0)
        return hidden.float()

    samples = torch.zeros(0)
    context = 0  # frames at the start of `samples` that the piece before has encoded
    after_pause = True
    for block in itertools.chain(audio, [None]):
        beyond = MARGIN
        if block is None:
            beyond = 0  # There is no more: what is longer than a piece is cut none the less.
        else:
            samples = torch.cat([samples, block])
        while len(samples) >= (context + high + beyond) * FRAME:
            features = data.log_mel(samples[: (context + high + MARGIN) * FRAME])
            length, pause = quiet_cut(loudness(features)[context:], low, high)
            cut = context + length
            end = cut if pause else cut + MARGIN
            yield encode(features[: 4 * end])[:, context:cut], after_pause
            # After a pause the next piece begins anew.
            after_pause = pause
            context = 0 if pause else min(MARGIN, cut)
            samples = samples[(cut - context) * FRAME :]
    # What is left is the last piece, if it has half a frame.
    if len(samples) >= context * FRAME + 2 * HOP:
        yield encode(data.log_mel(samples))[:, context:], after_pause
