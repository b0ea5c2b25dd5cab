"""A student that streams: chunk by chunk it hears what the masked pass over the whole utterance hears."""
import json
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import soundfile
import torch
import torchaudio

import data
import decode
import finetune_rnnt
import model
from conftest import ROOT
from decode import FRAME, word_errors
from model import RANDOM, Config, Student
from search import GreedyTransducer

TINY = Config(dim=32, layers=3, kernel=7, channels=8, chunk=16, left=5, vocab_size=6, predictor_dim=24, joiner_dim=20)


def streaming_student(**changes):
    torch.manual_seed(0)
    return Student(replace(TINY, **changes)).eval()


# ---------------------------------------------------------------------------- the masked pass

@pytest.mark.parametrize("chunk, left", [(1, 0), (4, 6), (8, 3), (16, 64)])
def test_a_frame_depends_on_its_chunk_and_the_left_context_only(chunk, left):
    """One block: gradients of each output frame with respect to the subsampled input, against the definition."""
    student = streaming_student(chunk=chunk, left=left, layers=1, kernel=3)
    features = torch.randn(1, 4 * 30, 80)
    seen = {}
    student.encoder.subsampling.register_forward_hook(
        lambda module, inputs, output: (seen.update(x=output[0].detach().requires_grad_()), (seen["x"], output[1]))[1])
    hidden, [T] = student.encoder(features, torch.tensor([120]))
    for t in range(T):
        [gradient] = torch.autograd.grad(hidden[0, t].square().sum(), seen["x"], retain_graph=True)
        depends = set(gradient[0].abs().sum(-1).nonzero()[:, 0].tolist())
        expected = set()
        for s in range(max(0, t - 2), t + 1):                       # causal convolution of three frames, each ...
            start = s // chunk * chunk                              # ... after an attention over its own chunk
            expected |= set(range(max(0, start - left), min(start + chunk, T)))
        assert depends == expected, t


def test_a_streaming_utterance_does_not_depend_on_its_batch_and_padding_is_finite():
    student = streaming_student(left=0, chunk=4)
    features, lengths = torch.randn(3, 400, 80), torch.tensor([400, 41, 150])
    together, frames = student.encoder(features, lengths)
    assert torch.isfinite(together).all()
    together.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.encoder.parameters())
    for i, n in enumerate(lengths.tolist()):
        alone, [count] = student.encoder(features[i:i + 1, :n], lengths[i:i + 1])
        torch.testing.assert_close(together[i, :count], alone[0], atol=1e-5, rtol=0)


def test_random_chunks_come_from_the_seeded_generator():
    student = streaming_student(chunk=RANDOM)
    features, length = torch.randn(1, 600, 80), torch.tensor([600])
    whole = student.encoder(features, length)[0]
    chunked = [student.encoder(features, length, chunk)[0] for chunk in (0, 4, 8, 16, 32)]
    torch.testing.assert_close(whole, chunked[0])                            # nothing asked: the whole utterance
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    drawn = []
    for seed in range(40):
        outputs = []
        for _ in range(2):
            torch.manual_seed(seed)
            outputs.append(student.encoder(features, length)[0])
        assert torch.equal(*outputs)
        drawn.append([torch.allclose(outputs[0], c, atol=1e-5) for c in chunked].index(True))
    assert set(drawn) == {0, 1, 2, 3, 4} and 10 < drawn.count(0) < 30


def test_checkpoints_from_before_streaming_load():
    full = streaming_student(chunk=0)
    config = {k: v for k, v in vars(full.config).items() if k not in ("chunk", "left")}
    again = model.load_student({"config": config, "model": full.state_dict()})
    assert again.config.chunk == 0 and again.encoder.blocks[0].convolution.depthwise.padding == (3,)


# ---------------------------------------------------------------------------- chunk by chunk

def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def cut(audio, sizes, seed):
    """Blocks of random length, as they might arrive."""
    generator, blocks = torch.Generator().manual_seed(seed), []
    while len(audio):
        n = torch.randint(*sizes, (), generator=generator).item()
        blocks.append(audio[:n])
        audio = audio[n:]
    return blocks


def loud(student):
    """Opinions strong enough to change from frame to frame."""
    for module in (student.joiner, student.predictor):
        for p in module.parameters():
            p.data.mul_(4)
    student.joiner.out.bias.data[0] += 3
    return student


def greedy(student, hidden):
    search = GreedyTransducer(student)
    for h in hidden:
        search.advance(h, torch.tensor([h.shape[1]]))
    return search.said[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 40])
