"""The training loop of both stages: what happens between `loss.backward()` and `best.pt`. Nothing here knows of speech.
"""
import contextlib
import copy
import math
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from run import Auto, UserError, autocast, cure, everyone, inference_dtype, mix

PATIENCE = 10                              # updates in a row that may go wrong


def learning_rate(progress, warmup):
    """Factor in [0, 1]: linear warm-up, then cosine to zero; progress is the share of the budget that is spent."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


def orthogonalised(matrix):
    """(m, n) = U S V^T -> nearly U V^T: five steps of a Newton-Schulz iteration bring every singular value that is not
    tiny to between 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(inference_dtype(matrix.device))
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of the encoder's blocks take the orthogonalised momentum, scaled to about twice the size
    of an update of AdamW (arXiv 2502.16982 has 0.2 instead of 0.4): all directions of a matrix learn at one pace, which
    a short training gains most from. One learning rate suits both.

    torch.optim.Muon takes nothing but matrices, and computes in bfloat16 where the CPU has to emulate it.
    """

    def __init__(self, student, lr, encoder_lr=None):
        rest, encoder, matrices = [], [], []
        for name, p in student.named_parameters():
            inherited = name.startswith("encoder.") and ".condition." not in name  # (from stage 1)
            block = inherited and ".blocks." in name and p.dim() == 2
            (matrices if block else encoder if inherited else rest).append(p)
        encoder_lr = encoder_lr or lr
        super().__init__([{"params": rest, "lr": lr, "muon": False},
                          {"params": encoder, "lr": encoder_lr, "muon": False},
                          {"params": matrices, "lr": encoder_lr, "muon": True}],
                         betas=(0.9, 0.98), weight_decay=1e-2, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}  # (AdamW wants a step)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                update = orthogonalised(p.grad.lerp(momentum, 0.95))  # (Nesterov's)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.4 * math.sqrt(max(p.shape)) * group["lr"])
                p.grad = None  # AdamW comes next and passes over it
        super().step()


def average_gradients(parameters, sums):
    """Gradients are sums over utterances or frames: add them over all processes, divide once by the global count.

    Unlike an average of per-process means this is exactly the gradient of one large batch, whatever each process got;
    gradient accumulation is the same sum. sums (1 + n,): the count and n more, added up too and returned.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if dist.is_initialized():
        flat = parameters_to_vector([sums, *gradients])
        dist.all_reduce(flat)
        vector_to_parameters(flat, [sums, *gradients])
    for g in gradients:
        g.div_(sums[0])
    return sums


@contextlib.contextmanager
def stop_signals():
    """SIGTERM and SIGINT ask the loop to save and leave, a second one leaves at once. -> list of (time, number)"""
    came = []

    def handle(number, frame):
        came.append((time.monotonic(), number))
        if came[-1][0] > came[0][0] + 0.3:  # sooner it is the same one, by way of both Slurm and torchrun
            os._exit(128 + number)
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT) if main_thread}
    try:
        yield came
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def usable(batch):
    if not batch.ids:
        raise UserError(f"none of the training audio can be used any more ({batch.failed[0]})")
    return batch


