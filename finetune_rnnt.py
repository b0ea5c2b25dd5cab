"""Stage 2: the pre-trained encoder becomes a neural transducer on transcribed speech.

    python finetune_rnnt.py                                 # the demo, after pretrain_kd.py
    python finetune_rnnt.py --init none --out exp/scratch   # the baseline without distillation
    python finetune_rnnt.py --data LibriSpeech/train-clean-100 --dev LibriSpeech/dev-clean \\
        --init exp/pretrain-100h --steps 40000 --batch-seconds 400 --spec-augment 27 \\
        --out exp/finetune-100h                               # one GPU
    torchrun --nproc_per_node 8 finetune_rnnt.py ...          # eight GPUs, the same arguments

    L = L_transducer + c * L_CTC                  # Graves 2012 (arXiv 1211.3711) and 2006: model.py
        + lambda * L_KD                           # --teacher-transducer: methods/essence_kd.py
        + w * L_AED + c * mean L_CTC of layers    # --bert: methods/interaed.py

On the demo expect a test WER of 31 to 34 %, from scratch of 92 % (RESULTS.md).
"""

from tools import quiet_start  # noqa: F401  (first: Ctrl-C while the rest is imported)

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
import decode
import model
from methods import essence_kd, interaed
from tools import training
from tools.command_line import (
    Parser,
    UserError,
    count,
    not_negative,
    one_line_errors,
    positive_float,
    positive_int,
)
from tools.muon import Muon, matrices_of, parameters_but

# Share of the updates in which an inherited encoder waits for the new, random parts. The rates have
# then risen to their peaks (see tools/training.py).
FROZEN = 0.1
LEARNING_RATES = {  # peak rates of (predictor, joiner and CTC head; encoder), by what is inherited
    "nothing": (5e-3, 1e-3),
    "encoder": (5e-3, 5e-4),
    "everything": (2e-4, 2e-4),
}


# ---------------------------------------- options


def parse(argv):
    parser = Parser(__doc__)
    data.add_source_options(parser)
    group = parser.add_argument_group("student")
    group.add_argument(
        "--init",
        default="exp/pretrain",
        metavar="RUN",
        help="run directory or checkpoint to begin with: of stage 1, or of stage 2 to adapt a "
        "finished recogniser to other speech; or 'none' (default %(default)s)",
    )
    group.add_argument(
        "--size",
        choices=list(model.PRESETS),
        help="of a student with --init none (default nano); otherwise --init decides",
    )
    group.add_argument(
        "--chunk",
        type=model.chunk_size,
        metavar="FRAMES|random",
        help="frames of 40 ms that a streaming student encodes at once, of a student with --init "
        "none (default: whole utterances); otherwise --init decides",
    )
    group.add_argument(
        "--vocab-size",
        type=positive_int,
        default=256,
        metavar="N",
        help="BPE tokens at most, but every character has one; little text gives fewer, down to "
        "letters (default %(default)s)",
    )
    group.add_argument(
        "--ctc-weight",
        type=not_negative,
        default=0.3,
        metavar="C",
        help="c above (default %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=positive_float,
        help="peak learning rate of predictor, joiner and CTC head (default 5e-3; of a finished "
        "recogniser 2e-4)",
    )
    group.add_argument(
        "--encoder-lr",
        type=positive_float,
        metavar="LR",
        help="peak learning rate of the encoder (default 5e-4; with --init none 1e-3; of a "
        "finished recogniser 2e-4)",
    )
    group = parser.add_argument_group(
        "one-best path distillation",
        "trained transducers teach by their distributions along the "
        "transcript; --unlabelled audio they transcribe themselves",
    )
    group.add_argument(
        "--teacher-transducer",
        nargs="+",
        metavar="RUN",
        default=[],
        help="run directories or checkpoints of stage 2; several form an ensemble",
    )
    group.add_argument(
        "--kd-weight",
        type=not_negative,
        default=0.3,
        metavar="LAMBDA",
        help="lambda above (default %(default)s)",
    )
    group.add_argument(
        "--kd-temperature",
        type=positive_float,
        default=1.0,
        metavar="TAU",
        help="above 1 the soft labels are softer (default %(default)s)",
    )
    group.add_argument(
        "--kd-shift",
        type=count,
        default=0,
        metavar="FRAMES",
        help="frames of 40 ms by which a streaming student may emit later than an offline teacher "
        "(default %(default)s)",
    )
    group.add_argument(
        "--essence-top-k",
        type=positive_int,
        metavar="K",
        help="keep only the K largest soft labels of a node; 1 and 4 were best (default: all)",
    )
    group = parser.add_argument_group("a masked language model teaches layers of the encoder")
    group.add_argument(
        "--bert", metavar="NAME", help="hub name or folder, e.g. google-bert/bert-base-uncased"
    )
    group.add_argument(
        "--bert-weight",
        type=not_negative,
        default=0.3,
        metavar="W",
        help="w above (default %(default)s)",
    )
    group.add_argument(
        "--inter-layers",
        nargs="+",
        type=positive_int,
        default=[2],
        metavar="K",
        help="blocks of the encoder, 1 the first, that it teaches beside the last (default 2)",
    )
    training.add_training_options(parser, "exp/finetune", steps=450, dropout=0.1, spec_augment=4)
    args = parser.parse_args(argv)
    if args.init != "none" and (args.size is not None or args.chunk is not None):
        raise UserError(f"--size and --chunk go with --init none: {args.init} has its own")
    if not args.teacher_transducer and (args.unlabelled or args.essence_top_k):
        raise UserError("--unlabelled and --essence-top-k need a --teacher-transducer")
    for path in map(Path, (args.init, *args.teacher_transducer)):
        folder = path if path.is_dir() else path.parent
        if path.exists() and folder.resolve() == args.out.resolve():
            raise UserError(
                f"--out {args.out} holds what this run begins with or is taught by; choose another "
                f"--out"
            )
    return args