def test_a_stream_says_what_the_masked_pass_says(chunk):
    """Features too are computed as the audio comes; every length round the ends of a chunk, and some long ones."""
    student, said = loud(streaming_student(chunk=16)), 0
    edges = [chunk * FRAME * k + n for k in (1, 3) for n in (-FRAME, -1, 0, 1, 319, 320, 359, 360, 361)]
    for samples in [320, 479, 641, *(n for n in edges if n >= 320), 60_001]:
        audio = noise(samples, samples)
        features = data.log_mel(audio)[None]
        whole, [T] = student.encoder(features, torch.tensor([features.shape[1]]), chunk)
        pieces = list(decode.hear_chunks(student, cut(audio, (1, 9000), chunk), chunk, torch.device("cpu")))
        assert [p.shape[1] for p in pieces[:-1]] == [chunk] * (len(pieces) - 1)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)
        streamed, at_once = greedy(student, pieces), greedy(student, [whole])
        assert [token[:2] for token in streamed] == [token[:2] for token in at_once], samples
        said += len(streamed)
    assert said > 20


def test_a_chunk_is_heard_as_soon_as_its_look_ahead_is_there_and_costs_the_same_for_ever():
    student, chunk = streaming_student(chunk=4, left=6), 4
    work, kept = [], []
    student.encoder.subsampling.register_forward_pre_hook(lambda module, inputs: work.append(inputs[0].shape[1]))
    stream = student.encoder.stream
    student.encoder.stream = lambda x, past: kept.append(stream(x, past)) or kept[-1]
    arrived = []

    def audio():
        for block in noise(60 * FRAME).split(40):
            arrived.append(len(block))
            yield block

    for n, _ in enumerate(decode.hear_chunks(student, audio(), chunk, torch.device("cpu")), 1):
        if n < 15:
            assert sum(arrived) == n * chunk * FRAME + decode.LOOK_AHEAD
    assert n == 15 and set(work[1:-1]) == {(chunk + 2) * 4 + 3}
    sizes = [sum(x.numel() for keys_and_heard in past for x in keys_and_heard) for _, past in kept]
    assert len(set(sizes[1:])) == 1 and kept[-1][1][0][0].shape[3] == 6


@pytest.mark.parametrize("rate, channels, subtype", [(8000, 1, "PCM_16"), (11_025, 2, "FLOAT"), (16_000, 1, "PCM_24"),
                                                     (44_100, 2, "PCM_U8"), (48_000, 2, "PCM_24")])
@pytest.mark.parametrize("seconds", [0.05, 1.9, 4.0, 6.0, 13.37])
def test_a_file_in_blocks_is_the_file(rate, channels, subtype, seconds, tmp_path):
    samples = noise(int(rate * seconds) * channels).view(-1, channels).numpy()
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype=subtype)
    samples = torch.from_numpy(soundfile.read(tmp_path / "x.wav", dtype="float32", always_2d=True)[0])
    whole = torchaudio.functional.resample(samples.mean(1), rate, 16_000)
    torch.testing.assert_close(torch.cat(list(data.stream_audio(tmp_path / "x.wav", 4))), whole, atol=1e-5, rtol=0)
    assert torch.equal(data.load_audio(tmp_path / "x.wav"), whole)


# ---------------------------------------------------------------------------- long recordings

def test_pieces_of_speech_without_a_pause_are_joined_as_if_there_were_no_cut():
    """A student that sees less than MARGIN (no attention, convolutions of 3 x 3 frames) hears in pieces what it hears
    at once, although every cut falls into the noise."""
    student = streaming_student(chunk=0, seconds=4.0)
    for block in student.encoder.blocks:
        for p in block.attention.out.parameters():
            p.data.zero_()
    audio, features = noise(70 * 16_000), []
    student.encoder.subsampling.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].shape[1]))
    pieces = list(decode.hear_pieces(student, cut(audio, (1, 100_000), 0), torch.device("cpu")))
    assert len(pieces) > 10 and [pause for _, pause in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(features) <= 4 * (2 * decode.MARGIN + 160)                  # 1.6 x 4 s and the margins, however long
    mel = data.log_mel(audio)[None]
    whole = student.encoder(mel, torch.tensor([mel.shape[1]]))[0]
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in pieces], 1), whole, atol=1e-4, rtol=0)


