"""Stage 2: the pre-trained encoder becomes a neural transducer on transcribed speech.

    python finetune_rnnt.py                                   # the demo, after pretrain_kd.py: minutes on a laptop CPU
    python finetune_rnnt.py --init none --out exp/scratch     # the baseline without distillation
    python finetune_rnnt.py --data LibriSpeech/train-clean-100 --dev LibriSpeech/dev-clean --init exp/pretrain-100h \\
        --steps 40000 --batch-seconds 400 --out exp/finetune-100h                                    # one GPU
    torchrun --nproc_per_node 8 finetune_rnnt.py ...          # eight GPUs, the same arguments

    L = L_transducer + c * L_CTC                              # Graves 2012 and 2006; both from the same encoder
"""
import argparse
import statistics
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import losses
import model
import run as running
from decode import Errors, transcribe, word_errors
from run import UserError


def stage2_loss(student, batch, ctc_weight):
    """-> (sum over utterances of L_transducer + c * L_CTC, utterances, {name: mean})"""
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    logits = student.joiner(hidden, student.predict(batch.targets))
    transducer = losses.transducer_loss(logits, batch.targets, lengths, batch.target_lengths, reduction="sum")
    log_probs = student.ctc(hidden).float().log_softmax(-1).transpose(0, 1)                            # (T, B, V)
    ctc = F.ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths, reduction="sum", zero_infinity=True)
    B = torch.tensor(len(batch.ids))
    return transducer + ctc_weight * ctc, B, {"transducer": transducer / B, "ctc": ctc / B}


def new_student(args, tokenizer, seconds, say):
    """Everything new, or the encoder of stage 1 under a new predictor, joiner and CTC head. seconds: of a typical
    utterance. -> (student, what to remember of its origin)"""
    new = dict(vocab_size=tokenizer.get_vocab_size(), predictor=args.predictor, head_dims=(), seconds=seconds)
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


@running.polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_source_options(parser, unlabelled=False)
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
    group.add_argument("--ctc-weight", type=float, default=0.3, help="c above (default %(default)s)")
    group.add_argument("--lr", type=float, default=5e-3,
                       help="peak learning rate of predictor, joiner and CTC head (default %(default)s)")
    group.add_argument("--encoder-lr", type=float, default=1e-3,
                       help="peak learning rate of the encoder (default %(default)s)")
    group.add_argument("--freeze-steps", type=int,
                       help="updates before the encoder learns too, so that the random new parts do not spoil it "
                       "(default: a tenth of --steps; none with --init none)")
    running.add_training_options(parser, out="exp/finetune", steps=450)
    args = parser.parse_args(argv)
    running.check_training_options(args)

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

    # ---- tokenizer and student
    torch.manual_seed(args.seed)
    if this.state:
        tokenizer, student = Tokenizer.from_str(this.state["tokenizer"]), model.load_student(this.state)
        origin = {key: this.state[key] for key in ("size", "teachers")}
    else:
        tokenizer = data.train_tokenizer([u.text for u in train_set], args.vocab_size, args.min_frequency)
        seconds = statistics.median(u.seconds for u in train_set)
        student, origin = new_student(args, tokenizer, seconds, say)
    student.to(device)
    say(f"student: {student.parameter_count / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} tokens, "
        f"{args.predictor} predictor")
    loader = data.Loader(train_set, args.batch_seconds, tokenizer, augment=True, speeds=args.speeds,
                         workers=args.workers, seed=args.seed, rank=rank, world=world)
    dev = data.Loader(dev_set, args.batch_seconds, workers=args.workers)
    new = [p for name, p in student.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW([{"params": new},
                                   {"params": list(student.encoder.parameters()), "lr": args.encoder_lr}],
                                  lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    default = 0 if args.init == "none" else args.steps // 10
    freeze_steps = default if args.freeze_steps is None else args.freeze_steps

    def before_step(step):
        student.encoder.requires_grad_(step >= freeze_steps)

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
    code = running.train(this, student, loader, lambda batch: stage2_loss(student, batch, args.ctc_weight), evaluate,
                         optimizer, extra,
                         device, dtype, rank, world, before_step)
    if code == 0:
        say(f"next: python decode.py --checkpoint {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