# ---------------------------------------- the student


def new_student(args, checkpoint, train_set, tokenizer):
    """-> (student, its tokenizer, one line on what it inherited)

    checkpoint {}: all is new. Of stage 1: its encoder under a new predictor, joiner and CTC head.
    Of stage 2: a finished recogniser, whole. tokenizer: that of the teacher transducers, or None.
    """
    # Both may be other than where the checkpoint was trained.
    changes = {
        "seconds": statistics.median(utterance.seconds for utterance in train_set),
        "dropout": args.dropout,
    }
    if "tokenizer" in checkpoint:
        own = Tokenizer.from_str(checkpoint["tokenizer"])
        if tokenizer is not None and tokenizer.to_str() != own.to_str():
            raise UserError(
                f"--init {args.init} has another tokenizer than --teacher-transducer "
                f"{args.teacher_transducer[0]}; begin with its stage 1 instead"
            )
        student = model.load_student(checkpoint, **changes)
        line = f"inherited from {args.init}: a finished recogniser, whole"
        labels = []
        for utterance in train_set:
            labels += own.encode(data.normalise(utterance.text or "")).ids
        unknown = labels.count(own.token_to_id("<unk>"))
        if unknown:
            line += (
                f"; {100 * unknown / len(labels):.1f} % of the new text's tokens are unknown to it"
            )
        return student, own, line
    if tokenizer is None:
        texts = [utterance.text for utterance in train_set if utterance.text is not None]
        tokenizer = data.train_tokenizer(texts, args.vocab_size)
    changes["vocab_size"] = tokenizer.get_vocab_size()
    changes["head_dims"] = ()
    if not checkpoint:
        size = args.size or "nano"
        config = replace(model.PRESETS[size], chunk=args.chunk or 0, **changes)
        return model.Student(config), tokenizer, f"from scratch: nothing inherited, size {size}"
    student = model.load_student(checkpoint, **changes)
    size = sum(p.numel() for p in student.encoder.parameters())
    taught_by = ", ".join(teacher["spec"] for teacher in checkpoint["teachers"])
    line = (
        f"inherited from {args.init}: the encoder, {size / 1e6:.1f} M parameters, taught by "
        f"{taught_by}; new: predictor, joiner, CTC head"
    )
    return student, tokenizer, line


