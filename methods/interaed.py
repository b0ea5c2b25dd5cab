"""A masked language model (BERT) teaches layers of the encoder through a decoder that is thrown
away.

    python finetune_rnnt.py --bert google-bert/bert-base-uncased --inter-layers 2 3 --out exp/bert

After arXiv 2401.11700. With token i of the transcript masked, BERT's soft labels are q_i; a small
decoder writes the transcript from an intermediate layer of the encoder and from the last one:

    q_i   = softmax(the 8 largest of BERT's logits at token i / 3)
    L_AED = mean over these layers of sum_i (1 - lambda) CE(y_i) + lambda CE(q_i)
    L     = L_transducer + c * (L_CTC + mean L_CTC of the intermediate layers) + w * L_AED

[ours]: the recipe of the soft labels; lambda = 0.5; one decoder shared by all layers, in BERT's own
vocabulary, so no tokenizer needs to be shared; the CTC head is shared, too. The decoder is a module
beside the student: what is exported is as large and as fast as without.
"""

import re

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from model import load_checkpoint, save_checkpoint, valid_mask
from tools.command_line import UserError, first_line
from tools.machine import all_gather

TOP = 8  # soft labels kept of each token
TEMPERATURE = 3.0
SOFT = 0.5  # lambda, share of BERT's soft labels against the transcript's
LONGEST = 512  # tokens of a transcript


# ---------------------------------------- soft labels


def load_bert(name, device):
    """-> (tokenizer, frozen masked language model)

    name: hub name or folder. Raises UserError for a model that was not trained to fill in words.
    """
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        bert, report = transformers.AutoModelForMaskedLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # what these readers raise for foreign folders is of many kinds
        raise UserError(
            f"--bert {name}: {first_line(error)} - give a folder or a hub name of a masked "
            f"language model (hf download {name} fetches one)"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise UserError(
            f"--bert {name}: it has no masked-LM head (its weights lack {missing}); give a model "
            f"that was trained to fill in masked words"
        )
    return tokenizer, bert.to(device).eval().requires_grad_(False)


@torch.no_grad()
def soft_labels(tokenizer, bert, text):
    """A text of n tokens -> (tokens (n+2,) with [CLS] and [SEP], labels (n+1, 8), q (n+1, 8))

    Row i is what BERT expects as token i + 1, which is masked; the last row is [SEP], which is
    sure.
    """
    text = data.normalise(text).lower()
    tokens = tokenizer(text, truncation=True, max_length=LONGEST).input_ids
    tokens = torch.tensor(tokens)
    n = len(tokens) - 2
    # Row i of `masked` has token i + 1 masked.
    masked = tokens.repeat(n, 1)
    position = torch.arange(1, n + 1)
    masked[torch.arange(n), position] = tokenizer.mask_token_id
    logits = torch.zeros(n, bert.config.vocab_size)
    for start in range(0, n, 64):
        some = slice(start, start + 64)
        every_position = bert(masked[some].to(bert.device)).logits
        here = every_position[torch.arange(len(every_position)), position[some]]
        logits[some] = here.float().cpu()
    logits[:, tokenizer.all_special_ids] = -torch.inf
    top, labels = logits.topk(TOP)
    q = (top / TEMPERATURE).softmax(-1)
    end = torch.full((1, TOP), tokenizer.sep_token_id)
    sure = F.one_hot(torch.tensor([0]), TOP).float()
    return tokens, torch.cat([labels, end]), torch.cat([q, sure])


def label_texts(name, texts, folder, device, rank=0, world=1):
    """-> {text: what soft_labels gives}; computed once, each process a part, and kept in
    `folder`"""
    path = folder / f"soft-labels-{re.sub('[^a-zA-Z0-9]+', '-', name)}.pt"
    known = {}
    if path.exists():
        known = load_checkpoint(path)["labels"]
    missing = sorted(set(texts) - {None} - known.keys())
    if not missing:
        return known
    tokenizer, bert = load_bert(name, device)
    mine = {}
    for text in tqdm(missing[rank::world], desc="BERT", unit="text", disable=rank > 0):
        mine[text] = soft_labels(tokenizer, bert, text)
    for part in all_gather(mine):
        known |= part
    if rank == 0:
        save_checkpoint(path, labels=known)
    return known


# ---------------------------------------- the decoder


class AuxiliaryDecoder(nn.Module):
    """A small Transformer decoder that writes BERT's tokens from any layer of the encoder.

    Embedding and output layer share their weights.
    """

    def __init__(self, dim, vocab_size, attention_heads=4, layers=1):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(LONGEST, dim)
        layer = nn.TransformerDecoderLayer(
            dim, attention_heads, 4 * dim, dropout=0.1, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)

    def forward(self, hidden, lengths, tokens):
        """hidden (B, T, d), lengths (B,), tokens (B, N) -> logits (B, N, V) of the token after
        each"""
        N = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(N, device=tokens.device))
        ahead = torch.ones(N, N, dtype=torch.bool, device=tokens.device).triu(1)
        padding = ~valid_mask(lengths, hidden.shape[1])
        x = self.decoder(x, hidden, tgt_mask=ahead, memory_key_padding_mask=padding)
        return F.linear(self.norm(x), self.tokens.weight)


def new_decoder(labels, dim):
    """An AuxiliaryDecoder for the tokens that occur in the soft labels (see label_texts)."""
    largest = 0
    for tokens, ids, _ in labels.values():
        largest = max(largest, int(tokens.max()), int(ids.max()))
    return AuxiliaryDecoder(dim, largest + 1)


def interaed_loss(decoder, layers, lengths, labels):
    """L_AED above, summed over the utterances

    layers: list of hidden states (B, T, d); lengths (B,); labels: for each utterance what
    soft_labels gives, or None where it has no transcript.
    """
    written = [b for b, label in enumerate(labels) if label is not None]
    if not written:
        # Still a loss of every weight, or this process would have fewer gradients than the others.
        return 0.0 * sum(p.sum() for p in decoder.parameters())
    device = lengths.device
    columns = zip(*(labels[b] for b in written))
    tokens, ids, q = (pad_sequence(x, batch_first=True).to(device) for x in columns)
    counts = torch.tensor([len(labels[b][0]) - 1 for b in written], device=device)
    exists = valid_mask(counts, tokens.shape[1] - 1)
    total = 0.0
    for hidden in layers:
        logits = decoder(hidden[written], lengths[written], tokens[:, :-1])
        log_p = logits.float().log_softmax(-1)  # (B, N, V)
        hard = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
        soft = -(q * log_p.gather(2, ids)).sum(-1)
        cross_entropy = (1 - SOFT) * hard + SOFT * soft
        total = total + cross_entropy.where(exists, 0).sum()
    return total / len(layers)
