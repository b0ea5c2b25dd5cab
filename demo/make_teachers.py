"""Trains the demo's two small teachers from scratch, supervised, and scores them; each on one CPU core, side by side.

    python demo/make_corpus.py --out big --splits teachers --seed 1       # 340 minutes, transcribed
    python demo/make_teachers.py hubert --data big --minutes 31 & python demo/make_teachers.py whisper --data big & wait
    cp -r demo/teachers stage1; python demo/make_teachers.py hubert --data big --more stage1 --lr 7e-4 --minutes 13
    python demo/make_teachers.py --score                                  # their own word error on demo/corpus/test

hubert reads raw waveforms and is trained with CTC over characters; whisper reads log-mel and is trained with
cross-entropy over word pieces, and with CTC on its encoder so that it aligns soon (that head is dropped). Both are
saved in Hugging Face format as fp16 safetensors. Neither learns from a voice of dev or test; dev is shown in the log.
"""
import argparse, json, math, pathlib, random, sys, time
import soundfile
import tokenizers
import torch
import transformers
from torch.nn import functional as F

HERE = pathlib.Path(__file__).parent
RATE = 16000  # Hz
FRAMES = 50  # encoder frames a second, both teachers
WINDOW = 8  # seconds, whisper's window: Whisper pads everything to it, so it should not be longer than needed
CHARACTERS = ["<pad>", "<unk>", "|", "'"] + [chr(i) for i in range(ord("A"), ord("Z") + 1)]  # <pad> is CTC's blank


def load(folder):
    """Folder -> list of (waveform float16 (S,), text); float16 halves the memory and is finer than the noise."""
    items = []
    for path in sorted(pathlib.Path(folder).rglob("*.trans.txt")):
        for line in path.read_text().splitlines():
            name, text = line.split(" ", 1)
            wave, _ = soundfile.read(path.parent / f"{name}.opus", dtype="float32")
            items.append((torch.from_numpy(wave).half(), text))
    if not items:
        sys.exit(f"{folder} has no transcripts: make it with demo/make_corpus.py")
    return items


def batches(items, seconds, rng):
    """Endless batches of similar length, at most `seconds` of padded audio each, in random order."""
    while True:
        order = sorted(range(len(items)), key=lambda i: len(items[i][0]) * rng.uniform(0.9, 1.1))
        groups, group, longest = [], [], 0
        for i in order:
            longest = max(longest, len(items[i][0]))
            if group and longest * (len(group) + 1) > seconds * RATE:
                groups.append(group)
                group, longest = [], len(items[i][0])
            group.append(items[i])
        rng.shuffle(groups)
        yield from groups


def disturb(wave, rng):
    """Jitter of speed (with the pitch and formants) and of spectral tilt: more voices and rooms than the corpus has."""
    speed, tilt = rng.uniform(0.9, 1.1), rng.uniform(-0.3, 0.5)
    if len(wave) / speed > 7.5 * RATE:
        speed = 1.0
    wave = F.interpolate(wave[None, None].float(), scale_factor=1 / speed, mode="linear")[0, 0]
    return wave - tilt * F.pad(wave[:-1], (1, 0))


def char_targets(texts):
    """Texts -> CTC targets (B, U), padded with -100, and their lengths (B,)."""
    rows = [torch.tensor([CHARACTERS.index(c) for c in text.replace(" ", "|")]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, True, -100), torch.tensor([len(row) for row in rows])


class Hubert:
    head = torch.nn.Module()  # nothing to train outside the model

    def build(self, texts, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(CHARACTERS)}))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        self.processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
        self.model = transformers.HubertForCTC(transformers.HubertConfig(
            vocab_size=len(CHARACTERS), pad_token_id=0, bos_token_id=None, eos_token_id=None,
            # Layer norms instead of a group norm over time: padding and an attention mask do no harm.
            feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
            # 320 samples a frame like the original, but reached in five strides instead of seven: cheaper on a CPU.
            conv_dim=(48, 96, 128, 128, 128), conv_kernel=(20, 8, 4, 3, 2), conv_stride=(10, 4, 2, 2, 2),
            hidden_size=160, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
            num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8, layerdrop=0.0, final_dropout=0.0,
            hidden_dropout=0.05, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
            mask_time_prob=0.05, mask_time_length=8, ctc_loss_reduction="mean", ctc_zero_infinity=True))

    def open(self, folder):
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.AutoModelForCTC.from_pretrained(folder)

    def save(self, folder):
        self.processor.save_pretrained(folder)
        self.processor.feature_extractor.save_pretrained(folder)  # for AutoFeatureExtractor

    def run(self, waves, labels=None):
        waves = [wave.numpy() for wave in waves]
        return self.model(**self.processor(waves, sampling_rate=RATE, padding=True, return_tensors="pt"), labels=labels)

    def loss(self, waves, texts, rng, done):
        return self.run(waves, char_targets(texts)[0]).loss

    def transcribe(self, waves):
        return self.processor.batch_decode(self.run(waves).logits.argmax(-1))


