"""Is it a teacher at all, has it taught? How well a linear layer reads transcripts off embeddings.

    python pretrain_kd.py --probe --teachers NAME[:LAYER,...] ... --data ... --dev ...
    python -m tools.probe exp/pretrain --data ... --dev ...       # a student, after stage 1

A teacher that does not tell one phone from another has nothing to teach; this takes about a minute
each, pre-training takes hours.
"""

import functools
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from model import encoder_frames, load_checkpoint, load_student
from tools.command_line import Parser, UserError, one_line_errors
from tools.word_errors import Errors, word_errors

SECONDS = (480, 120)  # of audio that the linear layer learns from and is scored on


def mean_and_deviation(frames):
    """(N, D) -> (D,) each; no deviation is 0, so that one can divide by it"""
    return frames.mean(0), frames.std(0).clamp(min=1e-5)


def character_errors(train, dev, epochs=30):
    """A linear CTC layer learns to read characters off frames -> percent that are wrong in dev

    train, dev: lists of ((T, D) frames, text). What so weak a layer can read, the frames hold.
    """
    letters = sorted({letter for _, text in train for letter in text})
    frames = torch.cat([x for x, _ in train])
    mean, std = mean_and_deviation(frames)
    inputs = [(x - mean) / std for x, _ in train]
    targets = []
    for _, text in train:
        # 0 is CTC's blank.
        targets.append(torch.tensor([1 + letters.index(letter) for letter in text]))

    torch.manual_seed(0)
    layer = torch.nn.Linear(len(mean), 1 + len(letters)).to(mean.device)
    optimizer = torch.optim.Adam(layer.parameters(), 3e-2)
    steps = epochs * math.ceil(len(train) / 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, steps)
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


@torch.no_grad()
def student_frames(student, batch):
    """-> list of (T, d), one per utterance"""
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    return [row[:length] for row, length in zip(hidden, lengths)]


def reachable_variance(targets, rank):
    """Shares of the variance of targets that linear layers can reach from `rank` dimensions, at
    most: principal components.

    targets: list of (N, D_k) -> [share of each that has all dimensions to itself],
    [share of each where all are read off the same dimensions and weigh alike, as in the loss]
    """
    standardised = []
    for x in targets:
        mean, std = mean_and_deviation(x)
        standardised.append((x - mean) / std / math.sqrt(x.shape[1]))

    def kept(x):
        """The part of (N, D) that its first `rank` principal components hold"""
        _, directions = torch.linalg.eigh(x.T @ x)
        directions = directions[:, -rank:]
        return x @ directions @ directions.T

    def share(part, whole):
        return 1 - ((whole - part).square().sum() / whole.square().sum()).item()

    alone = [share(kept(x), x) for x in standardised]
    together = kept(torch.cat(standardised, dim=1))
    parts = together.split([x.shape[1] for x in standardised], dim=1)
    return alone, [share(part, x) for part, x in zip(parts, standardised)]


def predicted_variance(source, target):
    """Share of the variance of one teacher that a linear layer predicts from another: how much of
    the one the other knows as well.

    source, target: pairs of frames to learn from (N, D) and to score (M, D).
    """
    mean, std = mean_and_deviation(source[0])
    x, x_dev = [(x - mean) / std for x in source]
    mean, std = mean_and_deviation(target[0])
    y, y_dev = [(y - mean) / std for y in target]
    # Ridge regression.
    gram = x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ y)
    wrong = (y_dev - x_dev @ weights).square().sum()
    return 1 - (wrong / y_dev.square().sum()).item()


# ---------------------------------------- the tables


def load_batches(training, development, batch_seconds, seconds=SECONDS):
    """-> batches to learn from, batches to score, whether all of them are transcribed"""
    parts = []
    for utterances, some in zip((training, development), seconds):
        loader = data.Loader(choose(utterances, some), batch_seconds)
        batches = [batch for batch in loader.epoch() if batch.utterances]
        if not batches:
            raise UserError(
                "none of the audio can be read; python -m tools.librispeech check PATH says why"
            )
        parts.append(batches)
    utterances = [u for batches in parts for batch in batches for u in batch.utterances]
    return *parts, all(characters(u) for u in utterances)


def frames_of(encode, batches):
    """encode(batch) -> list of (T, D), one per utterance: those of all batches"""
    return [row for batch in batches for row in encode(batch)]


