"""Every family of teachers, tiny and random, against the model called by hand; what must be refused; no network."""
import functools
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as hf

from conftest import ROOT
from teachers import Teacher
from run import UserError

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
CONV = dict(**SMALL, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
LAYER_NORM = dict(**CONV, feat_extract_norm="layer", do_stable_layer_norm=True)
DATA2VEC = dict(**SMALL, conv_dim=(8,) * 7, num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2)
TOKENS = dict(vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
MOONSHINE = dict(**TOKENS, hidden_size=16, intermediate_size=24, encoder_num_hidden_layers=3,
                 encoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
WHISPER = dict(**TOKENS, d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
               decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=200)  # a window of 4 s
PARAKEET = dict(**SMALL, subsampling_conv_channels=8, conv_kernel_size=9, num_mel_bins=80)

wave = lambda mask, normalise=True: hf.Wav2Vec2FeatureExtractor(return_attention_mask=mask, do_normalize=normalise)

# family: (model, feature extractor, {layer: (samples from frame to frame, sample on which the first one is centred)},
#          may it be padded?). Centres follow from kernels and strides: wav2vec 2.0's first frame spans 400 samples,
# Moonshine's 127 + 6 * 64 + 2 * 192 = 895; adapters and Parakeet pad both ends, so their first frame lies on the first
# input frame; w2v-BERT fills half a pair at the end only, which looks like 80 samples less.
CONVOLUTIONS = {"0": (320, 200), "2": (320, 200), "last": (320, 200)}
FAMILIES = {
    "wav2vec2": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**CONV)), lambda: wave(False), CONVOLUTIONS, False),
    "wav2vec2-adapter": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**LAYER_NORM, add_adapter=True)),
                         lambda: wave(True), {"2": (320, 200), "last": (2560, 200)}, False),
    "hubert-base": (lambda: hf.HubertModel(hf.HubertConfig(**CONV)), lambda: wave(True, False), CONVOLUTIONS, False),
    "hubert-large": (lambda: hf.HubertModel(hf.HubertConfig(**LAYER_NORM)), lambda: wave(True), CONVOLUTIONS, True),
    "wavlm-base": (lambda: hf.WavLMModel(hf.WavLMConfig(**CONV)), lambda: wave(True), CONVOLUTIONS, False),
    "wavlm-large": (lambda: hf.WavLMModel(hf.WavLMConfig(**LAYER_NORM)), lambda: wave(True), CONVOLUTIONS, True),
    "unispeech-sat": (lambda: hf.UniSpeechSatModel(hf.UniSpeechSatConfig(**LAYER_NORM)), lambda: wave(True),
                      CONVOLUTIONS, True),
    "data2vec-audio": (lambda: hf.Data2VecAudioModel(hf.Data2VecAudioConfig(**DATA2VEC, conv_pos_kernel_size=3)),
                       lambda: wave(True), CONVOLUTIONS, False),
    "wav2vec2-conformer": (lambda: hf.Wav2Vec2ConformerModel(hf.Wav2Vec2ConformerConfig(
        **CONV, feat_extract_norm="layer", conv_depthwise_kernel_size=7)), lambda: wave(True), CONVOLUTIONS, False),
    "w2v-bert": (lambda: hf.Wav2Vec2BertModel(hf.Wav2Vec2BertConfig(
        **SMALL, feature_projection_input_dim=160, conv_depthwise_kernel_size=7)), hf.SeamlessM4TFeatureExtractor,
        {"1": (320, 200), "last": (320, 200)}, True),
    "sew": (lambda: hf.SEWModel(hf.SEWConfig(**SMALL, conv_dim=(8,) * 13, num_conv_pos_embeddings=8,
                                             num_conv_pos_embedding_groups=2)), lambda: wave(False),
            {"1": (640, 360), "last": (320, 200)}, False),
    "whisper": (lambda: hf.WhisperModel(hf.WhisperConfig(**WHISPER)),
                lambda: hf.WhisperFeatureExtractor(chunk_length=4), {"1": (320, 160), "last": (320, 160)}, True),
    "moonshine": (lambda: hf.MoonshineModel(hf.MoonshineConfig(**MOONSHINE)), lambda: wave(True, False),
                  {"0": (384, 447.5), "last": (384, 447.5)}, False),
    "parakeet": (lambda: hf.ParakeetForCTC(hf.ParakeetCTCConfig(vocab_size=9, pad_token_id=8, encoder_config=PARAKEET)),
                 hf.ParakeetFeatureExtractor, {"1": (1280, 80), "last": (1280, 80)}, True),
}


def noise(*seconds):
    return [0.1 * torch.randn(int(16_000 * s), generator=torch.Generator().manual_seed(int(100 * s))) for s in seconds]