class Whisper:
    def build(self, texts, folder):
        pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
        pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        pieces.decoder = tokenizers.decoders.Metaspace()
        pieces.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=256, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False))
        pieces.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        self.extractor = transformers.WhisperFeatureExtractor(chunk_length=WINDOW)
        self.model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
            vocab_size=len(self.tokenizer), d_model=144, encoder_layers=4, decoder_layers=2, encoder_attention_heads=3,
            decoder_attention_heads=3, encoder_ffn_dim=576, decoder_ffn_dim=288, dropout=0.05, init_std=0.06,
            max_source_positions=WINDOW * FRAMES, max_target_positions=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None))
        self.model.generation_config = transformers.GenerationConfig(
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, is_multilingual=False)
        encoder = self.model.model.encoder
        for conv in (encoder.conv1, encoder.conv2):  # Whisper's own start lets the positions drown the sound
            torch.nn.init.kaiming_normal_(conv.weight)
        encoder.embed_positions.weight.data *= 0.3
        self.head = torch.nn.Linear(self.model.config.d_model, len(CHARACTERS))  # for CTC while training

    def open(self, folder):
        self.extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder)

    def save(self, folder):
        self.extractor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def features(self, waves):
        waves = [wave.numpy() for wave in waves]
        with torch.autocast("cpu", enabled=False):  # the spectrum is float32
            return self.extractor(waves, sampling_rate=RATE, return_tensors="pt").input_features  # (B, 80, 800)

    def encode(self, features):
        """WhisperEncoder.forward for any length: short windows make most of the training twice as fast."""
        encoder = self.model.model.encoder
        hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)  # (B, T, d)
        hidden = F.dropout(hidden + encoder.embed_positions.weight[: hidden.shape[1]], 0.05)
        for layer in encoder.layers:
            hidden = layer(hidden, None)
        return encoder.layer_norm(hidden)

    def loss(self, waves, texts, rng, done):
        lengths = torch.tensor([len(wave) * FRAMES // RATE for wave in waves])
        features = self.features(waves)
        if rng.random() > max(0.1, 4 * done - 3):  # the whole window, as in use, more and more often towards the end
            features = features[:, :, : min(2 * WINDOW * FRAMES, 2 * (int(lengths.max()) + rng.randrange(4, 24)))]
        for row, length in zip(features, lengths):  # SpecAugment, light
            low, start = rng.randrange(0, 72), rng.randrange(0, 2 * int(length))
            row[low: low + rng.randrange(0, 9)] = row.mean()
            row[:, start: start + rng.randrange(0, 16)] = row.mean()
        hidden = self.encode(features)
        labels = self.tokenizer(texts, padding=True, return_tensors="pt").input_ids  # (B, U): <s> pieces </s>
        decoded = self.model.model.decoder(input_ids=labels[:, :-1], encoder_hidden_states=hidden).last_hidden_state
        logits = self.model.proj_out(decoded).transpose(1, 2).float()
        targets, target_lengths = char_targets(texts)
        log_probs = self.head(hidden).transpose(0, 1).float().log_softmax(-1)
        ctc = F.ctc_loss(log_probs, targets.clamp(min=0), lengths, target_lengths, zero_infinity=True)
        return F.cross_entropy(logits, labels[:, 1:], ignore_index=0, label_smoothing=0.05) + ctc

    def transcribe(self, waves):
        guesses = self.model.generate(self.features(waves), max_length=64)
        return self.tokenizer.batch_decode(guesses, skip_special_tokens=True)


def save(teacher, folder):
    """fp16 on disk, but the configuration says float32, so that a plain from_pretrained computes in float32."""
    weights = {name: value.half().contiguous() for name, value in teacher.model.state_dict().items()
               if name != "proj_out.weight"}  # Whisper's is tied to its embedding
    teacher.model.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    teacher.save(folder)


@torch.no_grad()
def word_error(teacher, items):
    """Greedy word error rate in percent: substitutions, deletions and insertions per word of the reference."""
    errors = words = 0
    items = sorted(items, key=lambda item: len(item[0]))
    for start in range(0, len(items), 16):
        waves, texts = zip(*items[start: start + 16])
        for text, guess in zip(texts, teacher.transcribe([wave.float() for wave in waves])):
            reference, row = text.split(), list(range(len(guess.split()) + 1))
            for i, word in enumerate(reference, 1):  # Levenshtein, a row at a time
                above, row = row, [i]
                for j, other in enumerate(guess.split(), 1):
                    row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
            errors, words = errors + row[-1], words + len(reference)
    return 100 * errors / words


def train(teacher, args, folder):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    items, dev = load(args.data), load(HERE / "corpus" / "dev")
    teacher.build([text for _, text in items], folder)
    if args.more:
        teacher.open(args.more / folder.name)
        if hasattr(teacher.model, "freeze_feature_encoder"):  # hubert's convolutions learn first and cost the most
            teacher.model.freeze_feature_encoder()
    model, stream = teacher.model, batches(items, args.batch_seconds, rng)
    parameters = [p for p in [*model.parameters(), *teacher.head.parameters()] if p.requires_grad]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(items)} utterances, "
          f"{sum(len(wave) for wave, _ in items) / RATE / 3600:.2f} hours", flush=True)
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, audio, mean, shown = time.time(), 0, 0.0, None, 0.0
    while (done := (time.time() - start) / (60 * args.minutes)) < 1:
        # The schedule follows the clock, so that the time given is the time taken, whatever the machine.
        rate = args.lr * min(1, step / 300) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = rate
        waves, texts = zip(*next(stream))
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = teacher.loss([disturb(wave, rng) for wave in waves], texts, rng, done)
        if not torch.isfinite(loss):
            sys.exit(f"step {step}: the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, audio = step + 1, audio + sum(map(len, waves)) / RATE
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{(time.time() - start) / 60:.1f} min  step {step}  lr {rate:.1e}  loss {mean:.3f}  "
                  f"{audio / (time.time() - start):.0f} s of audio/s", flush=True)
        if time.time() - start - shown > 240:
            shown = time.time() - start
            model.eval()
            save(teacher, folder)
            print(f"dev WER {word_error(teacher, dev):.1f} %", flush=True)
    model.eval()
    save(teacher, folder)
    print(f"{step} steps, {audio / 3600:.1f} hours heard, dev WER {word_error(teacher, dev):.1f} %", flush=True)


def main(argv=None):
    kinds = {"hubert": Hubert, "whisper": Whisper}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", choices=list(kinds))
    parser.add_argument("--data", type=pathlib.Path, help="transcribed corpus to train on")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "teachers")
    parser.add_argument("--minutes", type=float, default=26)
    parser.add_argument("--batch-seconds", type=float, default=20, help="of padded audio")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", type=pathlib.Path, help="go on from the teachers in this folder; a lower --lr")
    parser.add_argument("--score", nargs="?", const="demo/corpus/test", help="split folder; default demo/corpus/test")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.score:
        for name in [args.teacher] if args.teacher else kinds:
            teacher, folder = kinds[name](), args.out / name
            teacher.open(folder)  # as any Hugging Face model
            parameters = sum(p.numel() for p in teacher.model.parameters()) / 1e6
            megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            print(f"{name}: WER {word_error(teacher, load(args.score)):.1f} % on {args.score}, "
                  f"{parameters:.2f} M parameters, {megabytes:.1f} MB", flush=True)
    elif args.teacher and args.data:
        train(kinds[args.teacher](), args, args.out / args.teacher)
    else:
        print("say which teacher to train and --data, or --score", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