def test_cuts_fall_into_pauses():
    student, gaps, audio, n = streaming_student(chunk=0, seconds=3.0), [], [], 0
    for i, seconds in enumerate([3.1, 2.2, 4.0, 3.3, 2.6, 3.9, 3.0, 2.4, 3.5]):
        audio += [noise(int(16_000 * seconds), i), torch.zeros(8000)]
        n += len(audio[-2]) + 8000
        gaps.append(((n - 8000) / FRAME, n / FRAME))
    frames = 0
    for hidden, pause in decode.hear_pieces(student, audio, torch.device("cpu")):
        assert pause and (frames == 0 or any(start < frames < end for start, end in gaps)), frames / 25
        frames += hidden.shape[1]
    assert frames == (n // 160 + 2) // 4


@pytest.fixture(scope="module")
def by_heart(demo_utterances, tmp_path_factory):
    """A student that knows three utterances of the demo by heart, with silence round them -> its folder, those three"""
    three = sorted(demo_utterances, key=lambda u: u.seconds)[20:23]
    tokenizer = data.train_tokenizer([u.text for u in three], 64, 2)
    [batch] = data.Loader(three, 60, tokenizer).epoch()
    torch.manual_seed(0)
    config = Config(dim=64, layers=2, kernel=15, channels=16, dropout=0, predictor_dim=64, joiner_dim=64,
                    vocab_size=tokenizer.get_vocab_size(), predictor_dropout=0, seconds=three[1].seconds + 0.25)
    student = Student(config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    options = finetune_rnnt.parse([])
    waveforms, draw = [data.load_audio(u.path) for u in three], torch.Generator().manual_seed(0)
    for step in range(300):
        silence = torch.randint(4000, (3, 2), generator=draw).tolist()
        mels = [data.log_mel(torch.nn.functional.pad(w, (before, after)))
                for w, (before, after) in zip(waveforms, silence)]
        batch.features = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
        batch.feature_lengths = torch.tensor([len(mel) for mel in mels])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 20, 1, (300 - step) / 150)
        loss, count, _ = finetune_rnnt.stage2_loss(student, batch, options)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
    folder = tmp_path_factory.mktemp("by-heart")
    model.save_checkpoint(folder / "best.pt", model=student.state_dict(), config=config, tokenizer=tokenizer.to_str())
    return folder, three


def test_long_audio_doubles_no_word_and_loses_few(by_heart, tmp_path, capsys):
    """32 utterances one after the other, whatever the pause between them. A student that knows three sentences by heart
    and hears half of one may fall silent: 0 to 10 % of the words, depending on its seed."""
    folder, three = by_heart
    order = [three[i] for i in torch.randint(3, (32,), generator=torch.Generator().manual_seed(0)).tolist()]
    for pause in (3200, 8000):
        audio = torch.cat([x for u in order for x in (data.load_audio(u.path), torch.zeros(pause))])
        soundfile.write(tmp_path / "long.wav", audio.numpy(), 16_000)
        assert decode.main([str(tmp_path / "long.wav"), "--checkpoint", str(folder), "--device", "cpu", "--workers",
                            "0", "--output", str(tmp_path / "long.jsonl")]) == 0
        captured = capsys.readouterr()
        errors = word_errors(" ".join(u.text for u in order), captured.out.split("\t")[1])
        assert "RTF" in captured.err
        assert errors.insertions == 0 and errors.rate < 15, (pause, str(errors), errors.alignment)
        [row] = map(json.loads, (tmp_path / "long.jsonl").read_text().splitlines())
        starts = [word["start"] for word in row["words"]]
        assert starts == sorted(starts) and len(audio) / 16_000 - 5 < starts[-1] < len(audio) / 16_000


@pytest.fixture
def streaming_checkpoint(demo_utterances, tmp_path):
    """A student that streams, not trained but full of opinions."""
    tokenizer = data.train_tokenizer([u.text for u in demo_utterances], 40, 2)
    student = loud(streaming_student(chunk=RANDOM, vocab_size=tokenizer.get_vocab_size()))
    model.save_checkpoint(tmp_path / "best.pt", model=student.state_dict(), config=student.config,
                          tokenizer=tokenizer.to_str())
    return tmp_path


def test_stream_of_a_file_and_of_standard_input(streaming_checkpoint, demo_utterances, capsys):
    command = ["--checkpoint", str(streaming_checkpoint), "--device", "cpu"]
    for u in demo_utterances[:2]:
        assert decode.main(["--stream", u.path, *command]) == 0
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert all("latency 662.5 + " in line for line in lines) and "RTF" in captured.err
        text = "".join(line.split(" ms  ")[1] for line in lines).strip()
        assert decode.main([u.path, *command, "--chunk", "16", "--workers", "0"]) == 0
        assert text == capsys.readouterr().out.split("\t")[1].strip() != ""
        times = [float(x) for line in lines for x in line.split(" s ")[0].split("-")]
        assert times == sorted(times) and times[-1] <= u.seconds + 0.04
    raw = (data.load_audio(u.path) * 32767).to(torch.int16).numpy().astype("<i2").tobytes() + b"x"  # half a sample too
    done = subprocess.run([sys.executable, ROOT / "decode.py", "--stream", "-", *command], input=raw,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    streamed = [line.split(" ms  ")[1] for line in done.stdout.decode().splitlines()]
    assert "".join(streamed).strip() == text and len(streamed) > 1


def test_streams_that_cannot_be(streaming_checkpoint, by_heart, tmp_path, capsys):
    for arguments in (["--stream", "x.wav"], ["x.wav", "--chunk", "8"]):
        assert decode.main([*arguments, "--checkpoint", str(by_heart[0])]) == 2
        assert "pretrain_kd.py --chunk 16" in capsys.readouterr().err
    soundfile.write(tmp_path / "short.wav", numpy.zeros(100), 16_000)
    for source in ("short.wav", "missing.wav"):
        assert decode.main(["--stream", str(tmp_path / source), "--checkpoint", str(streaming_checkpoint)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert source in error[-1] and len(error) == 2
