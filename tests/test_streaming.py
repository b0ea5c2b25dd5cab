"""A student that streams gives chunk by chunk what the masked pass over the whole audio gives; long
recordings are cut where they are quiet."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
import torchaudio

import data
import decode
import model
from data import FRAME
from decode import GreedyTransducer, Word, text_of, word_errors
from model import RANDOM_CHUNK, Config, Student
from tools import long_audio
from tools.long_audio import encode_pieces
from tools.stream import LOOK_AHEAD, LiveWords, encode_chunks

ROOT = Path(decode.__file__).parent
CPU = torch.device("cpu")
TINY = Config(
    dim=32,
    layers=3,
    kernel=7,
    channels=8,
    chunk=16,
    left=5,
    vocab_size=6,
    predictor_dim=24,
    joiner_dim=20,
)


def make_student(seed=0, **changes):
    torch.manual_seed(seed)
    return Student(replace(TINY, **changes)).eval()


def make_confident(student):
    """Its best label changes from frame to frame, although it is not trained."""
    for module in (student.joiner, student.predictor):
        for parameter in module.parameters():
            parameter.data.mul_(4)
    student.joiner.out.bias.data[0] += 3
    return student


def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def bursts(samples, seed):
    """Noise whose loudness changes each tenth of a second, mostly quiet"""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(samples // 1600 + 1, generator=generator) ** 6
    return loudness.repeat_interleave(1600)[:samples] * noise(samples, seed)


def cut_at_random(audio, shortest, longest, seed):
    """Blocks of random length, as they might arrive."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    while len(audio):
        size = torch.randint(shortest, longest, (), generator=generator).item()
        blocks.append(audio[:size])
        audio = audio[size:]
    return blocks


def features_of(audio):
    """-> features (1, F, 80), lengths (1,)"""
    features = data.log_mel(audio)[None]
    return features, torch.tensor([features.shape[1]])


# ---------------------------------------- the masked pass


@pytest.mark.parametrize("chunk, left", [(1, 0), (4, 6), (8, 3), (16, 64)])
def test_a_frame_depends_on_its_chunk_and_the_left_context_only(chunk, left):
    """One block: gradients of each output frame with respect to the subsampled input."""
    student = make_student(chunk=chunk, left=left, layers=1, kernel=3)
    subsampled = []

    def keep(module, inputs, output):
        subsampled.append(output[0].detach().requires_grad_())
        return subsampled[0], output[1]

    student.encoder.subsampling.register_forward_hook(keep)
    hidden, [T] = student.encoder(torch.randn(1, 120, 80), torch.tensor([120]))
    for t in range(T):
        [gradient] = torch.autograd.grad(hidden[0, t].square().sum(), subsampled, retain_graph=True)
        depends = set(gradient[0].abs().sum(-1).nonzero()[:, 0].tolist())
        # A causal convolution over three frames, each of which attends to its chunk.
        expected = set()
        for s in range(max(0, t - 2), t + 1):
            start = s // chunk * chunk
            expected |= set(range(max(0, start - left), min(start + chunk, T)))
        assert depends == expected, t


def test_a_streaming_utterance_does_not_depend_on_its_batch_and_padding_is_finite():
    student = make_student(left=0, chunk=4)
    features = torch.randn(3, 400, 80)
    lengths = torch.tensor([400, 41, 150])
    together, frames = student.encoder(features, lengths)
    assert torch.isfinite(together).all()
    together.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.encoder.parameters())
    for i, n in enumerate(lengths.tolist()):
        alone, [count] = student.encoder(features[i : i + 1, :n], lengths[i : i + 1])
        torch.testing.assert_close(together[i, :count], alone[0], atol=1e-5, rtol=0)


def test_random_chunks_come_from_the_seeded_generator():
    student = make_student(chunk=RANDOM_CHUNK, dropout=0.0)
    features = torch.randn(1, 600, 80)
    lengths = torch.tensor([600])
    whole, _ = student.encoder(features, lengths)
    chunked = [student.encoder(features, lengths, chunk)[0] for chunk in (0, 4, 8, 16, 32)]
    torch.testing.assert_close(whole, chunked[0])  # without training the whole utterance
    student.train()
    drawn = []
    for seed in range(40):
        torch.manual_seed(seed)
        first, _ = student.encoder(features, lengths)
        torch.manual_seed(seed)
        second, _ = student.encoder(features, lengths)
        assert torch.equal(first, second)
        drawn.append([torch.allclose(first, c, atol=1e-5) for c in chunked].index(True))
    assert set(drawn) == {0, 1, 2, 3, 4} and 10 < drawn.count(0) < 30


# ---------------------------------------- chunk by chunk


