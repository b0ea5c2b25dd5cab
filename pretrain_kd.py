"""Stage 1: several frozen speech foundation models teach the student's encoder by their embeddings; no transcripts.

    python pretrain_kd.py                 # the demo: two small teachers, 1.2 h of audio; minutes on a laptop CPU
    python pretrain_kd.py --data LibriSpeech/train-clean-100 --unlabelled LibriSpeech/train-clean-360 \\
        --teachers microsoft/wavlm-base-plus facebook/hubert-base-ls960:9 openai/whisper-base \\
        --size small --steps 60000 --batch-seconds 400 --out exp/pretrain-100h                       # one GPU
    torchrun --nproc_per_node 8 pretrain_kd.py ...            # eight GPUs, the same arguments
    python pretrain_kd.py --probe --data ... --teachers ...   # is it a teacher at all? about a minute each
    python pretrain_kd.py --cache DIR ...                   # listen once; then a step costs what the student costs

    p_k = Linear_k(h),   L = sum_k w_k * mean |p_k - e_k|     # arXiv 2303.10917; e_k standardised, see Teacher
"""
import argparse
import bisect
import itertools
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import losses
import model
import run as running
import training
from decode import Errors, word_errors
from run import DEMO, UserError
from teachers import Cache, Teacher, audio_key, student_frames

PROBE_SECONDS = 480, 120                # of transcribed audio that a probe learns from and is scored on


# ---------------------------------------------------------------------------- the method

def teacher_targets(teachers, batch, combine="heads", weights=None):
    """What each projection head has to predict: list of (B, T, D), one per head. Each layer of a teacher is a target.

    heads: a head for each target.   average: one head, the weighted mean of the targets, standardised as they are.
    random: one head, for each utterance one of the targets, drawn by weight.
    """
    heard = batch.embeddings or [teacher.embed(batch.waveforms)[0] for teacher in teachers]
    targets = [target for teacher, embeddings in zip(teachers, heard)
               for target in teacher.standardised(embeddings).split(teacher.widths, dim=-1)]
    if combine == "heads":
        return targets
    targets, weights = torch.stack(targets), torch.tensor(weights)                                   # (K, B, T, D)
    if combine == "average":
        return [torch.einsum("k, kbtd -> btd", (weights / weights.sum()).to(targets), targets)]
    drawn = torch.multinomial(weights, targets.shape[1], replacement=True)
    return [targets[drawn, torch.arange(len(drawn))]]


def stage1_loss(student, batch, targets, weights, kinds):
    """L = sum_k w_k * mean |p_k - e_k|, or another kind -> (L times the student's frames, frames, mean of each head)"""
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    parts = [losses.distillation_loss(head(hidden).float(), target, lengths, kind) / lengths.sum()
             for head, target, kind in zip(student.heads, targets, kinds)]
    return sum(w * part for w, part in zip(weights, parts)) * lengths.sum(), lengths.sum(), parts


def mean_losses(student, teachers, targets, loader):
    """-> {name of a target: mean loss over the loader's frames}; one head for all is measured against each. For l1, 0.8
    is what predicting the mean scores on normally distributed targets."""
    sums, frames, device = torch.zeros(len(targets)), 0, next(student.parameters()).device
    for batch in filter(lambda batch: batch.ids, loader.epoch()):
        hidden, lengths = student.encoder(batch.features.to(device), batch.feature_lengths.to(device))
        for k, (target, truth) in enumerate(zip(targets, teacher_targets(teachers, batch))):
            head = student.heads[min(k, len(student.heads) - 1)]
            sums[k] += losses.distillation_loss(head(hidden), truth, lengths, target.loss).item()
        frames += lengths.sum().item()
    if not frames:
        raise UserError("none of the --dev audio can be read; python data.py check PATH says why")
    return {target.name: mean for target, mean in zip(targets, (sums / frames).tolist())}


# ---------------------------------------------------------------------------- what the user asked for

