"""BERT as a teacher: its soft labels, the loss, and that nothing of it is left in the student."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import transformers

import data
import finetune_rnnt
from conftest import DEMO
from methods import interaed
from model import Config, Student, load_checkpoint, save_checkpoint
from tools.command_line import UserError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat and dog ran".split()


def save_bert(folder, head=True):
    """A tiny BERT with random weights that knows fourteen words."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    kind = transformers.BertForMaskedLM if head else transformers.BertModel
    kind(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bert(bert_folder):
    return interaed.load_bert(bert_folder, "cpu")


def test_soft_labels_mask_one_token_at_a_time(bert):
    tokenizer, lm = bert
    tokens, ids, q = interaed.soft_labels(tokenizer, lm, "The cat sat, on a MAT!")
    words = tokenizer.convert_ids_to_tokens(tokens.tolist())
    assert words == "[CLS] the cat sat on a mat [SEP]".split()
    for i in range(1, len(tokens) - 1):
        masked = tokens.clone()
        masked[i] = tokenizer.mask_token_id
        logits = lm(masked[None]).logits[0, i]
        best = 5 + logits[5:].argsort(descending=True)[:8]  # the first five are special
        assert torch.equal(ids[i - 1], best)
        torch.testing.assert_close(q[i - 1], (logits[best] / 3).softmax(-1))
    assert ids[-1, 0] == tokenizer.sep_token_id
    assert q[-1].tolist() == [1.0] + [0.0] * 7
    nothing, _, _ = interaed.soft_labels(tokenizer, lm, "")
    assert nothing.tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_the_loss_token_by_token(bert):
    """Each utterance alone, each prefix anew: no padding. The third has no transcript."""
    texts = ["the dog ran", "a cat", None, "and the cat sat on the mat"]
    labels = [interaed.soft_labels(*bert, text) if text else None for text in texts]
    torch.manual_seed(1)
    decoder = interaed.AuxiliaryDecoder(8, len(WORDS)).eval()
    layers = [torch.randn(4, 6, 8), torch.randn(4, 6, 8)]
    lengths = torch.tensor([6, 2, 6, 4])
    expected = 0.0
    for hidden in layers:
        for b in (0, 1, 3):
            tokens, ids, q = labels[b]
            alone = hidden[b : b + 1, : lengths[b]]
            for i in range(len(tokens) - 1):
                logits = decoder(alone, lengths[b : b + 1], tokens[None, : i + 1])
                log_p = logits[0, -1].log_softmax(-1)
                expected -= 0.5 * log_p[tokens[i + 1]] + 0.5 * (q[i] * log_p[ids[i]]).sum()
    loss = interaed.interaed_loss(decoder, layers, lengths, labels)
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)


def test_a_batch_without_transcripts_has_a_gradient_of_zero_for_every_weight():
    decoder = interaed.AuxiliaryDecoder(8, len(WORDS))
    interaed.interaed_loss(decoder, [torch.randn(1, 6, 8)], torch.tensor([6]), [None]).backward()
    for p in decoder.parameters():
        assert (p.grad == 0).all()


def test_a_model_without_the_head_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no masked-LM head"):
        interaed.load_bert(save_bert(tmp_path, head=False), "cpu")
    with pytest.raises(UserError, match="hf download no/such"):
        interaed.load_bert("no/such", "cpu")


def write_manifest(path, split, **more):
    """Three utterances of the demo."""
    rows = []
    for utterance in data.load_utterances(DEMO / "corpus" / split)[:3]:
        rows.append({"audio_filepath": utterance.path, "text": utterance.text} | more)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def stop_once_there_is(path):
    """Ctrl-C as soon as a file exists."""

    def watch():
        while not path.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def test_bert_with_everything_else_then_resumed_and_exported(bert_folder, tmp_path):
    """A transducer teacher, unlabelled audio, pseudo-labels, BERT. An interrupted run ends as the
    whole one; the exported student has the parts of one without."""
    config = Config(dim=16, layers=4, attention_heads=2, kernel=3, channels=4, predictor_dim=16)
    tiny = tmp_path / "tiny.pt"
    save_checkpoint(tiny, config=config, model=Student(config).state_dict(), teachers=[])
    common = [
        "--init",
        str(tiny),
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--device",
        "cpu",
        "--data",
        write_manifest(tmp_path / "train.jsonl", "train"),
        write_manifest(tmp_path / "pseudo.jsonl", "test", weight=0.5),
        "--dev",
        write_manifest(tmp_path / "dev.jsonl", "dev"),
    ]
    plain = tmp_path / "plain"
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    assert finetune_rnnt.main([*common, "--steps", "1", "--out", str(plain)]) == 0
    everything = [
        *common,
        "--unlabelled",
        str(next((DEMO / "corpus/unlabelled").rglob("*.opus"))),
        "--teacher-transducer",
        str(plain),
        "--bert",
        bert_folder,
        "--inter-layers",
        "1",
        "3",
    ]
    assert finetune_rnnt.main([*everything, "--out", str(whole)]) == 0
    log = (whole / "log.jsonl").read_text()
    for name in ("transducer", "ctc", "ctc of layers", "kd", "bert"):
        assert f'"{name}"' in log

    stop_once_there_is(broken / "last.pt")
    assert finetune_rnnt.main([*everything, "--out", str(broken)]) == 130
    assert finetune_rnnt.main([*everything, "--out", str(broken)]) == 0
    last = load_checkpoint(whole / "last.pt")
    resumed = load_checkpoint(broken / "last.pt")
    for part in ("raw_model", "beside"):
        for name, value in last[part].items():
            assert torch.equal(value, resumed[part][name]), name
    assert load_checkpoint(whole)["model"].keys() == load_checkpoint(plain)["model"].keys()