def prepare_bert(args, run, train_set, student):
    """-> (the soft labels of all transcripts, the decoder that learns them beside the student)"""
    depth = len(student.encoder.blocks)
    if max(args.inter_layers) >= depth:
        raise UserError(f"--inter-layers must be from 1 to {depth - 1} for this student")
    texts = [utterance.text for utterance in train_set]
    soft_labels = interaed.label_texts(args.bert, texts, args.out, run.device, run.rank, run.world)
    torch.manual_seed(args.seed)  # loading BERT, which only a first start does, may draw numbers
    decoder = interaed.new_decoder(soft_labels, student.config.dim).to(run.device)
    size = sum(p.numel() for p in decoder.parameters())
    run.print(f"{args.bert} teaches through a decoder of {size / 1e6:.1f} M, which is not exported")
    return soft_labels, decoder


def new_optimizer(args, student, decoder, inherits):
    """The encoder and what is above it have learning rates of their own. Muon takes the matrices of
    the encoder's blocks, of predictor and of joiner: the transducer learns faster than with AdamW
    for the last two. Only from scratch, in front of an encoder that knows nothing yet, AdamW is
    faster for them."""
    new_lr = args.lr or LEARNING_RATES[inherits][0]
    encoder_lr = args.encoder_lr or LEARNING_RATES[inherits][1]
    new_matrices = matrices_of(student.predictor, student.joiner)
    new = parameters_but([*student.encoder.parameters(), *new_matrices], student)
    if decoder:
        new += decoder.parameters()
    matrices = matrices_of(student.encoder.blocks)
    others = parameters_but(matrices, student.encoder)
    groups = [
        {"params": new},
        {"params": new_matrices, "muon": inherits != "nothing"},
        {"params": others, "lr": encoder_lr},
        {"params": matrices, "lr": encoder_lr, "muon": True},
    ]
    return Muon(groups, new_lr)


# ---------------------------------------- training


@torch.no_grad()
def evaluate(student, tokenizer, loader, run):
    """-> {name: WER in percent} of greedy search on the development utterances, one of them
    printed"""
    totals = {"transducer": decode.Errors(), "ctc": decode.Errors()}
    for batch in loader.epoch():
        run.name_unreadable(batch)
        if not batch.utterances:
            continue
        texts = decode.transcribe(student, tokenizer, batch, run.dtype, list(totals))
        for method, hypotheses in zip(totals, texts):
            for utterance, hypothesis in zip(batch.utterances, hypotheses):
                totals[method] += decode.word_errors(utterance.text, hypothesis)
        example = batch.utterances[0].text, texts[0][0]
    if totals["transducer"].words == 0:
        raise UserError(
            "none of the --dev audio can be read; python -m tools.librispeech check PATH names why"
        )
    reference, hypothesis = map(decode.one_line, example)
    run.print(f"reference:  {reference}\nhypothesis: {hypothesis or '(nothing: only blanks)'}")
    return {"dev WER": totals["transducer"].rate, "dev WER of CTC": totals["ctc"].rate}