def options(argv):
    """What the user asked for; a UserError where it does not fit together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_source_options(parser)
    group = parser.add_argument_group("teachers and student")
    group.add_argument("--teachers", nargs="+", metavar="NAME[:LAYER,...]",
                       default=[str(DEMO / "teachers/hubert"), str(DEMO / "teachers/whisper")],
                       help="frozen teachers: Hugging Face hub names or folders, with one or more hidden layers or "
                            "'last' (default: the demo's two)")
    group.add_argument("--weights", nargs="+", type=float, metavar="W",
                       help="weight of each teacher, shared by its layers (default: 1 each)")
    group.add_argument("--loss", nargs="+", choices=list(losses.DISTANCES), default=["l1"],
                       help="distance to the teachers, one for all or one for each (default l1)")
    group.add_argument("--cache", type=Path, metavar="DIR",
                       help="keep the teachers' embeddings there (float16; the size is printed first) and train from "
                            "them: a step then costs what the student costs")
    group.add_argument("--probe", action="store_true",
                       help="train nothing; say what the teachers are, how fast, and how well a linear layer reads "
                            "transcripts off their embeddings (about a minute each)")
    group.add_argument("--combine", choices=["heads", "average", "random"], default="heads",
                       help="a head per teacher; or one head for the "
                       "teachers' average; or one head and a random teacher per utterance (default %(default)s)")
    group.add_argument("--size", choices=list(model.PRESETS), default="nano",
                       help="student (default %(default)s; with a vocabulary of 256: nano 3.0 M parameters, "
                       "small 9.5 M, medium 31 M, large 115 M)")
    group.add_argument("--chunk", type=model.chunk_size, default=0, metavar="FRAMES|random",
                       help="a streaming student, which hears so many frames of 40 ms at once; 'random': one that can "
                       "do both (default: the whole utterance)")
    group.add_argument("--left", type=int, default=64, metavar="FRAMES",
                       help="frames before its chunk that a streaming student sees (default %(default)s)")
    group.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    running.add_training_options(parser, out="exp/pretrain", steps=1050, regularised=False)
    args = parser.parse_args(argv)
    running.check_training_options(args)
    for name, found, few in (("--weights", args.weights, [len(args.teachers)]),
                             ("--loss", args.loss, [1, len(args.teachers)])):
        if found and len(found) not in few:
            raise UserError(f"{name} needs one per teacher: {len(args.teachers)}, found {len(found)}")
    if args.weights and not min(args.weights) > 0:
        raise UserError(f"--weights must be above 0, found {min(args.weights)}; leave out who shall not count")
    if args.combine != "heads" and len(set(args.loss)) > 1:
        raise UserError(f"--combine {args.combine} has one head and takes one --loss, found {' '.join(args.loss)}")
    if len(set(args.teachers)) < len(args.teachers):
        raise UserError("--teachers names one twice; a teacher counts more through --weights")
    return args


@dataclass(frozen=True)
class Target:
    """A layer of a teacher, as the log calls it, and how it counts."""
    name: str
    width: int
    weight: float
    loss: str


def load_teachers(args, device, say):
    """-> (teachers, their targets)"""
    teachers, targets = [], []
    for spec in args.teachers:
        teachers.append(Teacher(spec, device, running.inference_dtype(device)))
        say(f"teacher {teachers[-1]}")
    titles = [teacher.title for teacher in teachers]
    for k, teacher in enumerate(teachers):
        if titles.count(teacher.title) > 1:
            teacher.title = teacher.name
        weight = (args.weights or [1.0] * len(teachers))[k] / len(teacher.layers)
        targets += [Target(teacher.title + (f":{layer}" if layer != "last" else ""), width, weight,
                           args.loss[k % len(args.loss)]) for layer, width in zip(teacher.layers, teacher.widths)]
    if args.combine != "heads" and len({target.width for target in targets}) > 1:
        raise UserError(f"--combine {args.combine} needs targets of one width, found "
                        f"{', '.join(f'{t.name} {t.width}' for t in targets)}; use --combine heads")
    return teachers, targets


def standardise(teachers, loader, state):
    """The teachers' means and deviations: those of the run that goes on, or measured on the first batches of
    training: four, and 200 s."""
    if state:
        for teacher, old in zip(teachers, state["teachers"]):
            teacher.mean, teacher.std = old["mean"].to(teacher.device), old["std"].to(teacher.device)
        return
    count = max(4, math.ceil(200 / loader.batch_seconds))
    batches = [batch for _, batch in zip(range(count), loader.epoch(0)) if batch.ids]
    if not batches:
        raise UserError("none of the training audio can be read; python data.py check PATH says why")
    for k, teacher in enumerate(teachers):
        teacher.standardise([(batch.embeddings[k], (batch.feature_lengths + 1) // 4) if batch.embeddings else
                             teacher.embed(batch.waveforms) for batch in batches])


# ---------------------------------------------------------------------------- the cache

def remember(args, teachers, train_set, dev_set, say, rank, world):
    """--cache: let the teachers embed what is not on disk yet; then they may go. -> (a Cache for each, the utterances
    of both sets that all of them know). Raises UserError if the disk has no room for the size that is printed first."""
    folder, everything = args.cache, [(u, s) for u in train_set for s in args.speeds] + [(u, 1.0) for u in dev_set]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        caches = [Cache(folder, teacher, f"{teacher.title}-{','.join(teacher.layers)}", rank) for teacher in teachers]
        paths = {}
        for u, _ in everything:
            if (other := paths.setdefault(audio_key(u), u.path)) != u.path:
                raise UserError(f"--cache knows a file by the last four parts of its path and finds these twice: "
                                f"{other} and {u.path}; rename a folder or train without --cache")
        missing = [(u, s) for u, s in everything if not all(cache.row(u, s) for cache in caches)]
        frames = lambda u, s: student_frames(round(u.seconds / s * data.SAMPLE_RATE))
        size = [sum(2 * cache.dim * frames(u, s) for u, s in missing if not cache.row(u, s)) / 1e9 for cache in caches]
        free = shutil.disk_usage(folder).free / 1e9
        if missing:
            say(f"cache {folder}: {sum(size):.3g} GB to write ("
                f"{', '.join(f'{cache.name} {gb:.3g}' for cache, gb in zip(caches, size))}), {free:.3g} GB free")
        if rank == 0 and sum(size) > free:
            raise UserError(f"--cache {folder} has {free:.3g} GB free, {sum(size):.3g} GB are needed; choose another "
                            f"disk, fewer --speeds or teachers")
        running.everyone(None)  # nobody writes while others still look at what is missing
        if missing:
            fill(caches, teachers, missing, args, rank, world)
        running.everyone(None)
        for cache in caches:
            cache.read()
    except OSError as error:
        raise UserError(f"cannot write --cache {folder} ({error.strerror}); what is there is intact: free some space "
                        f"or choose another folder, and run the same command again")
    unknown = {u.path for u, s in everything if not all(cache.row(u, s) for cache in caches)}  # (unreadable)
    if len(set(map(frozenset, running.everyone(unknown)))) > 1:
        raise UserError(f"--cache {folder} is not one folder for all processes: put it on a disk that they share")
    for teacher in teachers:
        teacher.encoder = None  # its memory is the student's now
    return caches, *([u for u in some if u.path not in unknown] for some in (train_set, dev_set))


def fill(caches, teachers, missing, args, rank, world):
    """Append this process's share of `missing`, pairs of an utterance and a speed, to the caches that lack them."""
    for cache in caches:
        cache.open()
    with tqdm(total=round(sum(u.seconds for u, _ in missing) / world), unit="s", desc="caching", disable=rank > 0,
              dynamic_ncols=True) as bar:
        for speed in sorted({speed for _, speed in missing}):
            known = {u.path: u for u, s in missing if s == speed}
            loader = data.Loader([replace(u, id=path) for path, u in known.items()], args.batch_seconds, waveforms=True,
                                 speeds=(speed,), workers=args.workers, rank=rank, world=world)
            for batch in loader.epoch():
                for problem in batch.failed:
                    tqdm.write(f"skipped: {problem}", file=sys.stderr)
                for cache, teacher in zip(caches, teachers):
                    new = [(known[path], waveform) for path, waveform in zip(batch.ids, batch.waveforms or [])
                           if not cache.row(known[path], speed)]
                    if new:
                        utterances, waveforms = zip(*new)
                        cache.append(utterances, speed, *teacher.embed(waveforms))
                bar.update(round(sum(known[path].seconds for path in batch.ids)))
    for cache in caches:
        cache.close()


