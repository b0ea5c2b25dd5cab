"""Stage 1: several frozen speech foundation models teach the student's encoder by their embeddings; no transcripts.

    python pretrain_kd.py                 # the demo: two small teachers, 1.2 h of audio; minutes on a laptop CPU
    python pretrain_kd.py --data LibriSpeech/train-clean-100 --unlabelled LibriSpeech/train-clean-360 \\
        --teachers microsoft/wavlm-base-plus facebook/hubert-base-ls960:9 openai/whisper-base \\
        --size small --steps 60000 --batch-seconds 400 --out exp/pretrain-100h                       # one GPU
    torchrun --nproc_per_node 8 pretrain_kd.py ...            # eight GPUs, the same arguments

    p_k = Linear_k(h),   L = sum_k w_k * mean |p_k - e_k|     # arXiv 2303.10917; e_k standardised, see Teacher
"""
import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

import data
import losses
import model
import run as running
from run import DEMO, UserError

STUDENT_RATE = 25                       # frames per second


# ---------------------------------------------------------------------------- teachers

class Teacher:
    """A frozen Hugging Face audio encoder: Teacher("name-or-folder[:layer]")(waveforms) -> embeddings at the student's
    25 Hz.

    layer: "last" (default) or the number of a hidden layer, 0 being what enters the first one.
    dim: width of an embedding. A teacher of 50 Hz gives its frames 2t and 2t+1 side by side for student frame t, so
    dim is 2D; other rates (Moonshine: 41.7 Hz) are first interpolated linearly to the nearest multiple of 25 Hz.
    mean, std (dim,): set by `standardise`, else 0 and 1.
    One law: the embedding of an utterance does not depend on its batch. Some architectures break it when padded (group
    norm before the first layer sees the padding), so we measure it at the start: those listen to one at a time.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32):
        self.spec, self.device, self.dtype = name, torch.device(device), dtype
        self.name, _, layer = name.rpartition(":") if ":" in name and not Path(name).exists() else (name, "", "last")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(self.name)
            self.extractor = AutoFeatureExtractor.from_pretrained(self.name)
            encoder = AutoModel.from_pretrained(self.name, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"teacher {self.name}: {str(error).strip().splitlines()[0]} - give a folder or a hub name "
                            f"of a speech model with a feature extractor (hf "
                            f"download {self.name} fetches one; afterwards HF_HUB_OFFLINE=1 "
                            f"stays off the network)")
        if config.is_encoder_decoder:
            encoder = encoder.get_encoder()
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)
        if not hasattr(self.extractor, "sampling_rate") or self.extractor.sampling_rate != data.SAMPLE_RATE:
            raise UserError(f"teacher {self.name}: not a speech model that listens at {data.SAMPLE_RATE} Hz")
        self.batched = True
        self.window = getattr(self.extractor, "n_samples", None)  # Whisper: every input has this length
        self.layer = layer
        names = "encoder_layers", "encoder_num_hidden_layers", "num_hidden_layers"  # the families' words for the same
        layers = next(n for n in (getattr(config, name, None) for name in names) if n)
        if layer != "last" and not (layer.isdigit() and int(layer) <= layers):
            raise UserError(f"teacher {self.name} has no layer {layer!r}; choose {self.name}:last or {self.name}:0 to "
                            f"{self.name}:{layers}")

        # ---- frame rate and width, measured; 3.84 s is a whole number of frames at every rate in use
        short, long = self._listen([torch.zeros(16_000)])[0], self._listen([torch.zeros(16_000 + 61_440)])[0]
        self.rate = (len(long) - len(short)) / 3.84
        self.stack = max(1, round(self.rate / STUDENT_RATE))
        self.dim = self.stack * short.shape[1]
        self.mean, self.std = torch.zeros(self.dim, device=self.device), torch.ones(self.dim, device=self.device)

        # ---- does padding change an embedding?
        noise = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (16_000, 28_000)]
        self.dtype = torch.float32
        together, alone = self._listen(noise)[0], self._listen(noise[:1])[0]
        self.batched = len(together) == len(alone) and bool((together - alone).norm() < 1e-3 * alone.norm())
        self.dtype = dtype

    def __str__(self):
        million = sum(p.numel() for p in self.encoder.parameters()) / 1e6
        return (f"{self.spec}: {type(self.encoder).__name__}, {million:.1f} M parameters, {self.rate:.4g} Hz, layer "
                f"{self.layer}, "
                f"target {self.dim} wide, "
                f"{'in batches' if self.batched else 'one utterance at a time (padding would change it)'}")

    @torch.no_grad()
    def __call__(self, waveforms, lengths=None):
        """waveforms: list of (S,) at 16 kHz, or (B, S) padded with lengths (B,) -> standardised embeddings (B, T, dim),
        lengths (B,) at 25 Hz."""
        if lengths is not None:
            waveforms = [w[:n] for w, n in zip(waveforms, lengths.tolist())]
        embeddings = [align(e, self.rate, self.stack) for e in self._listen([w.cpu() for w in waveforms])]
        lengths = torch.tensor([len(e) for e in embeddings], device=self.device)
        return (torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True) - self.mean) / self.std, lengths

    @torch.no_grad()
    def _listen(self, waveforms):
        """list of (S,) -> list of (T, D), at the teacher's own frame rate, float32."""
        if self.window:  # longer than the window: in pieces, each padded to the window, its frames cut to the audio
            pieces = [w.split(self.window) for w in waveforms]
            inputs = self.extractor([p.numpy() for ps in pieces for p in ps], sampling_rate=data.SAMPLE_RATE,
                                    return_tensors="pt")
            frames = self._encode(inputs)
            size = self.window // frames.shape[1]  # samples per frame
            frames = iter(frames)
            return [torch.cat([next(frames)[:max(1, len(p) // size)] for p in ps]) for ps in pieces]
        out = []
        for group in [waveforms] if self.batched else [[w] for w in waveforms]:
            inputs = self.extractor([w.numpy() for w in group], sampling_rate=data.SAMPLE_RATE, return_tensors="pt",
                                    padding=True)
            frames = self._encode(inputs)
            out += [e[:self._frames(len(w), frames.shape[1], max(map(len, group)))] for w, e in zip(group, frames)]
        return out

    def _encode(self, inputs):
        with running.autocast(self.device, self.dtype):
            out = self.encoder(**inputs.to(self.device), output_hidden_states=self.layer != "last")
        return (out.last_hidden_state if self.layer == "last" else out.hidden_states[int(self.layer)]).float()

    def _frames(self, samples, frames, longest):
        """Frames that belong to an utterance of `samples` in a batch whose longest one has `longest` samples and
        `frames` frames."""
        if samples == longest:
            return frames
        if hasattr(self.encoder, "_get_feat_extract_output_lengths"):
            return int(self.encoder._get_feat_extract_output_lengths(torch.tensor(samples)))
        return max(1, frames * samples // longest)

    @torch.no_grad()
    def standardise(self, batches):
        """Set mean and std per dimension from the first batches: teachers of different scale then weigh alike in an L1.
        [ours]"""
        count, total, squares = 0, 0.0, 0.0
        for waveforms in batches:
            e, lengths = self(waveforms)
            # float64 on the CPU: MPS has none
            frames = (e * self.std + self.mean)[losses.valid_mask(lengths, e.shape[1])].cpu().double()
            count, total, squares = count + len(frames), total + frames.sum(0), squares + (frames ** 2).sum(0)
        mean = total / count
        self.mean = mean.float().to(self.device)
        self.std = (squares / count - mean ** 2).clamp(min=1e-10).sqrt().float().to(self.device)

    def state(self):
        """What a checkpoint says about a teacher."""
        return {"spec": self.spec, "rate": self.rate, "dim": self.dim, "mean": self.mean.cpu(), "std": self.std.cpu()}


def align(embedding, rate, stack):
    """(T_e, D) at `rate` Hz -> (T, stack * D) at 25 Hz: target t is made of the teacher frames within [40 t, 40 t + 40)
    ms.

    Where rate is not stack * 25 Hz, it is interpolated linearly first, frame centres on frame centres.
    """
    if abs(rate - stack * STUDENT_RATE) > 0.01:
        scale = stack * STUDENT_RATE / rate
        embedding = F.interpolate(embedding.T[None], scale_factor=scale, mode="linear")[0].T
    T, D = math.ceil(len(embedding) / stack), embedding.shape[1]
    last = embedding[-1:].expand(T * stack - len(embedding), D)  # half a pair at the end: its last frame twice
    return torch.cat([embedding, last]).reshape(T, stack * D)


# ---------------------------------------------------------------------------- the method

def teacher_targets(teachers, waveforms, combine):
    """What each projection head has to predict: list of (embeddings (B, T, D), lengths (B,)), one per head.

    heads: a head for each teacher.   average: one head, the mean of the teachers' standardised embeddings.
    random: one head, a teacher drawn for each utterance.
    """
    if combine == "random":
        drawn = torch.randint(len(teachers), (len(waveforms),)).tolist()
        rows = [teachers[k]([w]) for k, w in zip(drawn, waveforms)]
        return [(torch.nn.utils.rnn.pad_sequence([e[0] for e, _ in rows], batch_first=True),
                 torch.cat([n for _, n in rows]))]
    targets = [teacher(waveforms) for teacher in teachers]
    if combine == "average":
        T = min(e.shape[1] for e, _ in targets)
        return [(torch.stack([e[:, :T] for e, _ in targets]).mean(0), torch.stack([n for _, n in targets]).amin(0))]
    return targets


def stage1_loss(student, batch, targets, weights):
    """L = sum_k w_k * mean |p_k - e_k|   -> (L times the student's frames, frames, the mean L1 of each head)"""
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    parts = []
    for head, (target, target_lengths) in zip(student.heads, targets):
        loss, frames = losses.distillation_loss(head(hidden).float(), target, torch.minimum(lengths, target_lengths))
        parts.append(loss / frames)
    return sum(w * part for w, part in zip(weights, parts)) * lengths.sum(), lengths.sum(), parts


@running.polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_source_options(parser, unlabelled=True)
    group = parser.add_argument_group("teachers and student")
    group.add_argument("--teachers", nargs="+", metavar="NAME[:LAYER]",
                       default=[str(DEMO / "teachers/hubert"), str(DEMO / "teachers/whisper")],
                       help="frozen teachers: Hugging Face hub names or folders, with the number of a hidden layer or "
                            "'last' (default: the demo's two)")
    group.add_argument("--weights", nargs="+", type=float, metavar="W",
                       help="weight of each teacher's loss (default: 1 each)")
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
    running.add_training_options(parser, out="exp/pretrain", steps=1050)
    args = parser.parse_args(argv)
    running.check_training_options(args)
    if args.weights and len(args.weights) != len(args.teachers):
        raise UserError(f"--weights needs one number per teacher: {len(args.teachers)}, found {len(args.weights)}")
    if len(set(args.teachers)) < len(args.teachers):
        raise UserError("--teachers names one twice; a teacher counts more through --weights")

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
    teachers = []
    for spec in args.teachers:
        teachers.append(Teacher(spec, device, running.inference_dtype(device)))
        say(f"teacher {teachers[-1]}")
    if this.state:
        for teacher, state in zip(teachers, this.state["teachers"]):
            teacher.mean, teacher.std = state["mean"].to(device), state["std"].to(device)
    else:
        first = data.Loader(train_set, args.batch_seconds, waveforms=True, augment=True, workers=0,
                            seed=args.seed).epoch(0)
        count = max(4, math.ceil(200 / args.batch_seconds))
        batches = [batch.waveforms for _, batch in zip(range(count), first) if batch.ids]
        if not batches:
            raise UserError("none of the training audio can be read; python data.py check PATH says why")
        for teacher in teachers:
            teacher.standardise(batches)
    names = [teacher.spec.rstrip("/").rpartition("/")[2] for teacher in teachers]
    names = names if len(set(names)) == len(names) else [teacher.spec for teacher in teachers]
    head_dims = tuple(teacher.dim for teacher in teachers)
    if args.combine != "heads":
        if len(set(head_dims)) > 1:
            raise UserError(f"--combine {args.combine} needs teachers of one width, found "
                            f"{', '.join(map(str, head_dims))}; use --combine heads")
        head_dims = head_dims[:1]
    weights = args.weights or [1.0] * len(teachers)
    if args.combine != "heads":
        weights = [1.0]

    # ---- student
    torch.manual_seed(args.seed)
    student = model.Student(replace(model.PRESETS[args.size], head_dims=head_dims, chunk=args.chunk,
                                  left=args.left)).to(device)
    say(f"student {args.size}: {student.parameter_count / 1e6:.1f} M parameters, heads {list(head_dims)} "
        f"({args.combine}), {student.config.listening}")
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)

    def compute_loss(batch):
        total, frames, parts = stage1_loss(student, batch, teacher_targets(teachers, batch.waveforms, args.combine),
                                           weights)
        return total, frames, dict(zip(names if args.combine == "heads" else [args.combine], parts))

    def evaluate(student):
        """Mean L1 per teacher on the development audio; 0.8 is what predicting the mean scores on normally distributed
        targets."""
        sums, frames = torch.zeros(len(teachers)), torch.zeros(len(teachers))
        for batch in filter(lambda batch: batch.ids, dev.epoch()):
            hidden, lengths = student.encoder(batch.features.to(device), batch.feature_lengths.to(device))
            for k, teacher in enumerate(teachers):
                target, target_lengths = teacher(batch.waveforms)
                loss, n = losses.distillation_loss(student.heads[min(k, len(student.heads) - 1)](hidden), target,
                                                  torch.minimum(lengths, target_lengths))
                sums[k] += loss.item()
                frames[k] += n.item()
        if not frames.all():
            raise UserError("none of the --dev audio can be read; python data.py check PATH says why")
        results = {f"dev {name}": value for name, value in zip(names, (sums / frames).tolist())}
        return results, sum(results.values())

    extra = {"config": student.config, "stage": 1, "size": args.size,
             "teachers": [teacher.state() for teacher in teachers], "combine": args.combine}
    code = running.train(this, student, loader, compute_loss, evaluate, optimizer, extra, device, dtype, rank, world)
    if code == 0:
        say(f"next: python finetune_rnnt.py --init {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