class Training:
    """The loop of both stages.

    compute_loss(batch) -> (loss, count, {name: mean}): loss is a SUM over `count` things (frames, utterances).
    evaluate(student) -> ({name: value}, score): lower score is better; it sees the averaged weights.
    loader.epoch(number, skip) yields batches, the same ones whenever it is asked again: that makes resuming exact;
    loader.worst() those that need the most memory.
    extra: what else a checkpoint of this stage says about itself (config, tokenizer, teachers ...), in plain types.
    export(weights): those that best.pt shall have.
    """

    def __init__(self, run, student, loader, compute_loss, evaluate, optimizer, extra, device, dtype, rank=0, world=1,
                 before_step=None, export=dict):
        """A new run, or all that the interrupted one knew."""
        self.run, self.args, self.student, self.loader, self.optimizer = run, run.args, student, loader, optimizer
        self.compute_loss, self.evaluate, self.before_step, self.extra = compute_loss, evaluate, before_step, extra
        self.device, self.dtype, self.rank, self.world, self.export = device, dtype, rank, world, export
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(student).eval()
        self.progress = {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "best": math.inf, "finished": False,
                         "skipped": 0, "skipped_in_a_row": 0, "sums": {}, "settings": run.settings}
        self.unit, self.budget = ("seconds", 60 * run.args.minutes) if run.args.minutes else ("step", run.args.steps)
        self.unreadable, self.saved = set(), time.time()
        if run.state:
            student.load_state_dict(run.state["raw_model"])
            self.averaged.load_state_dict(run.state["model"])
            optimizer.load_state_dict(run.state["optimizer"])
            self.progress |= run.state["progress"]
            self.say(f"continuing {run.out} at step {run.step}")
        self.base_rates = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]
        student.train()

    def say(self, line, file=None):
        if self.rank == 0:
            tqdm.write(line, file=file)

    def loop(self):
        """Train until the budget is spent. -> exit code"""
        args, progress = self.args, self.progress
        self.run.begin()
        self.rehearse()
        batches, before, started, audio = self.batches(), progress["seconds"], time.time(), 0.0
        bar = tqdm(total=round(self.budget), initial=int(progress[self.unit]), unit="s" if args.minutes else "step",
                   desc=self.run.out.name, disable=self.rank > 0, dynamic_ncols=True)
        with stop_signals() as signals, bar:
            while (spent := progress[self.unit] / self.budget) < 1:
                factor = max(learning_rate(spent, args.warmup), 1e-3)
                for group, rate in zip(self.optimizer.param_groups, self.base_rates):
                    group["lr"] = rate * factor
                if self.before_step:
                    self.before_step(progress["step"], spent)
                self.update(self.gradients(batches))
                # the largest of all processes: nobody waits for one that has left, all follow one clock
                seconds, stop = before + time.time() - started, signals[0][1] if signals else 0
                progress["seconds"], stop = map(max, zip(*everyone((seconds, stop))))
                audio += self.world * sum(batch.seconds for batch, _ in self.latest)
                self.tell(bar, audio / (time.time() - started))
                due = (progress["step"] % args.eval_every == 0 if args.eval_every else
                       int(10 * progress[self.unit] / self.budget) > int(10 * spent))
                if due:
                    self.evaluation()
                if due or stop or time.time() - self.saved > 300:
                    self.save()
                if stop:
                    self.say(f"stopped by signal {stop} at step {progress['step']}; the same command goes on from here")
                    return 128 + stop
            if args.eval_every and progress["step"] % args.eval_every:  # (tenths of a budget end where it does)
                self.evaluation()
            progress["finished"] = True
            self.save()
        wrong = {"files could not be used": len(set().union(*everyone(self.unreadable))),
                 "updates were skipped": progress["skipped"]}
        self.say(f"{progress['step']} steps in {progress['seconds'] / 60:.1f} minutes; best score "
                 f"{progress['best']:.4g}: {self.run.out / 'best.pt'}"
                 + "".join(f"; {count} {what}" for what, count in wrong.items() if count))
        return 0

    def rehearse(self):
        """Forward and backward on the worst batches, beside the room that the optimizer will take: memory is short now
        or never. With --batch-seconds auto on a GPU they grow by a quarter until it is."""
        room = [torch.empty_like(p) for p in self.parameters for _ in range(2)] if not self.optimizer.state else []
        loader, fits, auto = self.loader, 0, isinstance(self.args.batch_seconds, Auto)
        loader.batch_seconds = self.progress.get("batch_seconds", loader.batch_seconds)
        grow = auto and not self.run.state and self.device.type == "cuda"
        try:
            while not fits or grow and len(loader.batches(0)) > 1:
                loader.batch_seconds *= 1.25 if fits else 1.0
                for batch in loader.worst():
                    self.forward_backward(usable(batch))
                fits = loader.batch_seconds
        except MemoryError:
            if not fits:
                raise
            fits = max(fits / 1.25, self.args.batch_seconds)  # one step back, for what fragmentation will take
            torch.cuda.empty_cache()
        del room
        self.optimizer.zero_grad(set_to_none=True)
        self.progress["batch_seconds"] = loader.batch_seconds = min(everyone(float(fits)))
        if auto:
            self.say(f"--batch-seconds auto: {loader.batch_seconds:.0f}")

    def forward_backward(self, batch):
        """-> {"count": n, name: a sum over n things}; gradients are added to what is there."""
        try:
            with autocast(self.device, self.dtype):
                loss, n, means = self.compute_loss(batch.to(self.device))
            loss.backward()
        except RuntimeError as error:
            if "memory" not in (cure(error) or ""):
                raise
            raise MemoryError(f"out of memory with a batch of {len(batch.ids)} utterances, {batch.seconds:.0f} s, "
                              f"features {list(batch.features.shape)}; lower --batch-seconds from "
                              f"{self.loader.batch_seconds:g}, with more --accumulate the update stays as large")
        return {"count": n, "loss": loss.detach()} | {name: mean.detach() * n for name, mean in means.items()}

    def batches(self):
        """Batch after batch from where the run stands, epoch after epoch; a file that cannot be used is named once."""
        progress = self.progress
        while True:
            for batch in self.loader.epoch(progress["epoch"], progress["batch"]):
                progress["batch"] += 1
                for problem in sorted(set(batch.failed) - self.unreadable):
                    tqdm.write(f"skipped: {problem}", file=sys.stderr)
                self.unreadable.update(batch.failed)
                yield usable(batch)
            progress["epoch"], progress["batch"] = progress["epoch"] + 1, 0

    def gradients(self, batches):
        """--accumulate batches of every process, as if they were one. -> {name: mean} with the gradient's norm"""
        self.optimizer.zero_grad(set_to_none=True)
        sums, self.latest = {}, []
        for k in range(self.args.accumulate):
            batch = next(batches)
            # dropout depends on the update and the batch's place in it, not on what ran before or where
            torch.manual_seed(mix(self.args.seed, self.progress["step"], k * self.world + self.rank))
            parts = self.forward_backward(batch)
            sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
            self.latest.append((batch, parts["loss"]))
        sums["count"] = sums["count"].to(sums["loss"])  # (its device)
        count, *totals = average_gradients(self.parameters, torch.stack([*sums.values()]).float())
        norm = clip_grad_norm_(self.parameters, self.args.clip)
        return dict(zip([*sums][1:] + ["gradient_norm"], torch.stack([*(x / count for x in totals), norm]).tolist()))

    def update(self, means):
        """Step the optimizer, then the averaged weights: an exponential mean whose horizon is a twentieth of the
        steps so far. A loss or gradient that is not finite changes no weight."""
        progress = self.progress
        progress["step"] += 1
        if math.isfinite(means["loss"]) and math.isfinite(means["gradient_norm"]):
            self.optimizer.step()
            progress["skipped_in_a_row"] = 0
            for name, value in (means | {"steps": 1}).items():
                progress["sums"][name] = progress["sums"].get(name, 0) + value
        else:
            self.skip()
        decay = 1 - 1 / (1 + 0.05 * progress["step"])
        with torch.no_grad():
            for mean, value in zip(self.averaged.state_dict().values(), self.student.state_dict().values()):
                mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)

    def skip(self):
        """Name the utterances of an update that went wrong; give up after PATIENCE of them in a row."""
        progress = self.progress
        progress["skipped"] += 1
        progress["skipped_in_a_row"] += 1
        heard = sum(everyone([(bool(loss.isfinite()), batch.ids) for batch, loss in self.latest]), [])
        ids = [id for fine, ids in heard if not fine or all(fine for fine, _ in heard) for id in ids]
        what = f"loss or gradient is not finite ({', '.join(ids[:5])}{' ...' * (len(ids) > 5)})"
        self.run.log(step=progress["step"], skipped=ids)
        self.say(f"step {progress['step']}: update skipped, {what}", sys.stderr)
        if progress["skipped_in_a_row"] == PATIENCE:
            raise UserError(f"{PATIENCE} updates in a row skipped, {what}; last.pt and best.pt are intact: look at "
                            f"these utterances or start anew with a lower --lr")

    def tell(self, bar, speed):
        """Every 20 updates the means since the last time, on the bar and in the log."""
        progress, rate, gpu = self.progress, self.optimizer.param_groups[0]["lr"], {}
        bar.update(int(progress[self.unit]) - bar.n)
        if (progress["step"] % 20 and progress["step"] != 1) or not progress["sums"]:
            return
        steps = progress["sums"].pop("steps")
        means, progress["sums"] = {name: value / steps for name, value in progress["sums"].items()}, {}
        if self.device.type == "cuda":
            gpu = {"GiB": round(torch.cuda.max_memory_allocated(self.device) / 2 ** 30, 2)}
        bar.set_postfix_str(f"loss {means['loss']:.3f}, lr {rate:.1e}, {speed:.0f} s of audio/s"
                            + "".join(f", {gib} GiB" for gib in gpu.values()))
        self.run.log(step=progress["step"], lr=rate, **means, audio_per_second=round(speed, 1), **gpu)

    def evaluation(self):
        """Score the averaged weights and keep the best."""
        with torch.no_grad():
            results, score = self.evaluate(self.averaged)
        step = self.progress["step"]
        self.say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in results.items()))
        self.run.log(step=step, **results)
        if score < self.progress["best"] or not (self.run.out / "best.pt").exists():
            self.progress["best"] = score if math.isfinite(score) else math.inf
            self.write("best.pt", model=self.export(self.averaged.state_dict()), results=results, step=step)

    def save(self):
        self.saved = time.time()
        self.write("last.pt", model=self.averaged.state_dict(), raw_model=self.student.state_dict(),
                   optimizer=self.optimizer.state_dict(), progress=self.progress)

    def write(self, name, **entries):
        if self.rank == 0:
            self.run.save_checkpoint(self.run.out / name, **entries, **self.extra)