@one_line_errors
def main(argv=None):
    args = parse(argv)
    run = training.Run(args)
    decode_command = f"python decode.py --checkpoint {args.out}"
    if args.data:
        decode_command += " --data SOURCE"
    if run.finished:
        run.print(
            f"{args.out} is finished; next: {decode_command}   (--overwrite starts anew; --init "
            f"{args.out} --out OTHER trains it further)"
        )
        return 0

    # ---- data
    train_set, dev_set = data.load_training_data(args, transcribed=True, quiet=run.rank > 0)
    run.check_settings(data.fingerprints(train_set, dev_set))

    # ---- teachers, student
    teachers = []
    tokenizer = None
    if args.teacher_transducer:
        teachers, tokenizer = essence_kd.load_transducers(args.teacher_transducer, run.device)
        run.print(
            f"taught by the transducers {', '.join(args.teacher_transducer)}, in their tokens"
        )
    torch.manual_seed(args.seed)
    if run.state:
        student = model.load_student(run.state)
        tokenizer = Tokenizer.from_str(run.state["tokenizer"])
        inherits = run.state["inherits"]
    else:
        checkpoint = {}
        if args.init != "none":
            checkpoint = model.load_checkpoint(args.init)
        inherits = ("nothing", "encoder", "everything")[checkpoint.get("stage", 0)]
        student, tokenizer, line = new_student(args, checkpoint, train_set, tokenizer)
        run.print(line)
    student.to(run.device)
    run.print(
        f"student: {student.parameter_count / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} "
        f"tokens, {student.config.describes_input()}"
    )
    decoder = None
    if args.bert:
        soft_labels, decoder = prepare_bert(args, run, train_set, student)

    # ---- batches, optimizer
    loader = data.Loader(
        train_set,
        args.batch_seconds,
        tokenizer=tokenizer,
        augment=True,
        spec_augment=args.spec_augment,
        speeds=args.speeds,
        workers=args.workers,
        seed=args.seed,
        rank=run.rank,
        world=run.world,
    )
    dev_loader = data.Loader(dev_set, args.batch_seconds, workers=args.workers)
    optimizer = new_optimizer(args, student, decoder, inherits)

    # ---- the loop
    about = {
        "config": student.config,
        "stage": 2,
        "tokenizer": tokenizer.to_str(),
        "inherits": inherits,
    }
    # run.steps begins with a rehearsal (step 0: the largest batches, no update), then makes --steps
    # updates. A loss is a sum over utterances; sum_gradients divides by the count of all processes.
    with run.start(student, optimizer, about, per="utterance", beside=decoder):
        for step, batches in run.steps(loader):
            training.set_learning_rates(optimizer, run.progress)
            # New parts would at first push random gradients into the trained encoder. (But the
            # rehearsal must need the memory of a whole update.)
            frozen = step > 0 and inherits == "encoder" and run.progress < FROZEN
            student.encoder.requires_grad_(not frozen)
            optimizer.zero_grad()
            for batch in batches:
                with run.autocast():
                    if teachers:
                        batch, best_path = essence_kd.distil_path(
                            teachers, batch, args.kd_temperature, args.essence_top_k
                        )
                    layers, lengths = student.encoder.encode_layers(
                        batch.features, batch.feature_lengths
                    )
                    hidden = layers[-1]
                    predicted = student.predict(batch.targets)
                    labelled = batch.targets, lengths, batch.target_lengths
                    transducer_losses = model.transducer_loss_from_joiner(
                        student.joiner, hidden, predicted, *labelled, reduction="none"
                    )
                    ctc_losses = model.ctc_loss(student.ctc(hidden), *labelled)
                    # What a machine wrote weighs less, if a manifest says so; what teachers give
                    # does not.
                    parts = {
                        "transducer": (batch.weights * transducer_losses).sum(),
                        "ctc": (batch.weights * ctc_losses).sum(),
                    }
                    loss = parts["transducer"] + args.ctc_weight * parts["ctc"]
                    if teachers:
                        parts["kd"] = essence_kd.path_distillation_loss(
                            student.joiner,
                            hidden,
                            predicted,
                            best_path,
                            lengths,
                            args.kd_temperature,
                            args.kd_shift,
                        )
                        loss = loss + args.kd_weight * parts["kd"]
                    if decoder:
                        middle = [layers[k - 1] for k in set(args.inter_layers)]
                        ctcs = [model.ctc_loss(student.ctc(layer), *labelled) for layer in middle]
                        soft = [soft_labels.get(u.text) for u in batch.utterances]
                        parts["ctc of layers"] = (batch.weights * sum(ctcs)).sum() / len(ctcs)
                        parts["bert"] = interaed.interaed_loss(
                            decoder, [*middle, hidden], lengths, soft
                        )
                        loss = loss + args.ctc_weight * parts["ctc of layers"]
                        loss = loss + args.bert_weight * parts["bert"]
                loss.backward()
                run.add(batch, count=len(batch.utterances), loss=loss, **parts)
            if run.sum_gradients():
                optimizer.step()
            run.average_weights()
            run.log()
            if run.evaluation_is_due():
                results = evaluate(run.averaged, tokenizer, dev_loader, run)
                run.keep_best("dev WER", results)
    return run.finish(decode_command)


if __name__ == "__main__":
    sys.exit(main())
