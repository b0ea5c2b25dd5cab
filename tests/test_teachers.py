"""Every family of teachers, tiny and random, against the model called by hand; what is refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import data
import model
from conftest import CONVOLUTIONS, DEMO, ROOT, TOKENS, save_teacher
from pretrain_kd import Teacher, align, target_names, teacher_targets
from tools.command_line import UserError
from tools.encoders import Clock, measure_clock

WIDTHS = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
CONV = WIDTHS | CONVOLUTIONS
LAYER_NORM = CONV | dict(feat_extract_norm="layer", do_stable_layer_norm=True)
DATA2VEC = CONV | dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=3)
CONFORMER = CONV | dict(feat_extract_norm="layer", conv_depthwise_kernel_size=7)
BERT = WIDTHS | dict(feature_projection_input_dim=160, conv_depthwise_kernel_size=7)
# With a window of 4 s instead of 30 s
WHISPER = TOKENS | dict(
    d_model=16,
    encoder_layers=3,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=24,
    max_source_positions=200,
)
MOONSHINE = TOKENS | dict(
    hidden_size=16,
    intermediate_size=24,
    encoder_num_hidden_layers=3,
    encoder_num_attention_heads=2,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
)
MELS = dict(subsampling_conv_channels=8, conv_kernel_size=9, num_mel_bins=80)
PARAKEET = dict(vocab_size=9, pad_token_id=8, encoder_config=WIDTHS | MELS)
LASR = WIDTHS | dict(subsampling_conv_channels=8)
GRANITE = WIDTHS | dict(num_hidden_layers=4, vocab_size=12)
SEW = CONV | dict(conv_dim=(8,) * 13)


def wave(mask, normalise=True):
    return hf.Wav2Vec2FeatureExtractor(return_attention_mask=mask, do_normalize=normalise)


# family: (name in transformers, configuration, feature extractor, {layer: (hop, centre of the first
# frame) in samples}, may it be padded?). The centres follow from kernels and strides: wav2vec 2.0's
# first frame spans 400 samples, Moonshine's 127 + 6 * 64 + 2 * 192 = 895, LASR's 12 hops of log-mel
# more than 400; adapters and Parakeet pad both ends, so that their first frame lies on the first
# input frame; w2v-BERT and Granite fill the last group of input frames, which looks like 80 samples
# less a time.
MEL_4_S = hf.WhisperFeatureExtractor(chunk_length=4)
USUAL = {"0": (320, 200), "2": (320, 200), "last": (320, 200)}
ADAPTED = {"2": (320, 200), "last": (2560, 200)}
LATE = {"0": (384, 447.5), "last": (384, 447.5)}
FAMILIES = {
    "wav2vec2": ("Wav2Vec2", CONV, wave(False), USUAL, False),
    "adapter": ("Wav2Vec2", LAYER_NORM | dict(add_adapter=True), wave(True), ADAPTED, False),
    "hubert-base": ("Hubert", CONV, wave(True, False), USUAL, False),
    "hubert-large": ("Hubert", LAYER_NORM, wave(True), USUAL, True),
    "wavlm-base": ("WavLM", CONV, wave(True), USUAL, False),
    "wavlm-large": ("WavLM", LAYER_NORM, wave(True), USUAL, True),
    "unispeech-sat": ("UniSpeechSat", LAYER_NORM, wave(True), USUAL, True),
    "data2vec-audio": ("Data2VecAudio", DATA2VEC, wave(True), USUAL, False),
    "wav2vec2-conformer": ("Wav2Vec2Conformer", CONFORMER, wave(True), USUAL, False),
    "w2v-bert": ("Wav2Vec2Bert", BERT, hf.SeamlessM4TFeatureExtractor(), USUAL, True),
    "sew": ("SEW", SEW, wave(False), {"1": (640, 360), "last": (320, 200)}, False),
    "whisper": ("Whisper", WHISPER, MEL_4_S, {"1": (320, 160), "last": (320, 160)}, True),
    "moonshine": ("Moonshine", MOONSHINE, wave(True, False), LATE, False),
    "parakeet": (
        "Parakeet",
        PARAKEET,
        hf.ParakeetFeatureExtractor(),
        {"1": (1280, 80), "last": (1280, 80)},
        True,
    ),
    "lasr": (
        "Lasr",
        LASR,
        hf.LasrFeatureExtractor(),
        {"0": (640, 1160), "last": (640, 1160)},
        True,
    ),
    "granite": (
        "GraniteSpeech5",
        GRANITE,
        hf.GraniteSpeech5FeatureExtractor(),
        {"1": (640, 240), "last": (1280, 560)},
        False,
    ),
}


def random_model(name, options):
    """-> hf.NAMEModel, or what else it is called, with the same random weights in every call"""
    torch.manual_seed(0)
    other = {"Parakeet": "ParakeetForCTC", "Lasr": "LasrEncoder"}
    other["GraniteSpeech5"] = "GraniteSpeech5Encoder"
    network = getattr(hf, other.get(name, f"{name}Model"))
    return network(network.config_class(**options))


def noise(*seconds):
    waves = []
    for duration in seconds:
        generator = torch.Generator().manual_seed(int(100 * duration))
        waves.append(0.1 * torch.randn(int(16_000 * duration), generator=generator))
    return waves


def save(folder, network, extractor):
    network.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


def save_family(folder, family, dtype=torch.float32):
    name, options, extractor, *_ = FAMILIES[family]
    return save(folder, random_model(name, options).to(dtype), extractor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> folder, made when first asked for"""
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: save_family(root / family, family))


