"""Stage 2: the pre-trained encoder becomes a neural transducer on transcribed speech.

    python finetune_rnnt.py                                   # the demo, after pretrain_kd.py: minutes on a laptop CPU
    python finetune_rnnt.py --init none --out exp/scratch     # the baseline without distillation
    python finetune_rnnt.py --data LibriSpeech/train-clean-100 --dev LibriSpeech/dev-clean --init exp/pretrain-100h \\
        --steps 40000 --batch-seconds 400 --spec-augment 27 --out exp/finetune-100h                  # one GPU
    torchrun --nproc_per_node 8 finetune_rnnt.py ...          # eight GPUs, the same arguments

    python finetune_rnnt.py --teacher-transducer exp/a exp/b --out exp/taught       # trained transducers teach it too

    L = L_transducer + c * L_CTC                                  # Graves 2012 (arXiv 1211.3711) and 2006
        + 0.5 * L_simple                                          # --loss pruned: losses.py
        + lambda * L_KD                                           # --teacher-transducer: losses.py, "stage 2"
        + w * L_AED                                               # --bert: bert.py
"""
import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import bert
import data
import decode
import losses
import model
import run as running
import training
from decode import Errors, transcribe, word_errors
from run import UserError
from search import GreedyTransducer


def stage2_loss(student, batch, args, teachers=(), tutor=None):
    """-> (sum over utterances of L_transducer + c * L_CTC + lambda * L_KD + w * L_AED, utterances, {name: mean})"""
    if teachers:
        batch, nodes, soft_labels = listen(teachers, batch, args)
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    predicted, parts = student.predict(batch.targets), {}
    labels = batch.targets, lengths, batch.target_lengths
    total = lambda each: (each * batch.weights).sum()  # (autocast would do @ in bfloat16)
    if student.config.simple_joiner:
        each = losses.pruned_transducer_loss(student.joiner, student.simple_joiner, hidden, predicted, *labels,
                                             reduction="none")
        parts["transducer"], parts["simple"] = map(total, each)
    else:
        loss = losses.transducer_loss_from_joiner(student.joiner, hidden, predicted, *labels, reduction="none")
        parts["transducer"] = total(loss)
    parts["ctc"] = total(losses.ctc_loss(student.ctc(hidden), *labels))
    if teachers:
        parts["kd"] = losses.path_distillation_loss(student.joiner, hidden, predicted, nodes, soft_labels, lengths,
                                                    args.kd_temperature, args.kd_shift)
    if tutor:
        parts |= tutor(student, hidden, lengths, batch)
    weights = {"transducer": 1.0, "simple": 0.5, "ctc": args.ctc_weight, "ctc of layers": args.ctc_weight,
               "kd": args.kd_weight, "bert": args.bert_weight}
    B = torch.tensor(len(batch.ids))
    return sum(weights[name] * part for name, part in parts.items()), B, {k: part / B for k, part in parts.items()}


@torch.no_grad()
def listen(teachers, batch, args):
    """What the frozen transducers, who hear the audio without SpecAugment, say of a batch -> (the batch, with the first
    teacher's transcript where it has none; nodes of their best path; soft labels there)"""
    device = batch.features.device
    features = pad_sequence([data.log_mel(w) for w in batch.waveforms], batch_first=True).to(device)
    hidden = [teacher.encoder(features, batch.feature_lengths) for teacher in teachers]
    untold = [b for b, text in enumerate(batch.texts) if text is None]
    if untold:
        with torch.autocast(device.type, enabled=False):
            search = GreedyTransducer(teachers[0], len(untold))
            search.advance(hidden[0][0][untold].float(), hidden[0][1][untold])
        labels = [row[:n] for row, n in zip(batch.targets, batch.target_lengths)]
        for b, [best] in zip(untold, search.results()):
            labels[b] = torch.tensor([token.label for token in best.tokens], device=device, dtype=torch.long)
        batch = replace(batch, targets=pad_sequence(labels, batch_first=True),
                        target_lengths=torch.tensor([len(x) for x in labels], device=device))
    ensemble = [(teacher.joiner, h, teacher.predict(batch.targets)) for teacher, (h, _) in zip(teachers, hidden)]
    t, u, exist, p = losses.one_best_path(ensemble, batch.targets, hidden[0][1], batch.target_lengths,
                                          args.kd_temperature)
    if args.essence_drop:
        next_label, best = F.pad(batch.targets, (0, 1)).gather(1, u), p.argmax(-1)
        exist = exist & ((best == losses.BLANK) | (best == next_label))
    return batch, (t, u, exist), losses.essence(p, args.essence_top_k, args.essence_mass)