def greedy(student, pieces):
    """Hidden states piece by piece -> list of (label, frame)"""
    search = GreedyTransducer(student)
    for hidden in pieces:
        search.advance(hidden, torch.tensor([hidden.shape[1]]))
    [[best]] = search.results()
    return [(token.label, token.frame) for token in best.tokens]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 40])
def test_a_stream_equals_the_masked_pass(chunk):
    """Features too are computed as the audio comes; all lengths round the ends of a chunk."""
    student = make_confident(make_student(seed=3, chunk=16))
    lengths = [320, 479, 641, 60_001]
    for chunks in (1, 2):
        for more in (-FRAME, -1, 0, 1, 319, 320, 359, 360, 361):
            lengths.append(chunk * FRAME * chunks + more)
    emitted = set()
    for samples in lengths:
        if samples < 320:
            continue  # less than half a frame
        audio = bursts(samples, samples)
        with torch.no_grad():
            whole, _ = student.encoder(*features_of(audio), chunk)
        blocks = cut_at_random(audio, 1, 9000, chunk)
        pieces = list(encode_chunks(student, blocks, chunk, CPU))
        assert [p.shape[1] for p in pieces[:-1]] == [chunk] * (len(pieces) - 1)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)
        tokens = greedy(student, pieces)
        assert tokens == greedy(student, [whole]), samples
        emitted.update(tokens)
    # Labels and blanks alternate.
    assert 20 < len(emitted) < 5 * 90 and len(set(label for label, _ in emitted)) > 1


def test_a_chunk_is_encoded_once_its_look_ahead_is_there_and_costs_the_same_for_ever():
    student = make_student(chunk=4, left=6)
    chunk = 4
    arrived = []
    work = []  # feature frames of each call

    def audio():
        for block in noise(60 * FRAME).split(40):
            arrived.append(len(block))
            yield block

    def note(module, inputs):
        work.append(inputs[0].shape[1])

    student.encoder.subsampling.register_forward_pre_hook(note)
    for n, _ in enumerate(encode_chunks(student, audio(), chunk, CPU), 1):
        if n < 15:
            assert sum(arrived) == n * chunk * FRAME + LOOK_AHEAD
    assert n == 15 and set(work[1:-1]) == {(chunk + 2) * 4 + 3}

    # What is kept of the past stops growing.
    past = None
    sizes = []
    for x in torch.randn(1, 40, 32).split(chunk, dim=1):
        _, past = student.encoder.stream(x, past)
        sizes.append(sum(keys.numel() + convolved.numel() for keys, convolved in past))
    assert len(set(sizes[1:])) == 1 and past[0][0].shape[3] == 6


@pytest.mark.parametrize(
    "rate, channels, subtype",
    [
        (8000, 1, "PCM_16"),
        (11_025, 2, "FLOAT"),
        (16_000, 1, "PCM_24"),
        (44_100, 2, "PCM_U8"),
        (48_000, 2, "PCM_24"),
    ],
)
@pytest.mark.parametrize("seconds", [0.05, 1.9, 30.0, 58.5])
def test_a_file_in_blocks_is_the_file(rate, channels, subtype, seconds, tmp_path):
    samples = noise(int(rate * seconds) * channels).view(-1, channels).numpy()
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype=subtype)
    samples, _ = soundfile.read(tmp_path / "x.wav", dtype="float32", always_2d=True)
    mono = torch.from_numpy(samples).mean(1)
    whole = torchaudio.functional.resample(mono, rate, 16_000)
    blocks = list(data.stream_audio(tmp_path / "x.wav"))
    torch.testing.assert_close(torch.cat(blocks), whole, atol=1e-5, rtol=0)
    assert max(map(len, blocks)) <= 31 * 16_000


# ---------------------------------------- long recordings


def test_pieces_of_speech_without_a_pause_are_joined_as_if_there_were_no_cut():
    """A student whose frames depend on less than MARGIN (no attention, convolutions of 3 blocks)
    gives in pieces what it gives at once, although every cut falls into the noise."""
    student = make_student(chunk=0, seconds=4.0)
    for block in student.encoder.blocks:
        for parameter in block.attention.out.parameters():
            parameter.data.zero_()
    audio = noise(70 * 16_000)
    whole, _ = student.encoder(*features_of(audio))
    work = []  # feature frames of each call

    def note(module, inputs):
        work.append(inputs[0].shape[1])

    student.encoder.subsampling.register_forward_pre_hook(note)
    blocks = cut_at_random(audio, 1, 100_000, 0)
    hidden, after_pause = zip(*encode_pieces(student, blocks, CPU))
    assert len(hidden) > 10 and list(after_pause) == [True] + [False] * (len(hidden) - 1)
    assert max(work) <= 4 * (2 * long_audio.MARGIN + 160)  # 1.6 x 4 s and the margins
    torch.testing.assert_close(torch.cat(hidden, 1), whole, atol=1e-4, rtol=0)


