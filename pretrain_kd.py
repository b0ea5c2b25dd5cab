"""Stage 1: several frozen speech foundation models teach the student's encoder by their embeddings.

    python pretrain_kd.py          # the demo: two small teachers, 1.2 h of audio; minutes on a CPU
    python pretrain_kd.py --data LibriSpeech/train-clean-100 \\
        --unlabelled LibriSpeech/train-clean-360 --dev LibriSpeech/dev-clean \\
        --teachers microsoft/wavlm-base-plus openai/whisper-base \\
        --size small --steps 60000 --batch-seconds 400 --spec-augment 27 --dropout 0.1 \\
        --out exp/pretrain-100h                              # one GPU
    torchrun --nproc_per_node 8 pretrain_kd.py ...           # eight GPUs, the same arguments
    python pretrain_kd.py --probe --data ... --teachers ...  # is it a teacher at all? a minute each
    python pretrain_kd.py --cache DIR ...                    # teachers encode once, then from disk

    p_k = Linear_k(h),   L = sum_k w_k * mean |p_k - e_k|    # arXiv 2303.10917; a head each [ours]
    e_k: the frames of teacher k at the student's 25 Hz, standardised [ours]

No transcripts are needed. On the demo expect an L1 of about 0.37 and 0.35 on voices of --dev, where
0.8 is what predicting the mean would score (RESULTS.md).
"""

from tools import quiet_start  # noqa: F401  (first: Ctrl-C while the rest is imported)

import functools
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import model
from tools import probe, teacher_cache, training
from tools.command_line import Parser, UserError, one_line_errors, positive_float
from tools.encoders import SpeechEncoder, noise, split_spec
from tools.machine import choose_device, fast_dtype
from tools.muon import Muon, matrices_of, parameters_but


# ---------------------------------------- a teacher


