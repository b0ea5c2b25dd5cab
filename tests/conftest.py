"""Shared by all tests: no network, few threads, small teachers and a small corpus made once per session."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers

torch.set_num_threads(min(2, torch.get_num_threads()))
DEMO = ROOT / "demo"


def save_teacher(folder, family):
    """A tiny Hugging Face speech model with random weights, as `hf download` would leave it."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    conv = dict(conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=family != "wav2vec2", do_normalize=family == "hubert"
    )
    if family == "hubert":      # layer norm and attention mask: may be padded
        teacher = transformers.HubertModel(
            transformers.HubertConfig(
                **small, **conv, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
            )
        )
    elif family == "wav2vec2":  # group norm before the first layer: padding changes its embeddings
        teacher = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**small, **conv, feat_extract_norm="group"))
    elif family == "whisper":   # a window of 4 s instead of 30 s
        teacher = transformers.WhisperModel(
            transformers.WhisperConfig(
                vocab_size=8,
                d_model=16,
                encoder_layers=2,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_source_positions=200,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=3,
            )
        )
        extractor = transformers.WhisperFeatureExtractor(chunk_length=4)
    elif family == "moonshine":  # 41.67 frames per second
        teacher = transformers.MoonshineModel(
            transformers.MoonshineConfig(
                vocab_size=8,
                hidden_size=16,
                intermediate_size=24,
                encoder_num_hidden_layers=2,
                decoder_num_hidden_layers=1,
                encoder_num_attention_heads=2,
                decoder_num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=3,
            )
        )
    teacher.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folders(tmp_path_factory):
    """family -> folder"""
    folder = tmp_path_factory.mktemp("teachers")
    return {family: save_teacher(folder / family, family) for family in ("hubert", "wav2vec2", "whisper", "moonshine")}


@pytest.fixture(scope="session")
def demo_utterances():
    import data
    return data.load_utterances(DEMO / "corpus/train", transcribed=True)


@pytest.fixture
def loud_lab():
    """LibriSpeech, where the machine has it."""
    if "KD_LAB" not in os.environ:
        pytest.skip(
            "KD_LAB is not set: the parser was NOT tried on real LibriSpeech (KD_LAB = the folder above LibriSpeech/)"
        )
    return Path(os.environ["KD_LAB"])