def recording_with_pauses():
    """-> blocks of audio, (start, end) of their pauses in frames"""
    blocks = []
    gaps = []
    now = 0
    for i, seconds in enumerate([3.1, 2.2, 4.0, 3.3, 2.6, 3.9, 3.0, 2.4, 3.5]):
        blocks += [noise(int(16_000 * seconds), i), torch.zeros(8000)]
        now += len(blocks[-2]) + 8000
        gaps.append(((now - 8000) / FRAME, now / FRAME))
    return blocks, gaps


def test_pieces_end_in_pauses():
    student = make_student(chunk=0, seconds=3.0)
    audio, gaps = recording_with_pauses()
    frames = 0
    for hidden, after_pause in encode_pieces(student, audio, CPU):
        assert after_pause
        assert frames == 0 or any(start < frames < end for start, end in gaps), frames
        frames += hidden.shape[1]
    assert frames == (sum(map(len, audio)) // 160 + 2) // 4


def test_a_waveform_is_cut_at_quiet_places():
    """As pseudo-labels do it: pieces of at most so many frames."""
    blocks, gaps = recording_with_pauses()
    levels = long_audio.loudness(data.log_mel(torch.cat(blocks)))
    longest = 150  # frames, 6 s
    cuts = [0]
    while len(levels) - cuts[-1] > longest:
        length, pause = long_audio.quiet_cut(levels[cuts[-1] :], longest // 3, longest)
        assert pause and longest // 3 <= length < longest
        cuts.append(cuts[-1] + length)
    assert len(cuts) > 5
    assert all(any(start < cut < end for start, end in gaps) for cut in cuts[1:])
    # Even noise has a quietest place, but no pause.
    _, pause = long_audio.quiet_cut(long_audio.loudness(data.log_mel(noise(160_000))), 50, 150)
    assert not pause


@pytest.fixture(scope="module")
def by_heart(demo_utterances, tmp_path_factory):
    """A student that knows three utterances of the demo by heart, with silence round them
    -> its folder, those three"""
    three = sorted(demo_utterances, key=lambda u: u.seconds)[20:23]
    tokenizer = data.train_tokenizer([u.text for u in three] * 50, 64)
    [batch] = data.Loader(three, 60, tokenizer=tokenizer).epoch()
    torch.manual_seed(2)
    config = Config(
        dim=48,
        layers=2,
        kernel=15,
        channels=16,
        dropout=0.0,
        predictor_dim=64,
        predictor_dropout=0.0,
        joiner_dim=64,
        vocab_size=tokenizer.get_vocab_size(),
        seconds=three[1].seconds + 0.25,
    )
    student = Student(config)
    steps = 200
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        features = []
        for waveform in batch.waveforms:
            silence = torch.randint(8000, (2,), generator=generator).tolist()
            features.append(data.log_mel(torch.nn.functional.pad(waveform, silence)))
        lengths = torch.tensor([len(x) for x in features])
        features = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        hidden, lengths = student.encoder(features, lengths)
        logits = student.joiner(hidden, student.predict(batch.targets))
        texts = batch.targets, batch.target_lengths
        loss = model.transducer_loss(logits, texts[0], lengths, texts[1])
        ctc = model.ctc_loss(student.ctc(hidden), texts[0], lengths, texts[1])
        optimizer.zero_grad()
        (loss + 0.3 * ctc.mean()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("by-heart")
    save(folder, student, tokenizer)
    return folder, three


def save(folder, student, tokenizer):
    model.save_checkpoint(
        folder / "best.pt",
        model=student.state_dict(),
        config=student.config,
        tokenizer=tokenizer.to_str(),
    )


def test_long_audio_doubles_no_word_and_loses_few(by_heart, tmp_path, capsys):
    """32 utterances one after the other, whatever the pause between them. A student that knows
    three sentences by heart and gets half of one may emit nothing."""
    folder, three = by_heart
    generator = torch.Generator().manual_seed(0)
    order = [three[i] for i in torch.randint(3, (32,), generator=generator).tolist()]
    for pause in (3200, 8000):
        blocks = []
        for u in order:
            blocks += [data.load_audio(u.path), torch.zeros(pause)]
        audio = torch.cat(blocks)
        soundfile.write(tmp_path / "long.wav", audio.numpy(), 16_000)
        command = ["--checkpoint", folder, "--device", "cpu", "--workers", "0"]
        command += ["--output", tmp_path / "long.jsonl", tmp_path / "long.wav"]
        assert decode.main(list(map(str, command))) == 0
        captured = capsys.readouterr()
        reference = " ".join(u.text for u in order)
        errors = word_errors(reference, captured.out.split("\t")[1])
        assert errors.insertions == 0 and errors.rate < 30, (pause, str(errors), errors.alignment)
        assert "RTF" in captured.err
        row = json.loads((tmp_path / "long.jsonl").read_text())
        starts = [word["start"] for word in row["words"]]
        seconds = len(audio) / 16_000
        assert starts == sorted(starts) and seconds - 5 < starts[-1] < seconds


# ---------------------------------------- --stream


@pytest.fixture
def streaming_checkpoint(demo_utterances, tmp_path):
    """A student that streams, not trained, but with many words for everything."""
    tokenizer = data.train_tokenizer([u.text for u in demo_utterances], 40)
    size = tokenizer.get_vocab_size()
    student = make_confident(make_student(seed=1, chunk=RANDOM_CHUNK, vocab_size=size))
    # Words would be rare: one token in forty begins one.
    student.joiner.out.bias.data[tokenizer.token_to_id("\u2581")] += 3
    save(tmp_path, student, tokenizer)
    return tmp_path


def words_of_stream(out):
    """stdout of --stream -> list of the words of each line, list of the times, the last line"""
    *lines, text = out.splitlines()
    words = []
    times = []
    for line in lines:
        assert "latency 662.5 + " in line
        words += line.split(" ms  ")[1].split()
        times += [float(x) for x in line.split(" s ")[0].split("-")]
    return words, times, text


def test_stream_of_a_file_and_of_standard_input(
    streaming_checkpoint, demo_utterances, tmp_path, capsys
):
    command = ["--checkpoint", str(streaming_checkpoint), "--device", "cpu"]
    for u in demo_utterances[:2]:
        assert decode.main(["--stream", u.path, *command]) == 0
        captured = capsys.readouterr()
        words, times, text = words_of_stream(captured.out)
        assert "RTF" in captured.err
        assert words == text.split() and len(set(words)) > 3
        starts = times[::2]
        ends = times[1::2]
        assert starts == sorted(starts) and ends == sorted(ends)
        assert ends[-1] <= u.seconds + 0.04
        # The same text as at once.
        assert decode.main([u.path, *command, "--chunk", "16", "--workers", "0"]) == 0
        assert text == capsys.readouterr().out.split("\t")[1].strip()

    # The same samples from a file and from standard input, where half a sample comes too.
    integers = (data.load_audio(u.path) * 32767).to(torch.int16).numpy()
    soundfile.write(tmp_path / "x.wav", integers, 16_000)
    assert decode.main(["--stream", str(tmp_path / "x.wav"), *command]) == 0
    expected = words_of_stream(capsys.readouterr().out)
    raw = integers.astype("<i2").tobytes() + b"x"
    script = [sys.executable, ROOT / "decode.py", "--stream", "-", *command]
    done = subprocess.run(script, input=raw, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert words_of_stream(done.stdout.decode()) == expected


def test_a_word_is_printed_once_it_is_complete():
    """Tokens here are words themselves: "a" begins one, "-b" goes on with it."""

    def words_of(tokens):
        words = []
        for text, start in tokens:
            if text.startswith("-") and words:
                words[-1] = Word(words[-1].word + text[1:], words[-1].start, start + 0.04, 1.0)
            else:
                joined = text.startswith("-")
                words.append(Word(text.strip("-"), start, start + 0.04, 1.0, joined))
        return words

    live = LiveWords(words_of)
    tokens = []
    printed = []
    arrivals = [
        (0.5, [("in", 0.2)]),  # may go on
        (1.0, [("-ter", 0.6), ("na", 0.9)]),  # "inter" is complete
        (1.5, []),
        (2.0, []),  # a second of silence: "na" is complete
        (2.5, [("-tion", 2.2)]),
        (9.0, []),
    ]
    for now, new in arrivals:
        tokens += new
        printed.append([word.word for word in live.update(tokens, now)])
    assert printed == [[], ["inter"], [], ["na"], [], ["tion"]]
    assert text_of(live.words) == "inter nation"


def test_streams_that_cannot_be(streaming_checkpoint, by_heart, tmp_path, capsys):
    for arguments in (["--stream", "x.wav"], ["x.wav", "--chunk", "8"]):
        assert decode.main([*arguments, "--checkpoint", str(by_heart[0])]) == 2
        assert "pretrain_kd.py --chunk 16" in capsys.readouterr().err
    soundfile.write(tmp_path / "short.wav", numpy.zeros(100), 16_000)
    for source in ("short.wav", "missing.wav"):
        command = ["--stream", str(tmp_path / source), "--checkpoint", str(streaming_checkpoint)]
        assert decode.main(command) == 2
        error = capsys.readouterr().err.splitlines()
        assert source in error[-1] and len(error) == 2
        assert "download" not in error[-1]
