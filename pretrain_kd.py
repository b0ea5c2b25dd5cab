"""Stage 1: several frozen speech foundation models teach the student's encoder by their embeddings; no transcripts.

    python pretrain_kd.py                 # the demo: two small teachers, 1.2 h of audio; minutes on a laptop CPU
    python pretrain_kd.py --data LibriSpeech/train-clean-100 --unlabelled LibriSpeech/train-clean-360 \\
        --teachers microsoft/wavlm-base-plus facebook/hubert-base-ls960:9 openai/whisper-base \\
        --size small --steps 60000 --batch-seconds 400 --out exp/pretrain-100h                       # one GPU
    torchrun --nproc_per_node 8 pretrain_kd.py ...            # eight GPUs, the same arguments

    p_k = Linear_k(h),   L = sum_k w_k * mean |p_k - e_k|     # arXiv 2303.10917; e_k standardised, see Teacher
"""
import argparse
import bisect
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

import data
import losses
import model
import run as running
from run import DEMO, UserError

STUDENT_HOP = 4 * data.HOP              # samples, 40 ms: the student's 25 Hz


# ---------------------------------------------------------------------------- teachers

def load_encoder(name):
    """-> (feature extractor, encoder in float32) of a hub name or folder; a folder is read without any network call.

    Raises UserError that says what to do: another name, `hf download`, a token, another kind of model.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(name).is_dir()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        classes = transformers.MODEL_MAPPING.get(type(config), None)
        listens = getattr(classes[0] if isinstance(classes, tuple) else classes, "main_input_name", None)
        kind = {"input_ids": "text", "pixel_values": "vision"}.get(listens)
        if kind is None:
            extractor = AutoFeatureExtractor.from_pretrained(name, local_files_only=local)
            whole, found = AutoModel.from_pretrained(name, dtype=torch.float32, local_files_only=local,
                                                     output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"teacher {name}: {why_not_loaded(name, local, error)}")
    if kind:
        raise UserError(f"teacher {name}: a {kind} model ({config.model_type}); a teacher must be a speech model")
    if getattr(extractor, "sampling_rate", None) != data.SAMPLE_RATE:
        raise UserError(f"teacher {name}: not a speech model that listens at {data.SAMPLE_RATE} Hz")
    missing = [key for key in found["missing_keys"] if "masked_spec_embed" not in key]  # (only used while masking)
    if missing:
        raise UserError(f"teacher {name}: its weights lack {len(missing)} tensors (e.g. {missing[0]}), which would be "
                        f"random; save the model again or choose another")
    encoder = whole.get_encoder()  # of Whisper, Moonshine, Parakeet: a model; of the others: a part that hears no audio
    return extractor, encoder if isinstance(encoder, transformers.PreTrainedModel) else whole


def why_not_loaded(name, local, error):
    """The cause in the user's words, and the cure."""
    text = str(error).strip() or type(error).__name__
    if "gated repo" in text or "401 Client Error" in text:
        return (f"its owner grants access on request: ask at https://huggingface.co/{name}, then log in with `hf auth "
                f"login` or set HF_TOKEN")
    if local:
        return f"{text.splitlines()[0]} - the folder must hold what `hf download` or save_pretrained leaves there"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "no such folder"
    if "not a valid model identifier" in text:
        return "the hub has no such model; give owner/name as https://huggingface.co spells it, or a folder"
    if "connect" in text or "offline" in text:
        return (f"not on this machine and the hub cannot be asked (HF_HUB_OFFLINE or no network); where there is one: "
                f"hf download {name}   (kept in HF_HOME)")
    return f"{text.splitlines()[0]} - give a folder or a hub name of a speech model"


