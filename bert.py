"""A masked language model teaches the encoder through auxiliary decoders, which are thrown away (arXiv 2401.11700).

    python finetune_rnnt.py --bert google-bert/bert-base-uncased --inter-layers 2 3

    q_i = softmax(top 8 of BERT's logits at token i / 3), with token i masked                       # its soft labels
    L_AED = mean over {intermediate, final} layers of sum_i (1 - lambda) CE(y_i) + lambda CE(q_i)
    L = L_transducer + c * (L_CTC + mean L_CTC of intermediate layers) + w * L_AED

--self-condition: an intermediate layer's CTC answer also goes into the next layer (model.Condition).

[ours]: one small decoder shared by all layers, over BERT's own vocabulary, so no tokenizer needs to be shared; the CTC
head is shared too, but for self-conditioned layers. Nothing of this is in the exported student, it is as large and as
fast as without; only --self-condition stays, 2 x width x vocabulary a layer.
"""
import re

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from losses import ctc_loss, valid_mask
from model import load_checkpoint, save_checkpoint
from run import UserError, everyone

TOP, TEMPERATURE = 8, 3.0


def load_bert(name, device):
    """-> (tokenizer, frozen masked language model). Raises UserError for a model without a masked-LM head."""
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        bert, found = transformers.AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32,
                                                                        output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--bert {name}: {str(error).strip().splitlines()[0]} - give a folder or a hub name of a "
                        f"masked language model (hf download {name} fetches one)")
    if found["missing_keys"]:
        raise UserError(f"--bert {name}: it has no masked-LM head (its weights lack {sorted(found['missing_keys'])[0]})"
                        f"; give a model that was trained to fill in masked words")
    return tokenizer, bert.to(device).eval().requires_grad_(False)


@torch.no_grad()
def soft_labels(tokenizer, bert, text):
    """One text of n tokens, each masked in turn -> (tokens (n+2,) with [CLS] and [SEP], ids (n+1, 8), q (n+1, 8)):
    what BERT would say for tokens 1 to n; the last row is [SEP], which has no doubts."""
    tokens = torch.tensor(tokenizer(data.normalise(text).lower(), truncation=True).input_ids)
    n = len(tokens) - 2
    masked, hidden = tokens.repeat(n, 1), torch.arange(1, n + 1)
    masked[torch.arange(n), hidden] = tokenizer.mask_token_id
    logits = [bert(rows.to(bert.device)).logits[torch.arange(len(rows)), where].float().cpu()
              for rows, where in zip(masked.split(64), hidden.split(64)) if n]
    logits = torch.cat([torch.zeros(0, bert.config.vocab_size), *logits])                              # (n, V)
    logits[:, tokenizer.all_special_ids] = -torch.inf
    top, ids = logits.topk(TOP)
    end = torch.full((1, TOP), tokenizer.sep_token_id), F.one_hot(torch.tensor([0]), TOP).float()
    return tokens, torch.cat([ids, end[0]]), torch.cat([(top / TEMPERATURE).softmax(-1), end[1]])


def label_texts(name, texts, folder, device, rank=0, world=1):
    """Soft labels of all texts, computed once, by every process a part, and kept in `folder`. -> {text: what
    soft_labels gives}"""
    path = folder / f"soft-labels-{re.sub('[^a-zA-Z0-9]+', '-', name)}.pt"
    known = load_checkpoint(path)["labels"] if path.exists() else {}
    missing = sorted({text for text in texts if text is not None} - known.keys())
    if missing:
        tokenizer, bert = load_bert(name, device)
        mine = {text: soft_labels(tokenizer, bert, text)
                for text in tqdm(missing[rank::world], desc="BERT", unit="text", disable=rank > 0)}
        for part in everyone(mine):
            known |= part
        if rank == 0:
            save_checkpoint(path, labels=known)
    return known


class AuxiliaryDecoder(nn.Module):
    """A small Transformer decoder that writes BERT's tokens from any layer of the encoder; embedding and output share
    their weights."""

    def __init__(self, dim, vocab_size, heads=4, layers=1, longest=512):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(longest, dim)
        layer = nn.TransformerDecoderLayer(dim, heads, 4 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.decoder, self.norm = nn.TransformerDecoder(layer, layers), nn.LayerNorm(dim)
        nn.init.normal_(self.tokens.weight, std=dim ** -0.5)

    def forward(self, hidden, lengths, tokens):
        """hidden (B, T, d), lengths (B,), tokens (B, N) -> logits (B, N, V) of the token behind each"""
        N = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(N, device=tokens.device))
        ahead = torch.ones(N, N, dtype=torch.bool, device=tokens.device).triu(1)
        behind = ~valid_mask(lengths, hidden.shape[1])
        x = self.decoder(x, hidden, tgt_mask=ahead, memory_key_padding_mask=behind)
        return F.linear(self.norm(x), self.tokens.weight)


def interaed_loss(decoder, layers, lengths, labels, weight):
    """L_AED above, summed over the utterances: layers, list of hidden (B, T, d), lengths (B,); labels, what soft_labels
    gives for each utterance; weight: lambda."""
    tokens, ids, q = (pad_sequence(x, batch_first=True).to(lengths.device) for x in zip(*labels))
    exists = valid_mask(torch.tensor([len(x) for x, _, _ in labels], device=lengths.device) - 1, tokens.shape[1] - 1)
    total = 0.0
    for hidden in layers:
        log_p = decoder(hidden, lengths, tokens[:, :-1]).float().log_softmax(-1)                       # (B, N, V)
        hard = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
        soft = -(q * log_p.gather(2, ids)).sum(-1)
        total = total + (((1 - weight) * hard + weight * soft) * exists).sum()
    return total / len(layers)


class Tutor:
    """What --bert adds to stage 2: a decoder beside the student, which trains with it, and taps on its layers."""

    def __init__(self, student, labels, layers, weight):
        """labels: of label_texts; layers: numbers of intermediate blocks, 1 the first; weight: lambda."""
        depth = len(student.encoder.blocks)
        if not all(1 <= k < depth for k in layers):
            raise UserError(f"--inter-layers {' '.join(map(str, layers))}: its intermediate layers are 1 to "
                            f"{depth - 1}")
        self.labels, self.weight, self.heard, self.ctc = labels, weight, {}, {}
        vocabulary = 1 + max(int(x.max()) for tokens, ids, _ in labels.values() for x in (tokens, ids))
        student.auxiliary = AuxiliaryDecoder(student.config.dim, vocabulary).to(student.ctc.weight.device)
        for k in layers:
            block = student.encoder.blocks[k - 1]
            keep = lambda module, inputs, output, k=k: self.heard.update({k: inputs[0]})
            block.condition.register_forward_hook(keep)
            self.ctc[k] = block.condition.ctc if k in student.config.conditioned else student.ctc

    def __call__(self, student, hidden, lengths, batch):
        """To be called after the encoder, which left its intermediate layers here. -> {name: sum over utterances}"""
        middle = list(self.heard.values())
        ctc = [ctc_loss(self.ctc[k](h), batch.targets, lengths, batch.target_lengths) for k, h in self.heard.items()]
        written = [b for b, text in enumerate(batch.texts) if text is not None]
        # nothing written: still a loss of every weight, or this process's gradients would be fewer than the others'
        loss = interaed_loss(student.auxiliary, [h[written] for h in [*middle, hidden]], lengths[written],
                             [self.labels[batch.texts[b]] for b in written], self.weight) if written else 0.0 * sum(
            p.sum() for p in student.auxiliary.parameters())
        return {"ctc of layers": sum((batch.weights * x).sum() for x in ctc) / len(ctc), "bert": loss}