class Teacher:
    """A frozen speech foundation model: Teacher("name-or-folder[:layer,layer]")(waveforms) gives
    embeddings at the student's 25 Hz. A module of your own is one too: "my_teacher.py:MyTeacher",
    see tools/encoders.py.

    layers: "last" (the default) or numbers of hidden layers, 0 being what enters the first one.
        Each of them becomes a target.
    clocks: of each layer, when its frames are.
    widths: of the targets, see `align`: twice a layer's for a teacher of 50 Hz.   dim: their sum.
    mean, std (dim,): of the embeddings, set by `measure_statistics`; until then 0 and 1.
    An utterance's embedding does not depend on its batch.
    Raises UserError for all that cannot be loaded, cannot be run or is no speech encoder.
    """

    def __init__(self, spec, device="cpu", dtype=torch.float32):
        self.spec = spec
        self.device = torch.device(device)
        self.encoder = SpeechEncoder(spec, self.device, dtype)
        self.name = self.encoder.name
        self.title = self.encoder.title
        self.layers = self.encoder.layers
        self.clocks = self.encoder.clocks
        self.parameters = self.encoder.parameters
        self.widths = []
        for clock, D in zip(self.clocks, self.encoder.dims):
            self.widths.append(frames_per_target(clock) * D)
        self.dim = sum(self.widths)
        self.mean = torch.zeros(self.dim, device=self.device)
        self.std = torch.ones(self.dim, device=self.device)

    def __str__(self):
        return f"{self.spec}: {self.encoder}, target {' + '.join(map(str, self.widths))} wide"

    def __call__(self, waveforms, lengths=None):
        """-> standardised embeddings (B, T, dim), lengths (B,): T is that of the student's encoder

        waveforms: list of (S,) at 16 kHz, or (B, S) padded, with lengths (B,) in samples.
        """
        if lengths is not None:
            waveforms = [wave[:length] for wave, length in zip(waveforms, lengths.tolist())]
        embeddings, lengths = self.embed(waveforms)
        return self.standardised(embeddings), lengths

    def embed(self, waveforms):
        """list of (S,) -> embeddings (B, T, dim) as they are, padded with 0, and lengths (B,)"""
        rows = []
        for waveform, layers in zip(waveforms, self.encoder.encode(waveforms)):
            # The layers of a teacher stand side by side.
            targets = []
            for states, clock in zip(layers, self.clocks):
                targets.append(align(states, len(waveform), clock))
            rows.append(torch.cat(targets, dim=1))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return pad_sequence(rows, batch_first=True), lengths

    def standardised(self, embeddings):
        """(B, T, dim) as they are, from `embed` or a cache -> mean 0, deviation 1 per dimension"""
        return (embeddings.to(self.device, torch.float32) - self.mean) / self.std

    def measure_statistics(self, batches):
        """Measure mean and deviation per dimension: teachers of different scale then weigh alike
        in an L1. [ours]

        batches: pairs of embeddings (B, T, dim), as they are, and lengths (B,).
        """
        count = 0
        total = 0.0
        squares = 0.0
        for embeddings, lengths in batches:
            valid = model.valid_mask(lengths.cpu(), embeddings.shape[1])
            frames = embeddings.cpu()[valid].double()
            count += len(frames)
            total += frames.sum(0)
            squares += (frames**2).sum(0)
        mean = total / count
        variance = squares / count - mean**2
        self.mean = mean.float().to(self.device)
        self.std = variance.clamp(min=1e-10).sqrt().float().to(self.device)

    @functools.cached_property
    def fingerprint(self):
        """64 numbers of the embedding of a fixed second of noise: those of other weights, layers
        or libraries differ"""
        embeddings, _ = self.embed([noise(data.SAMPLE_RATE)])
        values = embeddings.flatten()
        chosen = torch.linspace(0, len(values) - 1, 64).long()
        return values[chosen].tolist()

    def state(self):
        """What a checkpoint keeps of a teacher, in plain types and tensors"""
        return {
            "spec": self.spec,
            "dim": self.dim,
            "mean": self.mean.cpu(),
            "std": self.std.cpu(),
            "fingerprint": self.fingerprint,
        }

    def load_state(self, state):
        """Standardise as in the run whose checkpoint this state is from.

        Raises UserError if this is another teacher than it was there.
        """
        before = torch.tensor(state["fingerprint"])
        now = torch.tensor(self.fingerprint)
        # bfloat16 on another device differs from float32 by less.
        if (now - before).norm() > 0.05 * before.norm():
            raise UserError(
                f"teacher {self.spec} gives other embeddings than when this run began (its weights "
                f"or libraries changed; a module of your own must seed its weights); add "
                f"--overwrite or choose another --out"
            )
        self.mean = state["mean"].to(self.device)
        self.std = state["std"].to(self.device)

    def release(self):
        """Free the encoder's memory: from now on the embeddings come from a cache."""
        self.encoder = None


# ---------------------------------------- its targets in time


def frames_per_target(clock):
    """How many of a teacher's frames fill 40 ms, at least one"""
    return max(1, round(data.FRAME / clock.hop))