@dataclass(frozen=True)
class Clock:
    """Which samples the frames of a layer belong to. Every encoder is a chain of convolutions, so S samples give
    (S + offset) // hop frames, and frame i is centred on sample i * hop + (hop - offset) / 2."""
    hop: int        # samples from frame to frame
    offset: int     # samples; negative: a frame needs more than a hop, positive: the ends are padded
    width: int      # D

    def frames(self, samples):
        return max(1, (samples + self.offset) // self.hop)

    @property
    def centre(self):
        return (self.hop - self.offset) / 2  # of the first frame, in samples

    @property
    def stack(self):
        return max(1, round(STUDENT_HOP / self.hop))  # teacher frames to a student frame

    @property
    def rate(self):
        return data.SAMPLE_RATE / self.hop


class Teacher:
    """A frozen Hugging Face audio encoder: Teacher("name-or-folder[:layer,layer]")(waveforms) -> embeddings at the
    student's 25 Hz.

    layers: "last" (default) or numbers of hidden layers, 0 being what enters the first one; each becomes a target.
    widths: of the targets; a teacher of 50 Hz gives its frames 2t and 2t+1 side by side for student frame t, so 2D;
    other rates (Moonshine: 41.7 Hz) are first interpolated linearly, see `align`. dim: their sum.
    mean, std (dim,): set by `standardise`, else 0 and 1.
    One law: the embedding of an utterance does not depend on its batch. Some architectures break it when padded (group
    norm before the first layer sees the padding), so we measure it at the start: those listen to one at a time. Frame
    rates are measured too; so no list of families stands here.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32):
        self.spec, self.device, self.dtype = name, torch.device(device), torch.float32
        self.name, _, layers = name.rpartition(":") if ":" in name and not Path(name).exists() else (name, "", "last")
        self.extractor, encoder = load_encoder(self.name)
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in encoder.parameters())
        self.window = getattr(self.extractor, "n_samples", None)  # Whisper: every input has this length
        self.layers = self._choose(layers.split(","))

        # ---- clocks and widths; does padding change an embedding?
        self.batched, self.clocks = False, self._measure()
        self.widths = [clock.stack * clock.width for clock in self.clocks]
        self.dim = sum(self.widths)
        self.mean, self.std = torch.zeros(self.dim, device=self.device), torch.ones(self.dim, device=self.device)
        noise = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (16_000, 28_000)]
        alone, self.batched = self._listen(noise[:1])[0], True
        self.batched = all(a.shape == b.shape and bool((a - b).norm() < 1e-3 * a.norm())
                           for a, b in zip(alone, self._listen(noise)[0]))
        self.dtype = dtype

    def __str__(self):
        rates = ", ".join(dict.fromkeys(f"{clock.rate:.4g} Hz" for clock in self.clocks))
        return (f"{self.spec}: {type(self.encoder).__name__}, {self.parameters / 1e6:.1f} M parameters, {rates}, layer "
                f"{', '.join(self.layers)}, target {' + '.join(map(str, self.widths))} wide, "
                f"{'in batches' if self.batched else 'one utterance at a time (padding would change it)'}")

    def __call__(self, waveforms, lengths=None):
        """waveforms: list of (S,) at 16 kHz, or (B, S) padded with lengths (B,) -> standardised embeddings (B, T, dim),
        lengths (B,) at 25 Hz: T is the number of the student's frames."""
        if lengths is not None:
            waveforms = [w[:n] for w, n in zip(waveforms, lengths.tolist())]
        embeddings, lengths = self.embed(waveforms)
        return (embeddings - self.mean) / self.std, lengths

    def embed(self, waveforms):
        """list of (S,) -> embeddings (B, T, dim) as they are, lengths (B,)"""
        shortest = max(clock.hop - clock.offset for clock in self.clocks)  # that give a frame
        heard = self._listen([F.pad(w.cpu(), (0, max(0, shortest - len(w)))) for w in waveforms])
        rows = [torch.cat([align(states, len(w), clock) for states, clock in zip(layers, self.clocks)], dim=1)
                for w, layers in zip(waveforms, heard)]
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=self.device)

    def _choose(self, layers):
        """The layers asked for, where the encoder has them; deeper ones are dropped, nobody would listen to them."""
        count = len(self._run([torch.zeros(16_000)], True).hidden_states) - 1
        wrong = [k for k in layers if k != "last" and not (k.isdigit() and int(k) <= count)]
        if wrong or len(set(layers)) < len(layers):
            what = f"{self.name} has no layer {wrong[0]!r}" if wrong else f"{self.spec} names a layer twice"
            raise UserError(f"teacher {what}; choose {self.name}:last, one of {self.name}:0 to {self.name}:{count}, or "
                            f"several: {self.name}:{count // 2},{count}")
        parts = dict(self.encoder.named_modules())
        stack = parts.get("layers", parts.get("encoder.layers"))
        if stack is not None and "last" not in layers:
            del stack[max(map(int, layers)) + 1:]  # one more stays: some families put a norm behind the last one
        return layers

    def _measure(self):
        """-> Clock of each layer, from how the number of frames grows with that of samples."""
        count = functools.cache(lambda samples: [s.shape[1] for s in self._encode([torch.zeros(samples)])])
        start, more, clocks = 16_000, 76_800, []  # 4.8 s: a whole number of frames at every rate in use
        for k, states in enumerate(self._encode([torch.zeros(start)])):
            if self.window:
                hop, offset = self.window // states.shape[1], 0
            elif count(start + more)[k] == count(start)[k]:
                raise UserError(f"teacher {self.name}: gives {count(start)[k]} frames however long the audio is; a "
                                f"teacher must follow the audio frame by frame")
            else:
                hop = more // (count(start + more)[k] - count(start)[k])
                one_more = bisect.bisect(range(start, start + hop), count(start)[k], key=lambda n: count(n)[k])
                offset = (count(start)[k] + 1) * hop - (start + one_more)
            clocks.append(Clock(hop, offset, states.shape[2]))
        return clocks

    def _listen(self, waveforms):
        """list of (S,) -> for each utterance the frames of its layers, (n, D) at the teacher's own rates, float32."""
        pieces = [w.split(self.window or len(w)) for w in waveforms]  # longer than a window: each window as if alone
        every = [p for ps in pieces for p in ps]
        rows = iter([[states[b, :clock.frames(len(p))] for states, clock in zip(layers, self.clocks)]
                     for group in ([every] if self.batched else [[p] for p in every])
                     for layers in [self._encode(group)] for b, p in enumerate(group)])
        return [[torch.cat(layer) for layer in zip(*(next(rows) for _ in ps))] for ps in pieces]

    def _encode(self, waveforms):
        """list of (S,) -> for each layer asked for its states (B, n, D), padded, float32"""
        out = self._run(waveforms, any(k != "last" for k in self.layers))
        states = [out.last_hidden_state if k == "last" else out.hidden_states[int(k)] for k in self.layers]
        valid = getattr(out, "attention_mask", None)  # of frames; some families make one that hears no audio at all
        return [s[:, :None if valid is None else int(valid.sum(1).max())].float() for s in states]

    @torch.no_grad()
    def _run(self, waveforms, hidden_states):
        """What transformers' own feature extractor (it knows whether to normalise) and encoder make of them."""
        length = {} if self.window else {"padding": "longest", "return_attention_mask": True}
        inputs = self.extractor([w.numpy() for w in waveforms], sampling_rate=data.SAMPLE_RATE, return_tensors="pt",
                                **length)
        if inputs.get("attention_mask", torch.zeros(1)).all():
            del inputs["attention_mask"]  # it hides nothing; group-norm models never saw one in their training
        with running.autocast(self.device, self.dtype):
            return self.encoder(**inputs.to(self.device), output_hidden_states=hidden_states)

    @torch.no_grad()
    def standardise(self, batches):
        """Set mean and std per dimension from the first batches (lists of waveforms): teachers of different scale then
        weigh alike in an L1. [ours]"""
        count, total, squares = 0, 0.0, 0.0
        for waveforms in batches:
            e, lengths = self.embed(waveforms)
            frames = e[losses.valid_mask(lengths, e.shape[1])].cpu().double()  # on the CPU: MPS has no float64
            count, total, squares = count + len(frames), total + frames.sum(0), squares + (frames ** 2).sum(0)
        mean = total / count
        self.mean = mean.float().to(self.device)
        self.std = (squares / count - mean ** 2).clamp(min=1e-10).sqrt().float().to(self.device)

    def state(self):
        """What a checkpoint says about a teacher."""
        return {"spec": self.spec, "dim": self.dim, "mean": self.mean.cpu(), "std": self.std.cpu()}