def save(folder, family, dtype=torch.float32):
    torch.manual_seed(0)
    FAMILIES[family][0]().to(dtype).save_pretrained(folder)
    FAMILIES[family][1]().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> folder, made when first asked for"""
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: save(root / family, family))


# ---------------------------------------------------------------------------- embeddings

def by_hand(folder, family, wave):
    """{layer: the model's own frames (n, 16)}: transformers called as its documentation says, one utterance, no mask
    but the extractor's own."""
    extractor = type(FAMILIES[family][1]()).from_pretrained(folder)
    whole = type(FAMILIES[family][0]()).from_pretrained(folder, dtype=torch.float32).eval()
    inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    encoder = {"whisper": lambda: whole.encoder, "moonshine": lambda: whole.encoder, "parakeet": lambda: whole.encoder}
    with torch.no_grad():
        out = encoder.get(family, lambda: whole)()(**inputs, output_hidden_states=True)
    layers = {"last": out.last_hidden_state} | {str(k): states for k, states in enumerate(out.hidden_states)}
    n = {"whisper": len(wave) // 320, "parakeet": -(-(len(wave) // 160) // 8)}.get(family)  # the rest is padding
    return {k: states[0, :n].numpy() for k, states in layers.items()}


def at_25_hz(frames, samples, hop, centre):
    T, stack = (samples + 320) // 640, max(1, round(640 / hop))
    if 640 % hop:
        at = (np.arange(T * stack) + 0.5) * 640 / stack
        frames = np.stack([np.interp(at, centre + hop * np.arange(len(frames)), column) for column in frames.T], axis=1)
    frames = np.concatenate([frames, np.repeat(frames[-1:], 8, axis=0)])[:T * stack]
    return np.concatenate([frames[k::stack] for k in range(stack)], axis=1)


@pytest.mark.parametrize("seconds", [2.0, 3.333])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_the_model_called_by_hand(folder, family, seconds):
    """Several layers of one teacher at once, whatever their rates, beside each other."""
    (wave,), clocks = noise(seconds), FAMILIES[family][2]
    teacher = Teacher(f"{folder(family)}:{','.join(clocks)}")
    [found], [n] = teacher([wave])
    frames = by_hand(folder(family), family, wave)
    expected = [at_25_hz(frames[layer], len(wave), *clock) for layer, clock in clocks.items()]
    assert teacher.widths == [e.shape[1] for e in expected] and n == len(expected[0])
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected, axis=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_of_a_teacher(folder, family):
    *_, clocks, batched = FAMILIES[family]
    teacher = Teacher(f"{folder(family)}:{','.join(clocks)}")
    assert [(clock.hop, clock.centre) for clock in teacher.clocks] == list(clocks.values())
    assert teacher.batched == batched and not any(p.requires_grad for p in teacher.encoder.parameters())
    rate = f"{16_000 / list(clocks.values())[-1][0]:.4g} Hz"
    assert type(teacher.encoder).__name__ in str(teacher) and rate in str(teacher)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_the_batch(folder, family):
    teacher = Teacher(f"{folder(family)}:{','.join(FAMILIES[family][2])}")
    waves = noise(0.09, 0.7, 2.0, 1.3, 5.5, 1.333)
    together, lengths = teacher(waves)
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    padded, again = teacher(padded, torch.tensor([len(w) for w in waves]))
    torch.testing.assert_close(padded, together)
    assert lengths.tolist() == again.tolist() == [(len(w) // 160 + 1 + 1) // 4 for w in waves]  # the student's frames
    for row, n, wave in zip(together, lengths, waves):
        alone, [m] = teacher([wave])
        assert n == m
        assert (row[:n] - alone[0]).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("family, masks", [("hubert-base", [None, None]), ("hubert-large", [[16_000, 24_000]])])
def test_group_norm_sees_neither_padding_nor_a_mask(folder, family, masks, monkeypatch):
    teacher, seen, run = Teacher(folder(family)), [], hf.HubertModel.forward

    def spy(self, input_values, attention_mask=None, **rest):
        seen.append(attention_mask.sum(1).tolist() if attention_mask is not None else None)
        return run(self, input_values, attention_mask=attention_mask, **rest)
    monkeypatch.setattr(hf.HubertModel, "forward", spy)
    teacher(noise(1.0, 1.5))
    assert seen == masks


def test_the_feature_extractor_decides_about_normalisation(tmp_path):
    [signal] = noise(1.0)
    for normalise in (True, False):
        teacher = save(tmp_path / str(normalise), "hubert-large")
        wave(True, normalise).save_pretrained(teacher)
        teacher = Teacher(f"{teacher}:0")
        a, b = teacher([signal])[0], teacher([3 * signal + 0.2])[0]
        assert bool((a - b).norm() < 1e-2 * a.norm()) == normalise


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_half_precision_and_teachers_that_compute_in_it(tmp_path, family):
    [wave], layer = noise(1.5), "last"
    for dtype in (torch.float16, torch.bfloat16):
        teacher = Teacher(save(tmp_path / "half", family, dtype))
        assert {p.dtype for p in teacher.encoder.parameters()} == {torch.float32}
        expected = at_25_hz(by_hand(tmp_path / "half", family, wave)[layer], len(wave), *FAMILIES[family][2][layer])
        np.testing.assert_allclose(teacher([wave])[0][0].numpy(), expected, atol=1e-4, rtol=1e-4)
    [exact], [rough] = teacher([wave])[0], Teacher(str(tmp_path / "half"), dtype=torch.bfloat16)([wave])[0]
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


def test_audio_longer_than_the_window_of_whisper(folder):
    teacher, [wave] = Teacher(folder("whisper") + ":1,last"), noise(9.5)
    whole, [n] = teacher([wave])
    assert n == 238                                                                  # 9.5 s at 25 Hz, rounded up
    for k, start in enumerate((0, 64_000, 128_000)):  # every window of 4 s as if it stood alone
        piece, [m] = teacher([wave[start:start + 64_000]])
        torch.testing.assert_close(whole[0, 100 * k:100 * k + m], piece[0])


def test_layers_that_nobody_asked_for_are_not_computed(folder):
    assert len(Teacher(folder("wavlm-base") + ":1").encoder.encoder.layers) == 2
    assert len(Teacher(folder("wavlm-base") + ":1,last").encoder.encoder.layers) == 3


# ---------------------------------------------------------------------------- what must be refused

def test_wrong_teachers_are_one_line(folder, tmp_path):
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    hf.BertModel(hf.BertConfig(vocab_size=9, **small)).save_pretrained(tmp_path / "bert")
    hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **small)).save_pretrained(tmp_path / "vit")
    hf.ASTModel(hf.ASTConfig(**small, max_length=64)).save_pretrained(tmp_path / "ast")
    hf.ASTFeatureExtractor(max_length=64).save_pretrained(tmp_path / "ast")
    (tmp_path / "empty").mkdir()
    hf.HubertConfig(**CONV).save_pretrained(tmp_path / "bare")
    wave(True).save_pretrained(tmp_path / "bare")
    save(tmp_path / "damaged", "hubert-base")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    save(tmp_path / "lacking", "hubert-base")
    state = FAMILIES["hubert-base"][0]().state_dict()
    del state["encoder.layers.1.final_layer_norm.weight"]
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "lacking/model.safetensors", {"format": "pt"})
    hubert = folder("hubert-base")
    for name, *words in (
        (f"{hubert}:4", "layer '4'", f"{hubert}:0 to {hubert}:3", f"{hubert}:last"),
        (f"{hubert}:1,x", "layer 'x'"),
        (f"{hubert}:-1", "layer '-1'"),
        (f"{hubert}:1,1", "twice"),
        (str(tmp_path / "none"), "no such folder"),
        ("./none", "no such folder"),
        (str(tmp_path / "empty"), "empty", "hf download"),
        (str(tmp_path / "bare"), "bare", "hf download"),
        (str(tmp_path / "damaged"), "damaged"),
        (str(tmp_path / "lacking"), "lack 1 tensors", "final_layer_norm"),
        (str(tmp_path / "bert"), "a text model (bert)"),
        (str(tmp_path / "vit"), "a vision model (vit)"),
        (str(tmp_path / "ast"), "however long"),
        ("no-such-owner/no-such-model", "hf download no-such-owner/no-such-model", "HF_HOME"),
    ):
        with pytest.raises(UserError) as error:
            Teacher(name)
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


class Hub(BaseHTTPRequestHandler):
    """A hub with one gated model, as the real one answers who has no token."""

    def do_HEAD(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_hub_models_say_what_to_do_and_folders_need_no_network(folder, tmp_path):
    """In a fresh process that may go to the network: folders don't, and a gated or missing name is explained."""
    code = f"""import socket, sys; sys.path.insert(0, {str(ROOT)!r})
connect = socket.socket.connect
socket.socket.connect = lambda self, address: print("NETWORK", address) or connect(self, address)
from teachers import Teacher
for name in sys.argv[1:]:
    try:
        print(Teacher(name))
    except ValueError as error:
        print(error)"""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path),
                    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    folders = [folder(family) for family in ("hubert-base", "whisper", "moonshine", "parakeet")]
    done = subprocess.run([sys.executable, "-c", code, *folders, "owner/gated", "owner/none"], text=True, timeout=100,
                          capture_output=True, env=environment)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert all(line.startswith(name) for name, line in zip(folders, said)) and "NETWORK" in said[len(folders)]
    gated, none = [line for line in said[len(folders):] if "NETWORK" not in line]
    assert "HF_TOKEN" in gated and "hf auth login" in gated and "the hub has no such model" in none


def test_no_network_call_when_offline(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network call: {args}")
    for name in ("socket.connect", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", refuse)
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # conftest.py sets it
    Teacher(folder("whisper"))
    with pytest.raises(UserError, match="hf download owner/none"):
        Teacher("owner/none")