# ---------------------------------------------------------------------------- is it a teacher at all?

def character_errors(train, dev, epochs=30):
    """A linear CTC layer learns the characters of 25 Hz frames: percent of the characters of `dev` that it gets wrong.

    train, dev: lists of ((T, D) frames, text). What a layer this weak can read off, the frames must tell apart.
    """
    letters = sorted({c for _, text in train for c in text})
    everything = torch.cat([x for x, _ in train])
    mean, std = everything.mean(0), everything.std(0).clamp(min=1e-5)
    rows = [((x - mean) / std, torch.tensor([1 + letters.index(c) for c in text])) for x, text in train]
    torch.manual_seed(0)
    layer = torch.nn.Linear(len(mean), 1 + len(letters)).to(mean.device)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * math.ceil(len(rows) / 8))
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows)).split(8):
            frames, targets = zip(*(rows[i] for i in chosen))
            log_probs = layer(pad_sequence(frames)).log_softmax(-1).cpu()                             # (T, B, V)
            loss = F.ctc_loss(log_probs, torch.cat(targets), torch.tensor([len(x) for x in frames]),
                              torch.tensor([len(y) for y in targets]), zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    errors = Errors()
    for x, text in dev:
        best = layer((x - mean) / std).argmax(-1).unique_consecutive().tolist()
        errors += word_errors(" ".join(text), " ".join(letters[k - 1] for k in best if k))
    return errors.rate


def probe_batches(args, say):
    """-> [batches to learn from, batches to score on] of PROBE_SECONDS, of transcribed audio if there is any"""
    sets, parts = data.load_training_data(args, say), []
    for utterances, seconds in zip(sets, PROBE_SECONDS):
        some = [u for u in utterances if data.normalise(u.text or "")] or utterances
        some = [some[i] for i in torch.randperm(len(some), generator=torch.Generator().manual_seed(0))]
        count = 1 + bisect.bisect(list(itertools.accumulate(u.seconds for u in some)), seconds)
        parts.append(list(data.Loader(some[:count], args.batch_seconds, waveforms=True).epoch()))
    parts = [[batch for batch in part if batch.ids] for part in parts]
    if not all(parts):
        raise UserError("none of the audio can be read; python data.py check PATH says why")
    return parts


def probe(args, device, say):
    """--probe: what the teachers are, how fast, and how well a linear layer reads characters off their embeddings."""
    parts = probe_batches(args, say)
    texts = [[data.normalise(text or "").replace(" ", "") for batch in part for text in batch.texts] for part in parts]
    transcribed = all(all(part) for part in texts)
    teachers, targets = load_teachers(args, device, say)
    say("| teacher | parameters | frames | target width | s of audio/s | characters wrong |\n|---|---|---|---|---|---|")

    def row(name, about, frames):
        rate = "unknown"
        if transcribed:
            rate = f"{character_errors(*(list(zip(*pair)) for pair in zip(frames, texts))):.1f} %"
        say(f"| {name} | {about} | {rate} |")

    names = (target.name for target in targets)
    for teacher in teachers:
        started = time.perf_counter()
        heard = [[e[:n] for batch in part for e, n in zip(*teacher.embed(batch.waveforms))] for part in parts]
        speed = sum(batch.seconds for part in parts for batch in part) / (time.perf_counter() - started)
        for k, (clock, width) in enumerate(zip(teacher.clocks, teacher.widths)):
            row(next(names), f"{teacher.parameters / 1e6:.1f} M | {clock.rate:.4g} Hz | {width} | {speed:.0f}",
                [[e.split(teacher.widths, dim=1)[k] for e in part] for part in heard])
    row("log-mel features", " | 100 Hz | 320 | ",
        [[F.pad(x, (0, 0, 0, 1))[:(n + 1) // 4 * 4].reshape(-1, 320) for batch in part
          for x, n in zip(batch.features, batch.feature_lengths)] for part in parts])
    say("A linear CTC layer reads the characters: a teacher is worth having where it reads far more than off log-mel."
        if transcribed else "Give transcribed --data and --dev to learn whether its embeddings tell phones apart.")
    return 0


@running.polite
def main(argv=None):
    args = options(argv)

    # ---- machine, run, data
    device, dtype, why = running.choose_device(args.device)
    rank, world = running.start_processes(device)
    say = print if rank == 0 else lambda line: None
    say(why)
    if args.probe:
        return probe(args, device, say)
    # embeddings in float16 are another experiment, where they lie is not
    settings = argparse.Namespace(**vars(args) | {"cache": "used" if args.cache else None})
    this = running.Run(settings, rank, world, model.load_checkpoint, model.save_checkpoint)
    if this.finished:
        say(f"{args.out} is finished; next: python finetune_rnnt.py --init {args.out}   (--overwrite starts anew)")
        return 0
    train_set, dev_set = data.load_training_data(args, say)

    # ---- teachers, or what they once said
    teachers, targets = load_teachers(args, device, say)
    caches = []
    if args.cache:
        caches, train_set, dev_set = remember(args, teachers, train_set, dev_set, say, rank, world)
    source = {"caches": caches} if caches else {"waveforms": True}
    loader = data.Loader(train_set, args.batch_seconds, augment=True, masks=args.spec_augment, speeds=args.speeds,
                         workers=args.workers, seed=args.seed, rank=rank, world=world, **source)
    dev = data.Loader(dev_set, args.batch_seconds, workers=args.workers, **source)
    plain = [1.0] if 1.0 in args.speeds else args.speeds
    standardise(teachers, data.Loader(train_set, args.batch_seconds, augment=True, speeds=plain, seed=args.seed,
                                      **source), this.state)
    heads = targets if args.combine == "heads" else [Target(args.combine, targets[0].width, 1.0, args.loss[0])]
    weights = [target.weight for target in targets]

    # ---- student
    torch.manual_seed(args.seed)
    student = model.Student(replace(model.PRESETS[args.size], head_dims=tuple(head.width for head in heads),
                                    chunk=args.chunk, left=args.left, dropout=args.dropout)).to(device)
    say(f"student {args.size}: {student.parameter_count / 1e6:.1f} M parameters, heads "
        f"{', '.join(f'{head.name} {head.width}' for head in heads)}, {student.config.listening}")
    optimizer = training.Muon(student, args.lr)

    def compute_loss(batch):
        total, frames, parts = stage1_loss(student, batch, teacher_targets(teachers, batch, args.combine, weights),
                                           [head.weight for head in heads], [head.loss for head in heads])
        return total, frames, {head.name: part for head, part in zip(heads, parts)}

    def evaluate(student):
        means = mean_losses(student, teachers, targets, dev)
        return {f"dev {name}": mean for name, mean in means.items()}, sum(t.weight * means[t.name] for t in targets)

    extra = {"config": student.config, "stage": 1, "size": args.size,
             "teachers": [teacher.state() for teacher in teachers], "combine": args.combine}
    code = training.Training(this, student, loader, compute_loss, evaluate, optimizer, extra, device, dtype, rank,
                             world).loop()
    if code == 0:
        say(f"next: python finetune_rnnt.py --init {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