def error_rate(train_frames, dev_frames, train, dev):
    """Percent of the characters that a linear layer reads wrong off frames of two lists of
    batches."""
    pairs = []
    for rows, batches in ((train_frames, train), (dev_frames, dev)):
        texts = [characters(u) for batch in batches for u in batch.utterances]
        pairs.append(list(zip(rows, texts)))
    return character_errors(*pairs)


def probe(teachers, names, training, development, batch_seconds, rank, seconds=SECONDS):
    """Print a table: what the teachers are, how fast, how well a linear layer reads characters off
    them, and how much of them `rank` dimensions can hold, which is what the student has.

    names: one for each target, that is for each layer of each teacher (pretrain_kd.target_names).
    training, development: lists of utterances; `seconds` of each are used.
    """
    train, dev, transcribed = load_batches(training, development, batch_seconds, seconds)
    rows = []
    targets = []
    for teacher in teachers:
        encode = functools.partial(teacher_frames, teacher)
        started = time.perf_counter()
        train_frames = frames_of(encode, train)
        dev_frames = frames_of(encode, dev)
        elapsed = time.perf_counter() - started
        audio = sum(batch.seconds for batch in train + dev)
        about = f"{teacher.parameters / 1e6:.1f} M"
        # The layers of a teacher stand side by side in its embedding.
        start = 0
        for clock, width in zip(teacher.clocks, teacher.widths):
            layer = slice(start, start + width)
            start += width
            wrong = "unknown"
            of_layer = [[row[:, layer] for row in some] for some in (train_frames, dev_frames)]
            if transcribed:
                wrong = f"{error_rate(*of_layer, train, dev):.1f} %"
            rows.append([about, f"{clock.rate:.4g} Hz", width, f"{audio / elapsed:.0f}", wrong])
            targets.append([torch.cat(some).cpu() for some in of_layer])
    alone, together = reachable_variance([train_part for train_part, _ in targets], rank)

    print(
        "| target | parameters | frames | width | s of audio/s | characters wrong "
        f"| variance in {rank} dimensions, alone | in {rank} shared with the others |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row, share, shared in zip(names, rows, alone, together):
        print(f"| {name} | {' | '.join(map(str, row))} | {share:.2f} | {shared:.2f} |")
    if transcribed:
        mel = [frames_of(log_mel_frames, batches) for batches in (train, dev)]
        print(f"| log-mel features | | 100 Hz | 320 | | {error_rate(*mel, train, dev):.1f} % | | |")
        print(
            "A linear CTC layer reads the characters: a teacher is worth having where it reads far "
            "more than off log-mel."
        )
    else:
        print("Give transcribed --data and --dev to see whether the embeddings tell phones apart.")
    if len(targets) > 1:
        print_agreement(names, targets)


def print_agreement(names, targets):
    print(f"\n| a linear layer predicts of | {' | '.join(names)} |")
    print("|---" * (1 + len(names)) + "|")
    for name, source in zip(names, targets):
        shares = [f"{predicted_variance(source, target):.2f}" for target in targets]
        print(f"| from {name} | {' | '.join(shares)} |")
    print(
        "Where a teacher's variance is predicted from another one, the student learns it from that "
        "one too: teachers that differ have more to teach together."
    )


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="of stage 1: run directories or checkpoints")
    for option, use in (("--data", "learn from"), ("--dev", "score")):
        parser.add_argument(
            option, nargs="+", required=True, metavar="SOURCE", help=f"transcribed audio to {use}"
        )
    args = parser.parse_args(argv)
    training = data.load_sources(args.data, transcribed=True)
    development = data.load_sources(args.dev, transcribed=True)
    training, development = data.leave_out_long(data.LONGEST, "cut it up", training, development)
    # A student is fast, so more can be scored.
    train, dev, _ = load_batches(training, development, 24.0, (SECONDS[0], 600))
    print("| student | characters wrong |\n|---|---|")
    for run in args.runs:
        student = load_student(load_checkpoint(run)).eval()
        encode = functools.partial(student_frames, student)
        wrong = error_rate(frames_of(encode, train), frames_of(encode, dev), train, dev)
        print(f"| {run} | {wrong:.1f} % |")


if __name__ == "__main__":
    sys.exit(main())
