"""Is it a teacher at all? How well a linear layer reads transcripts off embeddings.

    python pretrain_kd.py --probe --teachers NAME[:LAYER,...] ... --data ... --dev ...

A teacher that does not tell one phone from another has nothing to teach; this takes about a minute
each, pre-training takes hours.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from model import encoder_frames
from tools.command_line import UserError
from tools.word_errors import Errors, word_errors

SECONDS = (480, 120)  # of audio that the linear layer learns from and is scored on


def character_errors(train, dev, epochs=30):
    """A linear CTC layer learns to read characters off frames -> percent that are wrong in dev

    train, dev: lists of ((T, D) frames, text). What so weak a layer can read, the frames hold.
    """
    letters = sorted({letter for _, text in train for letter in text})
    frames = torch.cat([x for x, _ in train])
    mean = frames.mean(0)
    std = frames.std(0).clamp(min=1e-5)
    inputs = [(x - mean) / std for x, _ in train]
    targets = []
    for _, text in train:
        # 0 is CTC's blank.
        targets.append(torch.tensor([1 + letters.index(letter) for letter in text]))

    torch.manual_seed(0)
    layer = torch.nn.Linear(len(mean), 1 + len(letters)).to(mean.device)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    steps = epochs * math.ceil(len(train) / 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train)).split(8):
            x = [inputs[i] for i in chosen]
            y = [targets[i] for i in chosen]
            log_probs = layer(pad_sequence(x)).log_softmax(-1).cpu()  # (T, B, V)
            loss = F.ctc_loss(
                log_probs,
                torch.cat(y),
                torch.tensor([len(row) for row in x]),
                torch.tensor([len(row) for row in y]),
                zero_infinity=True,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    errors = Errors()
    for x, text in dev:
        best = layer((x - mean) / std).argmax(-1).unique_consecutive().tolist()
        found = [letters[label - 1] for label in best if label != 0]
        # Characters as words: then the word error rate is that of characters.
        errors += word_errors(" ".join(text), " ".join(found))
    return errors.rate


def characters(utterance):
    """What the linear layer has to read: the letters of the normalised transcript"""
    return data.normalise(utterance.text or "").replace(" ", "")


def choose(utterances, seconds):
    """-> some utterances, so many seconds in all, transcribed ones if there are any"""
    transcribed = [utterance for utterance in utterances if characters(utterance)]
    candidates = transcribed or utterances
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    chosen = []
    total = 0
    for i in order.tolist():
        if total < seconds:
            chosen.append(candidates[i])
            total += candidates[i].seconds
    return chosen


def log_mel_frames(batch):
    """-> list of (T, 320): four frames of log-mel side by side, to compare the teachers with"""
    rows = []
    for features, length in zip(batch.features, batch.feature_lengths.tolist()):
        T = encoder_frames(length)
        padded = F.pad(features[:length], (0, 0, 0, 1))
        rows.append(padded[: 4 * T].reshape(T, -1))
    return rows


def teacher_frames(teacher, batch):
    """-> list of (T, dim), one per utterance"""
    embeddings, lengths = teacher.embed(batch.waveforms)
    return [row[:length] for row, length in zip(embeddings, lengths)]


def probe(teachers, names, training, development, batch_seconds, seconds=SECONDS):
    """Print a table: what the teachers are, how fast, and how well a linear layer reads characters.

    names: one for each target, that is for each layer of each teacher (pretrain_kd.target_names).
    training, development: lists of utterances; `seconds` of each are used.
    """
    parts = []
    for utterances, some in zip((training, development), seconds):
        loader = data.Loader(choose(utterances, some), batch_seconds)
        batches = [batch for batch in loader.epoch() if batch.utterances]
        if not batches:
            raise UserError(
                "none of the audio can be read; python -m tools.librispeech check PATH says why"
            )
        parts.append(batches)
    texts = []
    for batches in parts:
        texts.append([characters(u) for batch in batches for u in batch.utterances])
    transcribed = all(texts[0]) and all(texts[1])

    def error_rate(train_frames, dev_frames):
        if not transcribed:
            return "unknown"
        train = list(zip(train_frames, texts[0]))
        dev = list(zip(dev_frames, texts[1]))
        return f"{character_errors(train, dev):.1f} %"

    print("| target | parameters | frames | width | s of audio/s | characters wrong |")
    print("|---|---|---|---|---|---|")
    names = iter(names)
    for teacher in teachers:
        started = time.perf_counter()
        frames = []
        for batches in parts:
            frames.append([row for batch in batches for row in teacher_frames(teacher, batch)])
        elapsed = time.perf_counter() - started
        audio = sum(batch.seconds for batches in parts for batch in batches)
        # The layers of a teacher stand side by side in its embedding.
        start = 0
        for clock, width in zip(teacher.clocks, teacher.widths):
            layer = slice(start, start + width)
            start += width
            train_frames, dev_frames = [[row[:, layer] for row in rows] for rows in frames]
            print(
                f"| {next(names)} | {teacher.parameters / 1e6:.1f} M | {clock.rate:.4g} Hz "
                f"| {width} | {audio / elapsed:.0f} | {error_rate(train_frames, dev_frames)} |"
            )

    mel = []
    for batches in parts:
        mel.append([row for batch in batches for row in log_mel_frames(batch)])
    print(f"| log-mel features | | 100 Hz | 320 | | {error_rate(*mel)} |")
    if transcribed:
        print(
            "A linear CTC layer reads the characters: a teacher is worth having where it reads far "
            "more than off log-mel."
        )
    else:
        print("Give transcribed --data and --dev to see whether the embeddings tell phones apart.")