def align(states, samples, clock):
    """(n, D) frames of a clock -> (T, stack * D), T the student's frames of so many samples: target t is made of the
    teacher's frames within [40 t, 40 t + 40) ms.

    A clock that does not divide the 40 ms is read in between, linearly, at the middle of each stack-th of them. Past
    the last frame its value is held: half a pair at the end is its last frame twice.
    """
    T, stack = max(1, (samples + STUDENT_HOP // 2) // STUDENT_HOP), clock.stack
    at = torch.arange(T * stack, device=states.device)
    if clock.hop * stack != STUDENT_HOP:
        at = (((at + 0.5) * STUDENT_HOP / stack - clock.centre) / clock.hop).clamp(min=0)
    low = at.long().clamp(max=len(states) - 1)
    high = (low + 1).clamp(max=len(states) - 1)
    return torch.lerp(states[low], states[high], (at - low)[:, None].clamp(0, 1).float()).reshape(T, -1)


# ---------------------------------------------------------------------------- the method

def teacher_targets(teachers, batch, combine="heads", weights=None):
    """What each projection head has to predict: list of (B, T, D), one per head. Each layer of a teacher is a target.

    heads: a head for each target.   average: one head, the weighted mean of the targets, standardised as they are.
    random: one head, for each utterance one of the targets, drawn by weight.
    """
    targets = [target for teacher in teachers for target in teacher(batch.waveforms)[0].split(teacher.widths, dim=-1)]
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
    parts = [losses.distillation_loss(head(hidden).float(), target, lengths, kind)[0] / lengths.sum()
             for head, target, kind in zip(student.heads, targets, kinds)]
    return sum(w * part for w, part in zip(weights, parts)) * lengths.sum(), lengths.sum(), parts


def options(argv):
    """What the user asked for; a UserError where it does not fit together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_source_options(parser, unlabelled=True)
    group = parser.add_argument_group("teachers and student")
    group.add_argument("--teachers", nargs="+", metavar="NAME[:LAYER,...]",
                       default=[str(DEMO / "teachers/hubert"), str(DEMO / "teachers/whisper")],
                       help="frozen teachers: Hugging Face hub names or folders, with one or more hidden layers or "
                            "'last' (default: the demo's two)")
    group.add_argument("--weights", nargs="+", type=float, metavar="W",
                       help="weight of each teacher, shared by its layers (default: 1 each)")
    group.add_argument("--loss", nargs="+", choices=list(losses.DISTANCES), default=["l1"],
                       help="distance to the teachers, one for all or one for each (default l1)")
    group.add_argument("--combine", choices=["heads", "average", "random"], default="heads",
                       help="a head per teacher; or one head for the "
                       "teachers' average; or one head and a random teacher per utterance (default %(default)s)")
    group.add_argument("--size", choices=list(model.PRESETS), default="nano",
                       help="student (default %(default)s; with a vocabulary of 256: nano 3.0 M parameters, "
                       "small 9.5 M, medium 31 M, large 115 M)")
    group.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    running.add_training_options(parser, out="exp/pretrain", steps=1050)
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
    short = [teacher.name.rstrip("/").rpartition("/")[2] for teacher in teachers]
    for k, teacher in enumerate(teachers):
        name = short[k] if short.count(short[k]) == 1 else teacher.name
        weight = (args.weights or [1.0] * len(teachers))[k] / len(teacher.layers)
        targets += [Target(name if layer == "last" else f"{name}:{layer}", width, weight, args.loss[k % len(args.loss)])
                    for layer, width in zip(teacher.layers, teacher.widths)]
    if args.combine != "heads" and len({target.width for target in targets}) > 1:
        raise UserError(f"--combine {args.combine} needs targets of one width, found "
                        f"{', '.join(f'{t.name} {t.width}' for t in targets)}; use --combine heads")
    return teachers, targets


def standardise(teachers, args, train_set, state):
    """The teachers' means and deviations: those of the run that goes on, or measured on the first 200 s of training."""
    if state:
        for teacher, old in zip(teachers, state["teachers"]):
            teacher.mean, teacher.std = old["mean"].to(teacher.device), old["std"].to(teacher.device)
        return
    first = data.Loader(train_set, args.batch_seconds, waveforms=True, augment=True, seed=args.seed).epoch(0)
    count = max(4, math.ceil(200 / args.batch_seconds))
    batches = [batch.waveforms for _, batch in zip(range(count), first) if batch.ids]
    if not batches:
        raise UserError("none of the training audio can be read; python data.py check PATH says why")
    for teacher in teachers:
        teacher.standardise(batches)


@running.polite
def main(argv=None):
    args = options(argv)

    # ---- machine, run, data
    device, dtype, why = running.choose_device(args.device)
    rank, world = running.start_processes(device)
    say = print if rank == 0 else lambda line: None
    say(why)
    this = running.Run(args, rank, world, model.load_checkpoint, model.save_checkpoint)
    if this.finished:
        say(f"{args.out} is finished; next: python finetune_rnnt.py --init {args.out}   (--overwrite starts anew)")
        return 0
    train_set, dev_set = data.load_training_data(args, say)
    loader = data.Loader(train_set, args.batch_seconds, waveforms=True, augment=True, speeds=args.speeds,
                         workers=args.workers, seed=args.seed, rank=rank, world=world)
    dev = data.Loader(dev_set, args.batch_seconds, waveforms=True, workers=args.workers)

    # ---- teachers
    teachers, targets = load_teachers(args, device, say)
    standardise(teachers, args, train_set, this.state)
    heads = targets if args.combine == "heads" else [Target(args.combine, targets[0].width, 1.0, args.loss[0])]
    weights = [target.weight for target in targets]

    # ---- student
    torch.manual_seed(args.seed)
    student = model.Student(replace(model.PRESETS[args.size], head_dims=tuple(head.width for head in heads))).to(device)
    say(f"student {args.size}: {student.parameter_count / 1e6:.1f} M parameters, heads "
        f"{', '.join(f'{head.name} {head.width}' for head in heads)}")
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)

    def compute_loss(batch):
        total, frames, parts = stage1_loss(student, batch, teacher_targets(teachers, batch, args.combine, weights),
                                           [head.weight for head in heads], [head.loss for head in heads])
        return total, frames, {head.name: part for head, part in zip(heads, parts)}

    def evaluate(student):
        """Mean loss per target on the development audio; for l1, 0.8 is what predicting the mean scores on normally
        distributed targets."""
        sums, frames = torch.zeros(len(targets)), 0
        for batch in filter(lambda batch: batch.ids, dev.epoch()):
            hidden, lengths = student.encoder(batch.features.to(device), batch.feature_lengths.to(device))
            for k, (target, truth) in enumerate(zip(targets, teacher_targets(teachers, batch))):
                head = student.heads[min(k, len(heads) - 1)]
                sums[k] += losses.distillation_loss(head(hidden), truth, lengths, target.loss)[0].item()
            frames += lengths.sum().item()
        if not frames:
            raise UserError("none of the --dev audio can be read; python data.py check PATH says why")
        means = (sums / frames).tolist()
        return ({f"dev {target.name}": mean for target, mean in zip(targets, means)},
                sum(weight * mean for weight, mean in zip(weights, means)))

    extra = {"config": student.config, "stage": 1, "size": args.size,
             "teachers": [teacher.state() for teacher in teachers], "combine": args.combine}
    code = running.train(this, student, loader, compute_loss, evaluate, optimizer, extra, device, dtype, rank, world)
    if code == 0:
        say(f"next: python finetune_rnnt.py --init {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