def align(states, samples, clock):
    """Frames at the teacher's rate (n, D) -> targets at the student's (T, frames_per_target * D)

    Target t is the teacher's frames of [40 t, 40 t + 40) ms, side by side: 2t and 2t+1 of a
    teacher of 50 Hz, as in the authors' code. Where its hop divides 40 ms they are whole frames,
    the nearest, so that they are off by at most half a frame; others (Moonshine: 41.7 Hz) are
    interpolated linearly. Before the first and behind the last frame their values are held. [ours]
    """
    T = max(1, model.encoder_frames(samples // data.HOP + 1))
    stack = frames_per_target(clock)
    part = torch.arange(T * stack, dtype=torch.float64)  # on the CPU, because MPS has no float64
    # Where in the audio the parts of the targets are centred, in samples ...
    middle = (part + 0.5) * data.FRAME / stack
    # ... and which of the teacher's frames lies there: 3.25 is between the third and the fourth.
    position = (middle - clock.centre) / clock.hop
    if clock.hop * stack == data.FRAME:
        # The nearest; unlike round(), this treats all halves alike.
        position = torch.ceil(position - 0.5)
    position = position.clamp(0, len(states) - 1)
    before = position.long()
    after = (before + 1).clamp(max=len(states) - 1)
    fraction = (position - before).float()[:, None].to(states.device)
    return torch.lerp(states[before], states[after], fraction).reshape(T, -1)


def target_names(teachers):
    """-> a unique name for each target: "wavlm-base-plus", "hubert:9"; the whole name if need be

    The targets are the layers of the first teacher, then those of the second, and so on.
    """
    titles = [teacher.title for teacher in teachers]
    names = []
    for teacher in teachers:
        title = teacher.title
        if titles.count(title) > 1:
            title = teacher.name
        for layer in teacher.layers:
            names.append(title if layer == "last" else f"{title}:{layer}")
    return names


def teacher_targets(teachers, batch, combine="heads", weights=None):
    """What each projection head has to predict: list of (B, T, D) in float32, one per head

    heads: a head for each target.   average: one head, the weighted mean of the targets.
    random: one head; for each utterance one of the targets, drawn by its weight.
    The authors' code knows the last two, the first is [ours].
    weights: of the targets, for average and random.
    batch.waveforms: list of B (S,);   batch.embeddings: what caches hold instead, or empty.
    """
    # The training's autocast is for the student: feature extractors may fail under it.
    with torch.no_grad(), torch.autocast(teachers[0].device.type, enabled=False):
        targets = []
        for k, teacher in enumerate(teachers):
            if batch.embeddings:
                embeddings = batch.embeddings[k]
            else:
                embeddings, _ = teacher.embed(batch.waveforms)
            targets += teacher.standardised(embeddings).split(teacher.widths, dim=-1)
        if combine == "heads":
            return targets

        targets = torch.stack(targets)  # (K, B, T, D)
        weights = torch.tensor(weights)
        if combine == "average":
            shares = (weights / weights.sum()).to(targets)
            return [(shares[:, None, None, None] * targets).sum(0)]
        B = targets.shape[1]
        drawn = torch.multinomial(weights, B, replacement=True)
        return [targets[drawn, torch.arange(B)]]


# ---------------------------------------- options


def parse(argv):
    parser = Parser(__doc__)
    data.add_source_options(parser)
    group = parser.add_argument_group("teachers and student")
    demo_teachers = [str(data.DEMO / "teachers" / name) for name in ("hubert", "whisper")]
    group.add_argument(
        "--teachers",
        nargs="+",
        metavar="NAME[:LAYER,...]",
        default=demo_teachers,
        help="Hugging Face names or folders, with one or more hidden layers or 'last'; or "
        "FILE.py:CLASS, a module of your own (default: the demo's two)",
    )
    group.add_argument(
        "--weights",
        nargs="+",
        type=positive_float,
        metavar="W",
        help="weight of each teacher, shared by its layers (default: 1 each)",
    )
    group.add_argument(
        "--combine",
        choices=["heads", "average", "random"],
        default="heads",
        help="a projection head for each target (layer of a teacher); or one head for their "
        "average; or one head and a random target per utterance (default %(default)s)",
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the teachers' embeddings there (float16; the size is printed first) and train "
        "from them: a step then costs what the student costs",
    )
    group.add_argument(
        "--probe",
        action="store_true",
        help="train nothing; print what the teachers are, how fast, and how well a linear layer "
        "reads transcripts off their embeddings (about a minute each)",
    )
    group.add_argument(
        "--size",
        choices=list(model.PRESETS),
        default="nano",
        help="of the student (default %(default)s; in stage 2, with 256 tokens, nano has 2.9 M "
        "parameters, small 9.4 M, medium 30 M, large 113 M)",
    )
    group.add_argument(
        "--chunk",
        type=model.chunk_size,
        default=0,
        metavar="FRAMES|random",
        help="a streaming student, which encodes so many frames of 40 ms at once; 'random': one "
        "that can do both (default: whole utterances)",
    )
    group.add_argument(
        "--lr", type=positive_float, default=3e-3, help="peak learning rate (default %(default)s)"
    )
    training.add_training_options(parser, "exp/pretrain", steps=1050, dropout=0.0, spec_augment=0)
    args = parser.parse_args(argv)
    if args.weights is None:
        args.weights = [1.0] * len(args.teachers)
    if len(args.weights) != len(args.teachers):
        raise UserError(
            f"--weights needs one per teacher: {len(args.teachers)}, found {len(args.weights)}"
        )
    targets = []
    for spec in args.teachers:
        name, layers = split_spec(spec)
        targets += [(Path(name), layer) for layer in layers]
    if len(set(targets)) < len(targets):
        raise UserError("--teachers names a layer twice; a teacher counts more through --weights")
    return args


# ---------------------------------------- training


def new_optimizer(student, lr):
    """Muon takes the blocks' matrices, AdamW all else: biases, norms, convolutions, input layer
    and heads."""
    matrices = matrices_of(student.encoder.blocks)
    others = parameters_but(matrices, student)
    return Muon([{"params": others}, {"params": matrices, "muon": True}], lr)


def load_teachers(args, device, print_line):
    """-> (teachers, a weight for each of their targets)"""
    teachers = []
    weights = []
    for spec, weight in zip(args.teachers, args.weights):
        teacher = Teacher(spec, device, fast_dtype(device))
        teachers.append(teacher)
        weights += [weight / len(teacher.layers)] * len(teacher.layers)
        print_line(f"teacher {teacher}")
    widths = {width for teacher in teachers for width in teacher.widths}
    if args.combine != "heads" and len(widths) > 1:
        raise UserError(
            f"--combine {args.combine} needs targets of one width, found "
            f"{', '.join(map(str, sorted(widths)))}; use --combine heads"
        )
    return teachers, weights


def probe_teachers(args):
    """--probe: are these teachers at all? -> exit code"""
    device, _, about_device = choose_device(args.device)
    print(about_device)
    train_set, dev_set = data.load_training_data(args)
    teachers, _ = load_teachers(args, device, print)
    rank = model.PRESETS[args.size].dim
    probe.probe(teachers, target_names(teachers), train_set, dev_set, args.batch_seconds, rank)
    return 0


def measure_statistics(teachers, train_set, caches, args):
    """Give the teachers the means and deviations of the first batches of training: of about 200 s,
    and at least four.
    """
    # Audio as it is, where that is among the speeds: then a cache has it.
    speeds = [1.0] if 1.0 in args.speeds else args.speeds
    loader = data.Loader(
        train_set, args.batch_seconds, caches=caches, augment=True, speeds=speeds, seed=args.seed
    )
    enough = max(4, math.ceil(200 / args.batch_seconds))
    batches = []
    for batch in itertools.islice(loader.epoch(), enough):
        if batch.utterances:
            batches.append(batch)
    if not batches:
        raise UserError(
            "none of the training audio can be read; python -m tools.librispeech check PATH names "
            "why"
        )
    for k, teacher in enumerate(teachers):
        embedded = []
        for batch in batches:
            if batch.embeddings:
                frames = model.encoder_frames(batch.feature_lengths)
                embedded.append((batch.embeddings[k], frames))
            else:
                embedded.append(teacher.embed(batch.waveforms))
        teacher.measure_statistics(embedded)


@torch.no_grad()
def evaluate(student, teachers, names, weights, loader, run):
    """-> {"dev L1 NAME": mean over the frames of the development audio, "dev L1": weighted sum}

    Predicting the mean of a standardised target would score about 0.8. One head for all targets is
    measured against each.
    """
    heads = list(student.heads)
    if len(heads) == 1:
        heads *= len(names)
    sums = dict.fromkeys(names, 0.0)
    frames = 0
    for batch in loader.epoch():
        run.name_unreadable(batch)
        if not batch.utterances:
            continue
        batch = batch.to(run.device)
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
        targets = teacher_targets(teachers, batch)
        for name, head, target in zip(names, heads, targets):
            sums[name] += model.l1_loss(head(hidden), target, lengths).item()
        frames += lengths.sum().item()
    if frames == 0:
        raise UserError(
            "none of the --dev audio can be read; python -m tools.librispeech check PATH names why"
        )
    results = {f"dev L1 {name}": total / frames for name, total in sums.items()}
    means = list(results.values())
    results["dev L1"] = sum(weight * mean for weight, mean in zip(weights, means))
    return results


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.probe:
        return probe_teachers(args)
    run = training.Run(args)
    next_command = f"python finetune_rnnt.py --init {args.out}"
    if run.finished:
        run.print(f"{args.out} is finished; next: {next_command}   (--overwrite starts anew)")
        return 0

    # ---- data
    train_set, dev_set = data.load_training_data(args, quiet=run.rank > 0)
    run.check_settings(data.fingerprints(train_set, dev_set))

    # ---- teachers, or their embeddings from disk
    teachers, weights = load_teachers(args, run.device, run.print)
    names = target_names(teachers)
    caches = []
    if args.cache:
        caches, train_set, dev_set = teacher_cache.fill(
            args.cache,
            teachers,
            train_set,
            dev_set,
            args.speeds,
            args.batch_seconds,
            args.workers,
            run.rank,
            run.world,
        )
        for teacher in teachers:
            # Nothing is encoded any more: its memory is the student's now.
            teacher.release()
    loader = data.Loader(
        train_set,
        args.batch_seconds,
        caches=caches,
        augment=True,
        spec_augment=args.spec_augment,
        speeds=args.speeds,
        workers=args.workers,
        seed=args.seed,
        rank=run.rank,
        world=run.world,
    )
    dev_loader = data.Loader(dev_set, args.batch_seconds, caches=caches, workers=args.workers)
    if run.state:
        # Of an interrupted run, which goes on with the targets that it had.
        for teacher, state in zip(teachers, run.state["teachers"]):
            teacher.load_state(state)
    else:
        measure_statistics(teachers, train_set, caches, args)

    # ---- student
    widths = [width for teacher in teachers for width in teacher.widths]
    if args.combine == "heads":
        head_names = names
        head_weights = weights
        head_dims = widths
    else:
        # One projection head for all; load_teachers made sure that the targets are equally wide.
        head_names = [args.combine]
        head_weights = [1.0]
        head_dims = widths[:1]
    torch.manual_seed(args.seed)
    config = replace(
        model.PRESETS[args.size], head_dims=tuple(head_dims), chunk=args.chunk, dropout=args.dropout
    )
    student = model.Student(config).to(run.device)
    heads = [f"{name} {dim}" for name, dim in zip(head_names, head_dims)]
    run.print(
        f"student {args.size}: {student.parameter_count / 1e6:.1f} M parameters, projection heads "
        f"{', '.join(heads)}, {config.describes_input()}"
    )
    optimizer = new_optimizer(student, args.lr)

    # ---- the loop: the student's frames, through a head each, approach the teachers' embeddings
    states = [teacher.state() for teacher in teachers]
    about = {"config": config, "stage": 1, "teachers": states}
    # run.steps begins with a rehearsal (step 0: the largest batches, no update), then makes --steps
    # updates. A loss is a sum over frames; sum_gradients divides by the count of all processes.
    with run.start(student, optimizer, about, per="frame"):
        for _, batches in run.steps(loader):
            training.set_learning_rates(optimizer, run.progress)
            optimizer.zero_grad()
            for batch in batches:
                with run.autocast():
                    targets = teacher_targets(teachers, batch, args.combine, weights)
                    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
                    losses = []
                    for head, target in zip(student.heads, targets):
                        losses.append(model.l1_loss(head(hidden), target, lengths))
                    loss = sum(weight * l1 for weight, l1 in zip(head_weights, losses))
                loss.backward()
                parts = {f"L1 {name}": l1 for name, l1 in zip(head_names, losses)}
                run.add(batch, count=lengths.sum(), loss=loss, **parts)
            if run.sum_gradients():
                optimizer.step()
            run.average_weights()
            run.log()
            # The averaged weights are the result; best.pt keeps them where "dev L1" is lowest.
            if run.evaluation_is_due():
                results = evaluate(run.averaged, teachers, names, weights, dev_loader, run)
                run.keep_best("dev L1", results)
    return run.finish(next_command)


if __name__ == "__main__":
    sys.exit(main())
