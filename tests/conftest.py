"""Shared by all tests: no network, few threads, tiny teachers and the demo's corpus."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two threads on small tensors only wait for each other
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers

DEMO = ROOT / "demo"

WIDTHS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONVOLUTIONS = dict(conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
TOKENS = dict(
    vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3
)


def tiny_hubert():
    """Layer norm and attention mask: may be padded."""
    return transformers.HubertModel(
        transformers.HubertConfig(
            **WIDTHS,
            **CONVOLUTIONS,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
        )
    )


def tiny_wav2vec2():
    """Group norm before the first layer: padding changes the embeddings."""
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**WIDTHS, **CONVOLUTIONS, feat_extract_norm="group")
    )


def tiny_whisper():
    """A window of 4 s instead of 30 s"""
    return transformers.WhisperModel(
        transformers.WhisperConfig(
            **TOKENS,
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=200,
        )
    )


def tiny_moonshine():
    """41.67 frames per second"""
    return transformers.MoonshineModel(
        transformers.MoonshineConfig(
            **TOKENS,
            hidden_size=16,
            intermediate_size=24,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
        )
    )


TEACHERS = {
    "hubert": tiny_hubert,
    "wav2vec2": tiny_wav2vec2,
    "whisper": tiny_whisper,
    "moonshine": tiny_moonshine,
}


def save_teacher(folder, family):
    """A tiny Hugging Face speech model with random weights, as `hf download` would leave it"""
    torch.manual_seed(0)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=family != "wav2vec2", do_normalize=family == "hubert"
    )
    if family == "whisper":
        extractor = transformers.WhisperFeatureExtractor(chunk_length=4)
    TEACHERS[family]().save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folders(tmp_path_factory):
    """family -> folder"""
    folder = tmp_path_factory.mktemp("teachers")
    return {family: save_teacher(folder / family, family) for family in TEACHERS}


@pytest.fixture(scope="session")
def demo_utterances():
    import data

    return data.load_utterances(DEMO / "corpus/train", transcribed=True)


@pytest.fixture
def loud_lab():
    """The folder above LibriSpeech/, where the machine has it"""
    if "KD_LAB" not in os.environ:
        pytest.skip(
            "KD_LAB is not set: this was NOT tried on real LibriSpeech "
            "(KD_LAB = the folder above LibriSpeech/)"
        )
    return Path(os.environ["KD_LAB"])