@pytest.fixture(scope="module")
def load(folder):
    """family -> Teacher of all layers that its row in FAMILIES has"""
    return functools.cache(
        lambda family: Teacher(f"{folder(family)}:{','.join(FAMILIES[family][3])}")
    )


def network_of(teacher):
    return teacher.encoder.model.network


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------- embeddings


def by_hand(folder, family, *waveforms):
    """-> for each utterance {layer: the model's own frames (n, D)}: transformers called as its
    documentation shows, with one utterance and no mask but the extractor's own"""
    name, options, extractor, *_ = FAMILIES[family]
    extractor = type(extractor).from_pretrained(folder)
    network = type(random_model(name, options))
    encoder = network.from_pretrained(folder, dtype=torch.float32).eval()
    if family in ("whisper", "moonshine", "parakeet"):
        encoder = encoder.encoder
    results = []
    for waveform in waveforms:
        inputs = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            out = encoder(**inputs, output_hidden_states=True)
        layers = {str(k): states for k, states in enumerate(out.hidden_states)}
        layers["last"] = out.last_hidden_state
        # What these two give beyond the audio is padding.
        samples = len(waveform)
        n = {"whisper": samples // 320, "parakeet": -(-(samples // 160) // 8)}.get(family)
        results.append({k: states[0, :n].numpy() for k, states in layers.items()})
    return results


def at_25_hz(frames, samples, hop, centre):
    """Brute force: for each part of each target the nearest frame, or np.interp"""
    T = (samples + 320) // 640
    stack = max(1, round(640 / hop))
    middles = (np.arange(T * stack) + 0.5) * 640 / stack
    centres = centre + hop * np.arange(len(frames))
    if 640 % hop:
        parts = [np.interp(middles, centres, column) for column in frames.T]
        parts = np.stack(parts, axis=1)
    else:
        parts = frames[[np.abs(centres - middle).argmin() for middle in middles]]
    return np.concatenate([parts[k::stack] for k in range(stack)], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_the_model_called_by_hand(folder, load, family):
    """Several layers of one teacher at once, whatever their rates, side by side"""
    *_, clocks, batched = FAMILIES[family]
    teacher = load(family)
    assert [(clock.hop, clock.centre) for clock in teacher.clocks] == list(clocks.values())
    assert teacher.encoder.batched == batched
    assert not any(p.requires_grad for p in network_of(teacher).parameters())
    rate = f"{16_000 / clocks['last'][0]:.4g} Hz"
    assert type(network_of(teacher)).__name__ in str(teacher) and rate in str(teacher)
    waves = noise(2.0, 3.333)
    for waveform, frames in zip(waves, by_hand(folder(family), family, *waves)):
        samples = len(waveform)
        expected = [at_25_hz(frames[k], samples, *clock) for k, clock in clocks.items()]
        [found], [n] = teacher([waveform])
        assert n == len(expected[0])
        assert teacher.widths == [x.shape[1] for x in expected]
        close(found, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_the_batch(load, family):
    """Nor is any audio too short: the first one has 10 ms."""
    teacher = load(family)
    waves = noise(0.01, 0.09, 0.7, 2.0, 1.3, 5.5, 1.333)
    together, lengths = teacher(waves)
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    padded, again = teacher(padded, torch.tensor([len(w) for w in waves]))
    torch.testing.assert_close(padded, together)
    # As many as the student's encoder has frames
    expected = [max(1, (len(w) // 160 + 1 + 1) // 4) for w in waves]
    assert lengths.tolist() == again.tolist() == expected
    for row, n, waveform in zip(together, lengths, waves):
        alone, [m] = teacher([waveform])
        assert n == m and (row[:n] - alone[0]).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize(
    "family, masks", [("hubert-base", [None, None]), ("hubert-large", [[16_000, 24_000]])]
)
def test_group_norm_sees_neither_padding_nor_a_mask(load, family, masks):
    seen = []

    def spy(network, args, inputs):
        mask = inputs.get("attention_mask")
        seen.append(None if mask is None else mask.sum(1).tolist())

    hook = network_of(load(family)).register_forward_pre_hook(spy, with_kwargs=True)
    load(family)(noise(1.0, 1.5))
    hook.remove()
    assert seen == masks


@pytest.mark.parametrize("normalise", [True, False])
def test_the_feature_extractor_decides_about_normalisation(tmp_path, normalise):
    network = random_model("Hubert", LAYER_NORM)
    teacher = Teacher(save(tmp_path / "x", network, wave(True, normalise)) + ":0")
    [waveform] = noise(1.0)
    a, _ = teacher([waveform])
    b, _ = teacher([3 * waveform + 0.2])
    assert bool((a - b).norm() < 1e-2 * a.norm()) == normalise


@pytest.mark.parametrize("family", ["hubert-large", "whisper", "moonshine", "parakeet"])
def test_weights_in_half_precision_and_teachers_that_compute_in_it(tmp_path, family):
    [waveform] = noise(1.5)
    folder = save_family(tmp_path / "half", family, torch.bfloat16)
    teacher = Teacher(folder)
    assert {p.dtype for p in network_of(teacher).parameters()} == {torch.float32}
    [exact], _ = teacher([waveform])
    [frames] = by_hand(folder, family, waveform)
    close(exact, at_25_hz(frames["last"], len(waveform), *FAMILIES[family][3]["last"]))
    [rough], _ = Teacher(folder, dtype=torch.bfloat16)([waveform])
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


def test_audio_longer_than_the_window_of_whisper(load):
    teacher = load("whisper")
    [waveform] = noise(9.5)
    whole, [n] = teacher([waveform])
    assert n == 238  # 9.5 s at 25 Hz, rounded up
    for k in range(3):  # every window of 4 s as if it stood alone
        piece, [m] = teacher([waveform[64_000 * k : 64_000 * (k + 1)]])
        torch.testing.assert_close(whole[0, 100 * k : 100 * k + m], piece[0])


def test_layers_that_nobody_asked_for_are_not_computed(folder):
    for layers, left in (("1", 2), ("1,last", 3)):
        teacher = Teacher(f"{folder('wavlm-base')}:{layers}")
        assert len(network_of(teacher).encoder.layers) == left


# ---------------------------------------- alignment in time


@pytest.mark.parametrize(
    "hop, offset, stack",
    [
        (320, -80, 2),
        (640, 0, 1),
        (384, -511, 2),
        (1280, 1120, 1),
        (2560, 2160, 1),
        (160, 160, 4),
        (640, -1680, 1),
    ],
)
def test_targets_line_up_with_the_student(hop, offset, stack):
    """Each frame of this teacher is the sample on which it is centred: target t must be the middle
    of the student's frame, 640 t + 320."""
    samples = 12 * 16_000
    frames = (samples + offset) // hop
    centres = torch.arange(frames) * hop + (hop - offset) / 2
    target = align(centres[:, None].repeat(1, 3), samples, Clock(hop, offset))
    assert target.shape == (300, 3 * stack)
    found = target.view(300, stack, 3).mean((1, 2))
    error = (found - (640 * torch.arange(300) + 320))[3:-5].abs().max()
    # Whole frames are the nearest; between frames it is exact.
    assert error <= (0.1 if 640 % hop else hop / 2)


@pytest.mark.parametrize("family", ["hubert-large", "w2v-bert", "whisper", "lasr"])
def test_a_click_changes_the_target_of_its_time(folder, family):
    """What enters the first layer, with and without a click in the middle of the student's frame
    30. (LASR's own frames are 52 ms late, where whole frames can be 20 ms off.)"""
    [quiet] = noise(2.5)
    click = quiet.clone()
    click[30 * 640 + 300 : 30 * 640 + 340] += 1
    (a, b), _ = Teacher(f"{folder(family)}:0")([quiet, click])
    energy = (a - b).square().sum(1)
    time = (energy * torch.arange(len(energy))).sum() / energy.sum()
    assert abs(time - 30) < 0.5


def test_the_clock_of_any_chain_of_convolutions():
    generator = np.random.default_rng(0)
    for _ in range(20):
        chain = []
        for _ in range(generator.integers(1, 4)):
            kernel, stride = generator.integers(1, 12, 2).tolist()
            chain.append((kernel, stride, int(generator.integers(0, kernel))))

        def count(samples):
            for kernel, stride, padding in chain:
                samples = (samples + padding - kernel) // stride + 1
            return samples

        clock = measure_clock("x", count)
        for samples in generator.integers(5_000, 200_000, 50).tolist():
            assert clock.frames(samples) == count(samples), chain
    with pytest.raises(UserError, match="teacher x.*however long"):
        measure_clock("x", lambda samples: 12)
    with pytest.raises(UserError, match="teacher x.*fixed whole number"):
        measure_clock("x", lambda samples: samples * 30 // 16_000)


def test_where_a_students_frame_is_centred():
    """An impulse in each frame of log-mel in turn: output t sees frames around 4 t + 2, which is
    40 t + 20 ms, and a teacher gives as many targets as there are outputs."""
    torch.manual_seed(0)
    student = model.Student(model.Config(dim=16, layers=1, channels=8)).eval()
    # A batch of silence and 48 impulses
    features = torch.zeros(49, 48, 80)
    features[range(1, 49), range(48)] = 10
    with torch.no_grad():
        out, _ = student.encoder.subsampling(features, torch.full((49,), 48))
    response = (out[1:] - out[0]).square().sum(-1)  # (48, 12)
    for t in range(1, 11):
        seen = response[:, t].nonzero()[:, 0]
        assert (seen.min() + seen.max()).item() / 2 == 4 * t + 2
        mean = (response[:, t] * torch.arange(48)).sum() / response[:, t].sum()
        assert abs(mean - (4 * t + 2)) < 1  # random weights: within 10 ms of the middle


# ---------------------------------------- a module of one's own

OWN = """
import torch, torchaudio

class MyTeacher(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mel = torchaudio.transforms.MelSpectrogram(
            n_fft=400, hop_length=HOP, n_mels=20, center=False
        )
        self.out = torch.nn.Linear(20, 6)

    def forward(self, waveforms, lengths):
        features = self.mel(waveforms).add(1e-6).log().transpose(1, 2)
        return self.out(features), (lengths - 400) // HOP + 1
"""


@pytest.mark.parametrize("hop", [320, 400])
def test_a_module_of_ones_own_is_a_teacher(tmp_path, hop):
    (tmp_path / "my_teacher.py").write_text(OWN.replace("HOP", str(hop)))
    teacher = Teacher(f"{tmp_path}/my_teacher.py:MyTeacher")
    assert teacher.clocks == [Clock(hop, hop - 400)] and teacher.encoder.batched
    assert target_names([teacher]) == ["MyTeacher"] and "MyTeacher" in str(teacher)
    waves = noise(2.0, 0.01, 1.3)
    embeddings, lengths = teacher(waves)
    assert lengths.tolist() == [50, 1, 33] and embeddings.shape == (3, 50, teacher.dim)
    for k in (0, 2):
        samples = len(waves[k])
        frames = network_of(teacher)(waves[k][None], torch.tensor([samples]))[0][0]
        close(embeddings[k, : lengths[k]], at_25_hz(frames.numpy(), samples, hop, 200))
    rough = Teacher(f"{tmp_path}/my_teacher.py:MyTeacher", dtype=torch.bfloat16)
    assert (rough(waves)[0] - embeddings).norm() < 0.05 * embeddings.norm()


SHAPE = "must return frames (B, n, D) and lengths (B,)"


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("self.out(features),", "self.out(features) #", [SHAPE, "one tensor (1, "]),
        ("self.out(features),", "features[0],", [SHAPE, "one tensor ("]),
        ("(lengths - 400) //", "10 * lengths //", [SHAPE]),
        ("(lengths - 400) // 320 + 1", "lengths[:, None]", [SHAPE]),
        ("return", "raise KeyError('x')\n        return", ["KeyError", "mend", "own.py:15"]),
        ("+ 1", "* 0 + 9", ["however long"]),
        ("class", "def broken(:\nclass", ["SyntaxError", "mend"]),
        ("MyTeacher(torch.nn.Module)", "Other(torch.nn.Module)", ["MyTeacher"]),
        (OWN.replace("HOP", "320"), "class MyTeacher: pass", ["torch.nn.Module"]),
    ],
)
def test_a_module_that_breaks_the_contract_is_one_line(tmp_path, old, new, words):
    (tmp_path / "own.py").write_text(OWN.replace("HOP", "320").replace(old, new))
    is_refused(f"{tmp_path}/own.py:MyTeacher", *words)


# ---------------------------------------- what must be refused


def is_refused(name, *words):
    with pytest.raises(UserError) as error:
        Teacher(str(name))
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    assert message.startswith("teacher ") and all(word in message for word in words), message


def test_wrong_names_and_layers_are_one_line(folder, tmp_path):
    hubert = folder("hubert-base")
    is_refused(f"{hubert}:4", "layer '4'", f"{hubert}:0 to {hubert}:3", f"{hubert}:last")
    is_refused(f"{hubert}:1,x", "layer 'x'")
    is_refused(f"{hubert}:-1", "layer '-1'")
    is_refused(f"{hubert}:1,1", "twice")
    is_refused(tmp_path / "none", "no such folder")
    is_refused("./none", "no such folder")
    is_refused("own.py", "name the class")
    is_refused("none.py:MyTeacher", "no such file")
    missing = "no-such-owner/no-such-model"
    is_refused(missing, f"hf download {missing}", "HF_HOME")


SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
SPEECH_T5 = dict(
    hidden_size=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)
DAC = dict(
    encoder_hidden_size=8,
    decoder_hidden_size=16,
    downsampling_ratios=[8, 8],
    upsampling_ratios=[8, 8],
    n_codebooks=2,
)
MIMI = SMALL | dict(
    num_key_value_heads=1,
    num_filters=2,
    codebook_size=4,
    codebook_dim=4,
    vector_quantization_hidden_dimension=4,
    upsample_groups=1,
)
CODEC = hf.EncodecFeatureExtractor(sampling_rate=16_000)
SPECTRUM = hf.ASTFeatureExtractor(max_length=64)


@pytest.mark.parametrize(
    "name, options, extractor, words",
    [
        ("Bert", SMALL | dict(vocab_size=9), wave(True), ["a text model (bert)"]),
        ("ViT", SMALL | dict(image_size=8, patch_size=4), wave(True), ["a vision model (vit)"]),
        ("AST", SMALL | dict(max_length=64), SPECTRUM, ["however long"]),
        ("SpeechT5", SPEECH_T5, hf.SpeechT5FeatureExtractor(), ["cannot encode audio"]),
        ("Dac", DAC, CODEC, ["cannot encode audio"]),
        ("Mimi", MIMI, CODEC, ["cannot encode audio"]),
        ("Mimi", MIMI, hf.EncodecFeatureExtractor(), ["16000 Hz"]),
        ("Whisper", WHISPER | dict(num_mel_bins=128), MEL_4_S, ["128", "feature extractor"]),
    ],
)
def test_models_that_encode_no_speech_are_one_line(tmp_path, name, options, extractor, words):
    is_refused(save(tmp_path / "x", random_model(name, options), extractor), *words)


class Foreign:
    """What a pickle should not have"""


def test_damaged_checkpoints_are_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    is_refused(tmp_path / "empty", "empty", "hf download")
    bare = shutil.copytree(folder("hubert-base"), tmp_path / "bare")
    weights = bare / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    is_refused(bare, "bare", "hf download")
    torch.save({"x": Foreign()}, bare / "pytorch_model.bin")
    is_refused(bare, "pickle", "safetensors")
    weights.write_bytes(whole[:-100])
    is_refused(bare, "bare")
    weights.write_bytes(whole)
    state = load_file(weights)
    state["encoder.layers.0.final_layer_norm.weight"] *= float("nan")
    save_file(state, weights, {"format": "pt"})
    is_refused(bare, "not finite")
    del state["encoder.layers.1.final_layer_norm.weight"]
    save_file(state, weights, {"format": "pt"})
    is_refused(bare, "lack 1 tensors", "final_layer_norm")


def test_quantised_checkpoints_and_foreign_code_are_one_line(folder, tmp_path):
    path = shutil.copytree(folder("hubert-base"), tmp_path / "x") / "config.json"
    config = json.loads(path.read_text())
    for method in ("bitsandbytes", "gptq", "hqq", "fp8", "torchao", "awq"):
        quantised = {"quantization_config": {"quant_method": method, "load_in_4bit": True}}
        path.write_text(json.dumps(config | quantised))
        is_refused(path.parent, "quantised", method, "full precision")
    # A model with code of its own, which must not run
    (path.parent / "theirs.py").write_text("open('ran', 'w')")
    custom = config | {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    path.write_text(json.dumps(custom))
    is_refused(path.parent, "code", "never runs", "my_teacher.py:MyTeacher")
    path.write_text(json.dumps(config | {"model_type": "theirs"}))
    is_refused(path.parent, "theirs")
    path.write_text("{")
    is_refused(path.parent, "config.json")


class Hub(BaseHTTPRequestHandler):
    """A hub with one gated model, as the real one replies to those who have no token"""

    def do_HEAD(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


ONLINE = f"""
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
connect = socket.socket.connect
socket.socket.connect = lambda self, to: print("NETWORK", to) or connect(self, to)
from tools.encoders import SpeechEncoder
for name in sys.argv[1:]:
    try:
        print(SpeechEncoder(name).name)
    except ValueError as error:
        print(error)
"""


def test_hub_models_name_the_cure_and_folders_need_no_network(folder, tmp_path):
    """In a fresh process that may go to the network: folders don't; a gated or missing name is
    explained."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment["OMP_NUM_THREADS"] = "1"
    environment["HF_HOME"] = str(tmp_path)
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    folders = [folder(family) for family in ("hubert-base", "parakeet")]
    command = [sys.executable, "-c", ONLINE, *folders, "owner/gated", "owner/none"]
    done = subprocess.run(command, text=True, timeout=100, capture_output=True, env=environment)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[: len(folders)] == folders and "NETWORK" in lines[len(folders)]
    gated, none = [line for line in lines[len(folders) :] if "NETWORK" not in line]
    assert "HF_TOKEN" in gated and "hf auth login" in gated
    assert "the hub has no such model" in none


def test_no_network_call_when_offline(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network call: {args}")

    for name in ("socket.connect", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", refuse)
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # conftest.py sets it
    Teacher(folder("whisper"))
    is_refused("owner/none", "hf download owner/none")


# ---------------------------------------- targets


def test_standardise_gives_mean_0_and_variance_1(teacher_folders):
    teacher = Teacher(teacher_folders["hubert"])
    batches = [noise(1.0, 2.0), noise(1.5, 0.8)]
    raw = [teacher.embed(batch) for batch in batches]
    for embeddings, lengths in raw:
        for row, n in zip(embeddings, lengths):
            row[n:] = float("nan")  # padding must not count
    for _ in range(2):  # twice: it must not standardise what is standardised
        teacher.measure_statistics(raw)
    frames = []
    for batch in batches:
        for row, n in zip(*teacher(batch)):
            frames.append(row[:n])
    torch.testing.assert_close(frames[1] * teacher.std + teacher.mean, raw[0][0][1])
    frames = torch.cat(frames)
    torch.testing.assert_close(frames.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)

    other = Teacher(teacher_folders["hubert"])
    other.load_state(teacher.state())
    torch.testing.assert_close(other(batches[0]), teacher(batches[0]))
    # When its embeddings are in a cache, the encoder can go.
    cached, _ = other.embed(batches[0])
    other.release()
    torch.testing.assert_close(other.standardised(cached), teacher(batches[0])[0])


@pytest.mark.skipif(not (DEMO / "teachers").exists(), reason="demo/teachers is not there")
@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_the_demos_teachers(name, demo_utterances):
    teacher = Teacher(str(DEMO / "teachers" / name))
    waves = [data.load_audio(u.path) for u in demo_utterances[:2]]
    embeddings, lengths = teacher(waves)
    assert teacher.clocks[0].rate == 50 and torch.isfinite(embeddings).all()
    assert all(abs(n - len(w) / 640) <= 1 for n, w in zip(lengths, waves))
    speech = embeddings[0, : lengths[0]]
    # Different sounds have different embeddings.
    assert (speech[1:] - speech[:-1]).norm() > 0.1 * speech.norm()


class FakeTeacher:
    """Gives level + utterance everywhere; each layer is 4 wide."""

    def __init__(self, *levels):
        self.levels = torch.tensor(levels, dtype=torch.float)
        self.widths = [4] * len(levels)
        self.device = torch.device("cpu")

    def standardised(self, embeddings):
        return embeddings

    def embed(self, waves):
        utterances = torch.arange(len(waves))[:, None, None]
        embeddings = (self.levels.repeat_interleave(4) + utterances).expand(-1, 10, -1)
        return embeddings, torch.tensor([len(w) // 640 for w in waves])


def test_each_half_teacher_sees_its_half(tmp_path, monkeypatch):
    """demo/half_teachers.py: a tone changes the embeddings of the teacher that sees it, only."""
    monkeypatch.chdir(tmp_path)
    half_teachers = DEMO / "half_teachers.py"
    with pytest.raises(UserError, match="python -m demo.half_teachers low"):
        Teacher(f"{half_teachers}:Low")
    config = model.Config(layers=1, channels=8)
    for name in ("low", "high"):
        (tmp_path / "exp" / name).mkdir(parents=True)
        weights = model.Student(config).state_dict()
        model.save_checkpoint(tmp_path / "exp" / name / "best.pt", config=config, model=weights)
    time = torch.arange(data.SAMPLE_RATE) / data.SAMPLE_RATE
    [waveform] = noise(1.0)
    changes = {}
    for title in ("Low", "High"):
        teacher = Teacher(f"{half_teachers}:{title}")
        before, _ = teacher.embed([waveform])
        for hertz in (500, 5000):
            after, _ = teacher.embed([waveform + torch.sin(2 * torch.pi * hertz * time)])
            changes[title, hertz] = (after - before).norm()
    assert changes["Low", 500] > 10 * changes["Low", 5000]
    assert changes["High", 5000] > 10 * changes["High", 500]


def test_combine():
    batch = types.SimpleNamespace(embeddings=[], waveforms=[torch.zeros(6400), torch.zeros(3200)])
    teachers = [FakeTeacher(1), FakeTeacher(5, 9)]
    weights = [2.0, 1.0, 1.0]
    heads = teacher_targets(teachers, batch)
    assert [tuple(target.shape) for target in heads] == [(2, 10, 4)] * 3
    assert [target[0, 0, 0].item() for target in heads] == [1, 5, 9]
    assert [target[1, 9, 3].item() for target in heads] == [2, 6, 10]
    [average] = teacher_targets(teachers, batch, "average", weights)
    assert average.shape == (2, 10, 4) and (average[0] == 4).all() and (average[1] == 5).all()

    torch.manual_seed(0)
    drawn = Counter()
    for _ in range(400):
        [random] = teacher_targets(teachers, batch, "random", weights)
        levels = tuple(int(random[b, 0, 0]) - b for b in range(2))
        assert all((random[b] == levels[b] + b).all() for b in range(2))
        drawn[levels] += 1
    assert len(drawn) == 9  # each utterance draws for itself, by weight
    first = sum(n for levels, n in drawn.items() if levels[0] == 1)
    assert first == pytest.approx(200, abs=40)


def test_targets_are_float32_under_autocast(teacher_folders):
    teachers = [Teacher(teacher_folders["hubert"]), Teacher(teacher_folders["whisper"])]
    live = types.SimpleNamespace(embeddings=[], waveforms=noise(1.0, 1.5))
    halves = [teacher.embed(live.waveforms)[0].half() for teacher in teachers]
    cached = types.SimpleNamespace(embeddings=halves, waveforms=live.waveforms)
    for batch in (live, cached):
        for combine in ("heads", "average"):
            expected = teacher_targets(teachers, batch, combine, [1.0, 2.0])
            with torch.autocast("cpu", torch.bfloat16):
                found = teacher_targets(teachers, batch, combine, [1.0, 2.0])
            for a, b in zip(found, expected):
                assert a.dtype == torch.float32 and torch.equal(a, b)


def test_names_of_targets_are_unique(teacher_folders, tmp_path):
    hubert = Teacher(teacher_folders["hubert"] + ":1,last")
    whisper = Teacher(teacher_folders["whisper"] + ":2")
    assert target_names([hubert, whisper]) == ["hubert:1", "hubert", "whisper:2"]
    other = save_teacher(tmp_path / "hubert", "hubert")
    first = teacher_folders["hubert"]
    assert target_names([hubert, Teacher(other)]) == [f"{first}:1", first, other]