def load_teachers(paths, device):
    """-> (frozen transducers, the tokenizer they share)"""
    loaded = [decode.load_recogniser(path, device) for path in paths]
    for path, (_, tokenizer) in zip(paths, loaded):
        if tokenizer.to_str() != loaded[0][1].to_str():
            raise UserError(f"--teacher-transducer {path} has another tokenizer than {paths[0]}: teachers of one "
                            f"ensemble must write the same tokens")
    return [teacher.requires_grad_(False) for teacher, _ in loaded], loaded[0][1]


def new_student(args, tokenizer, seconds, say):
    """Everything new, or the encoder of stage 1 under a new predictor, joiner and CTC head. seconds: of a typical
    utterance. -> (student, what to remember of its origin)"""
    new = dict(vocab_size=tokenizer.get_vocab_size(), predictor=args.predictor, head_dims=(), seconds=seconds,
               simple_joiner=args.loss == "pruned", dropout=args.dropout,
               conditioned=tuple(args.inter_layers) * args.self_condition)
    if args.init == "none":
        say(f"from scratch: nothing inherited, size {args.size or 'nano'}")
        new |= dict(chunk=args.chunk or 0, left=64 if args.left is None else args.left)
        return model.Student(replace(model.PRESETS[args.size or "nano"], **new)), {"size": args.size or "nano",
                                                                                   "teachers": []}
    checkpoint = model.load_checkpoint(args.init)
    if args.size and args.size != checkpoint.get("size"):
        raise UserError(f"--size {args.size}, but {args.init} holds a {checkpoint.get('size')} student; leave --size "
                        f"out or use --init none")
    student = model.load_student(checkpoint, **new)
    for name in ("chunk", "left"):
        if getattr(args, name) not in (None, getattr(student.config, name)):
            raise UserError(f"--{name} {getattr(args, name)}, but the student of {args.init} "
                            f"{student.config.listening}; leave --{name} out or use --init none")
    inherited = sum(p.numel() for p in student.encoder.parameters())
    taught_by = ", ".join(teacher["spec"] for teacher in checkpoint.get("teachers", [])) or "nobody"
    say(f"inherited from {args.init}: the {checkpoint.get('size')} encoder, {inherited / 1e6:.1f} M parameters, step "
        f"{checkpoint.get('step', 'last')}, taught by {taught_by}, {student.config.listening}; new: predictor, "
        f"joiner, CTC head")
    return student, {key: checkpoint.get(key) for key in ("size", "teachers")}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_source_options(parser)
    group = parser.add_argument_group("pseudo-labels")
    group.add_argument("--pseudo", nargs="+", metavar="MANIFEST", default=[],
                       help="audio with labels that a model gave it, from pseudo_label.py")
    group.add_argument("--pseudo-weight", type=float, default=0.8,
                       help="of their transducer and CTC losses, where true labels have 1; what other teachers say of "
                       "them is not weighed (default %(default)s)")
    group = parser.add_argument_group("student")
    group.add_argument("--init", default="exp/pretrain",
                       help="run directory or checkpoint of stage 1, or 'none' (default %(default)s)")
    group.add_argument("--size", choices=list(model.PRESETS),
                       help="of the student with --init none (default nano); otherwise stage 1 decided")
    group.add_argument("--chunk", type=model.chunk_size, metavar="FRAMES|random",
                       help="with --init none, as for pretrain_kd.py; otherwise stage 1 decided")
    group.add_argument("--left", type=int, metavar="FRAMES", help="the same")
    group.add_argument("--vocab-size", type=int, default=256, help="BPE tokens at most (default %(default)s)")
    group.add_argument("--min-frequency", type=int, default=100,
                       help="a token must be that frequent in the training text, so little text "
                       "gives small tokens, down to letters (default %(default)s)")
    group.add_argument("--predictor", choices=["lstm", "stateless"], default="lstm", help="default %(default)s")
    group.add_argument("--loss", choices=["exact", "pruned"], default="exact",
                       help="of the transducer: over all alignments, or over those in a window of five labels a frame, "
                       "several times faster for long utterances and large vocabularies (default %(default)s)")
    group.add_argument("--ctc-weight", type=float, default=0.3, help="c above (default %(default)s)")
    group.add_argument("--lr", type=float, default=5e-3,
                       help="peak learning rate of predictor, joiner and CTC head (default %(default)s)")
    group.add_argument("--encoder-lr", type=float,
                       help="peak learning rate of the encoder (default: 5e-4; with --init none 3e-3)")
    group.add_argument("--freeze-steps", type=int,
                       help="updates before the encoder learns too, so that the random new parts do not spoil it "
                       "(default: a tenth of the budget; none with --init none)")
    group = parser.add_argument_group("output distillation", "trained transducers teach by what they answer; they also "
                                      "transcribe --unlabelled audio")
    group.add_argument("--teacher-transducer", nargs="+", metavar="CKPT", default=[],
                       help="run directories or checkpoints of stage 2; several form an ensemble; their tokenizer is "
                       "used")
    group.add_argument("--kd-weight", type=float, default=0.3, help="lambda above (default %(default)s)")
    group.add_argument("--kd-temperature", type=float, default=1.0,
                       help="above 1 the soft labels are softer (default %(default)s)")
    group.add_argument("--kd-shift", type=int, default=0,
                       help="frames of 40 ms by which the student may answer later, for a streaming student of an "
                       "offline teacher (default %(default)s)")
    group.add_argument("--essence-top-k", type=int, metavar="K", help="keep the K likeliest soft labels of a node")
    group.add_argument("--essence-mass", type=float, metavar="M", help="keep the fewest that hold this probability")
    group.add_argument("--essence-drop", action="store_true",
                       help="leave out nodes where the teachers would write another label than the transcript")
    group = parser.add_argument_group("a masked language model teaches the encoder")
    group.add_argument("--bert", metavar="NAME", help="hub name or folder; see bert.py")
    group.add_argument("--inter-layers", nargs="+", type=int, metavar="K", default=[2],
                       help="intermediate layers that it teaches beside the last (default 2)")
    group.add_argument("--self-condition", action="store_true",
                       help="what these layers would write goes into the next ones, also when decoding")
    group.add_argument("--bert-weight", type=float, default=0.3, help="w above (default %(default)s)")
    group.add_argument("--bert-lambda", type=float, default=0.5,
                       help="share of its soft labels against the transcript's (default %(default)s)")
    running.add_training_options(parser, out="exp/finetune", steps=450, regularised=True)
    args = parser.parse_args(argv)
    running.check_training_options(args)
    essence = args.essence_top_k or args.essence_mass or args.essence_drop
    if not args.teacher_transducer and (args.unlabelled or essence):
        raise UserError("--unlabelled and --essence-... need a --teacher-transducer")
    for path in map(Path, (args.init, *args.teacher_transducer)):
        if path.exists() and (path if path.is_dir() else path.parent).resolve() == args.out.resolve():
            raise UserError(f"--out {args.out} holds what this run starts from or is taught by; choose another --out")
    if args.self_condition and not args.bert:
        raise UserError("--self-condition needs --bert, whose loss teaches the layers to write")
    return args


