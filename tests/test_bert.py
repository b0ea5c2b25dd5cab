"""A masked language model as a teacher: its soft labels, the loss, and that nothing of it is left in the student."""
import pytest
import torch
import transformers

import bert
import data
import decode
import finetune_rnnt
import model
from conftest import DEMO

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat and dog ran".split()


def save_bert(folder, head=True):
    """A tiny BERT with random weights that knows fourteen words."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=32)
    (transformers.BertForMaskedLM if head else transformers.BertModel)(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def test_soft_labels_mask_one_token_at_a_time(small_bert):
    tokenizer, lm = bert.load_bert(small_bert, "cpu")
    tokens, ids, q = bert.soft_labels(tokenizer, lm, "The cat sat, on a MAT!")
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == "[CLS] the cat sat on a mat [SEP]".split()
    for i in range(1, len(tokens) - 1):
        masked = tokens.clone()
        masked[i] = tokenizer.mask_token_id
        logits = lm(masked[None]).logits[0, i]
        best = sorted((k for k in range(len(WORDS)) if k >= 5), key=lambda k: -logits[k].item())[:8]     # no specials
        assert ids[i - 1].tolist() == best
        torch.testing.assert_close(q[i - 1], (logits[best] / 3).softmax(-1))
    assert ids[-1, 0] == tokenizer.sep_token_id and q[-1].tolist() == [1.0] + [0.0] * 7
    assert bert.soft_labels(tokenizer, lm, "")[0].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_token_by_token(small_bert, weight):
    tokenizer, lm = bert.load_bert(small_bert, "cpu")
    labels = [bert.soft_labels(tokenizer, lm, text) for text in ("the dog ran", "a cat", "and the cat sat on the mat")]
    torch.manual_seed(1)
    decoder = bert.AuxiliaryDecoder(8, len(WORDS), heads=2).eval()
    layers, lengths = [torch.randn(3, 6, 8) for _ in range(2)], torch.tensor([6, 2, 4])
    total = 0.0
    for hidden in layers:
        for b, (tokens, ids, q) in enumerate(labels):                  # each alone, each prefix anew: no padding
            for i in range(len(tokens) - 1):
                z = decoder(hidden[b:b + 1, :lengths[b]], lengths[b:b + 1], tokens[None, :i + 1])[0, -1]
                z = z.log_softmax(-1)
                total -= (1 - weight) * z[tokens[i + 1]] + weight * sum(p * z[k] for p, k in zip(q[i], ids[i]))
    loss = bert.interaed_loss(decoder, layers, lengths, labels, weight)
    assert loss.item() == pytest.approx(total.item() / 2, rel=1e-4)


def test_the_decoder_goes_where_the_student_is(small_bert):
    tokenizer, lm = bert.load_bert(small_bert, "cpu")
    student = model.Student(model.Config(vocab_size=20)).to("meta")
    bert.Tutor(student, {"a cat": bert.soft_labels(tokenizer, lm, "a cat")}, [2], 0.5)
    assert {p.device.type for p in student.parameters()} == {"meta"}


def test_a_model_without_the_head_is_one_line(tmp_path):
    with pytest.raises(bert.UserError, match="no masked-LM head"):
        bert.load_bert(save_bert(tmp_path, head=False), "cpu")
    with pytest.raises(bert.UserError, match="hf download no/such"):
        bert.load_bert("no/such", "cpu")


def test_bert_with_everything_else_then_resumed_and_exported(small_bert, tmp_path, monkeypatch, capsys):
    """All methods at once: a pruned loss, a teacher transducer, unlabelled audio, pseudo-labels, BERT. An interrupted
    run ends as the whole one; the exported student has the size and the text of one without."""
    common = ["--init", "none", "--steps", "4", "--batch-seconds", "120", "--eval-every", "2", "--device", "cpu",
              "--data", str(DEMO / "corpus/train"), "--dev", str(DEMO / "corpus/dev")]
    monkeypatch.setattr(data, "load_sources", lambda sources, *a, **k: every(sources, *a, **k)[:4])
    plain = tmp_path / "plain"
    assert finetune_rnnt.main([*common, "--out", str(plain)]) == 0
    everything = [*common, "--bert", small_bert, "--inter-layers", "1", "3", "--self-condition", "--teacher-transducer", str(plain),
                  "--essence-mass", "0.9", "--loss", "pruned", "--unlabelled", str(DEMO / "corpus/unlabelled"),
                  "--pseudo", str(DEMO / "corpus/test")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finetune_rnnt.main([*everything, "--out", str(whole)]) == 0
    log = (whole / "log.jsonl").read_text()
    assert all(f'"{name}"' in log for name in ("transducer", "simple", "ctc", "ctc of layers", "kd", "bert"))
    loss, seen = finetune_rnnt.stage2_loss, []

    def stop_after_two_updates(*args):
        if (broken / "last.pt").exists():
            seen.append(1)
            raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(finetune_rnnt, "stage2_loss", stop_after_two_updates)
    assert finetune_rnnt.main([*everything, "--out", str(broken)]) == 130 and seen
    monkeypatch.setattr(finetune_rnnt, "stage2_loss", loss)
    monkeypatch.setattr(bert, "soft_labels", None)                                             # computed once
    assert finetune_rnnt.main([*everything, "--out", str(broken)]) == 0
    a, b = (torch.load(x / "last.pt", weights_only=True) for x in (whole, broken))
    assert all(torch.equal(a["raw_model"][k], b["raw_model"][k]) for k in a["raw_model"])
    assert any(k.startswith("auxiliary.") for k in a["raw_model"])
    exported, without = (model.load_checkpoint(x)["model"] for x in (whole, plain))
    assert exported.keys() - without.keys() == {k for k in exported if k.startswith("simple_joiner.")} | {
        f"encoder.blocks.{k}.condition.{part}" for k in (0, 2) for part in ("ctc.weight", "ctc.bias", "back.weight", "back.bias")}
    assert decode.main(["--checkpoint", str(whole), str(DEMO / "corpus/test")]) == 0


def test_self_condition_is_what_its_equation_says():
    """At first the encoder that was inherited; then, by hand, x + Linear(softmax(CTC(x))) between two blocks; the same
    chunk by chunk."""
    torch.manual_seed(0)
    plain = model.Student(model.Config(dim=32, layers=3, kernel=7, channels=8, chunk=4, left=8)).eval()
    saved = {"config": model.asdict(plain.config), "model": plain.state_dict()}
    student = model.load_student(saved, vocab_size=11, conditioned=(2,)).eval()
    features, lengths = torch.randn(1, 96, 80), torch.tensor([96])
    hidden, _ = student.encoder(features, lengths)
    assert torch.equal(hidden, plain.encoder(features, lengths)[0])
    condition = student.encoder.blocks[1].condition
    torch.nn.init.normal_(condition.back.weight)
    after, _ = student.encoder(features, lengths)
    assert (after - hidden).abs().max() > 0.1
    expected = []
    student.encoder.blocks[1].norm.register_forward_hook(lambda module, inputs, x: expected.append(x))
    student.encoder.blocks[2].register_forward_pre_hook(lambda module, inputs: expected.append(inputs[0]))
    student.encoder(features, lengths)
    x, heard = expected
    assert torch.allclose(heard, x + (x @ condition.ctc.weight.T + condition.ctc.bias).softmax(-1) @ condition.back.weight.T, atol=1e-5)
    x, past, streamed = student.encoder.subsampling(features, lengths)[0], None, []
    for chunk in x.split(4, dim=1):
        y, past = student.encoder.stream(chunk, past)
        streamed.append(y)
    assert torch.allclose(torch.cat(streamed, 1), after, atol=1e-4)


every = data.load_sources