@running.polite
def main(argv=None):
    args = parse(argv)

    # ---- machine, run, data
    device, dtype, why = running.choose_device(args.device)
    rank, world = running.start_processes(device)
    say = tqdm.write if rank == 0 else lambda line: None  # beside the progress bar
    say(why)
    this = running.Run(args, rank, world, model.load_checkpoint, model.save_checkpoint)
    if this.finished:
        say(f"{args.out} is finished; next: python decode.py --checkpoint {args.out}   (--overwrite starts anew)")
        return 0
    train_set, dev_set = data.load_training_data(args, say, transcribed=True)

    # ---- teachers, tokenizer, student
    teachers, shared = load_teachers(args.teacher_transducer, device) if args.teacher_transducer else ([], None)
    if teachers:
        say(f"taught by {', '.join(args.teacher_transducer)}: their tokenizer, and what they answer")
    torch.manual_seed(args.seed)
    if this.state:
        tokenizer, student = Tokenizer.from_str(this.state["tokenizer"]), model.load_student(this.state)
        origin = {key: this.state[key] for key in ("size", "teachers")}
    else:
        tokenizer = shared or data.train_tokenizer([u.text for u in train_set], args.vocab_size, args.min_frequency)
        seconds = statistics.median(u.seconds for u in train_set)
        student, origin = new_student(args, tokenizer, seconds, say)
    student.to(device)
    say(f"student: {student.parameter_count / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} tokens, "
        f"{args.predictor} predictor")
    tutor = None
    if args.bert:
        labels = bert.label_texts(args.bert, [u.text for u in train_set], args.out, device, rank, world)
        tutor = bert.Tutor(student, labels, args.inter_layers, args.bert_lambda)
        size = sum(p.numel() for p in student.auxiliary.parameters())
        say(f"{args.bert} teaches through a decoder of {size / 1e6:.1f} M parameters that is not exported")
    loader = data.Loader(train_set, args.batch_seconds, tokenizer, waveforms=bool(teachers), augment=True,
                         masks=args.spec_augment, speeds=args.speeds, workers=args.workers, seed=args.seed,
                         rank=rank, world=world)
    dev = data.Loader(dev_set, args.batch_seconds, workers=args.workers)
    optimizer = training.Muon(student, args.lr, args.encoder_lr or (3e-3 if args.init == "none" else 5e-4))

    def before_step(step, spent):
        frozen = spent < 0.1 and args.init != "none" if args.freeze_steps is None else step < args.freeze_steps
        _, *inherited = optimizer.param_groups
        for group in inherited:
            for p in group["params"]:
                p.requires_grad_(not frozen)

    def evaluate(student):
        references = {u.id: u.text for u in dev_set}
        totals = {"transducer": Errors(), "ctc": Errors()}
        for batch in filter(lambda batch: batch.ids, dev.epoch()):
            both = transcribe(student, tokenizer, batch, device, dtype, totals)
            for method, hypotheses in zip(totals, both):
                for id, hypothesis in zip(batch.ids, hypotheses):
                    totals[method] += word_errors(references[id], hypothesis)
            shown = references[batch.ids[0]], both[0][0]
        if not totals["ctc"].words:
            raise UserError("none of the --dev audio can be read; python data.py check PATH says why")
        say(f"reference:  {shown[0]}\nhypothesis: {shown[1] or '(nothing: only blanks)'}")
        return {"dev WER": totals["transducer"].rate, "dev WER of CTC": totals["ctc"].rate}, totals["transducer"].rate

    extra = {"config": student.config, "stage": 2, "tokenizer": tokenizer.to_str(), "init": str(args.init), **origin}
    code = training.Training(this, student, loader, lambda batch: stage2_loss(student, batch, args, teachers, tutor),
                             evaluate, optimizer, extra, device, dtype, rank, world, before_step,
                             model.exported).loop()
    if code == 0:
        say(f"next: python decode.py --checkpoint {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
