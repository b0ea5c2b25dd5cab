"""A picture of one utterance: log-mel, the tokens over time, the posterior of their lattice."""

import torch

import data
from data import FRAME_SECONDS
from model import node_posteriors

WIDEST = 20.0  # inches of a picture
FONT = 8.0  # points
EM = FONT / 72  # inches that a wide letter takes


def text_width(text):
    """Inches of a text in a monospaced font, CJK characters wide"""
    width = 0.0
    for letter in text:
        width += 0.62 * EM if ord(letter) < 0x3000 else EM
    return width


def place_texts(texts, centres, width):
    """Where texts may stand so that none overlaps another or the border

    texts and the inches on which they should be centred, in order -> list of (inches of the left
    edge, row). Each text goes into the first row that has room for it.
    """
    places = []
    row_ends = []  # inches at which the last text of each row ends
    for text, centre in zip(texts, centres):
        size = text_width(text)
        left = min(max(0.0, centre - size / 2), width - size)
        row = 0
        while row < len(row_ends) and row_ends[row] > left:
            row += 1
        if row == len(row_ends):
            row_ends.append(0.0)
        row_ends[row] = left + size + 0.5 * EM
        places.append((left, row))
    return places


@torch.no_grad()
def lattice_posterior(student, features, tokens, chunk):
    """features (F, 80), list of Token -> (T, U+1): probability that an alignment visits a node"""
    device = next(student.parameters()).device
    labels = torch.tensor([token.label for token in tokens], dtype=torch.long, device=device)
    lengths = torch.tensor([len(features)], device=device)
    hidden, _ = student.encoder(features[None].to(device), lengths, chunk)
    logits = student.joiner(hidden, student.predict(labels[None]))[0]
    return node_posteriors(logits.cpu(), labels.cpu())


def draw_alignment(student, tokenizer, utterance, tokens, chunk):
    """-> a matplotlib Figure of an utterance and its tokens

    Of a long recording, which is decoded in pieces, only the beginning is drawn.
    """
    from matplotlib.figure import Figure

    seconds = min(utterance.seconds, 3 * student.config.seconds)
    waveform = data.load_audio(utterance.path, utterance.offset or 0.0, seconds)
    seconds = len(waveform) / data.SAMPLE_RATE
    features = data.log_mel(waveform)
    tokens = [token for token in tokens if token.frame * FRAME_SECONDS < seconds]

    # 1. Place the tokens, which decides the height of their strip.
    width = min(WIDEST, max(6.0, 2.5 * seconds))
    times = [(token.frame + 0.5) * FRAME_SECONDS for token in tokens]
    pieces = [tokenizer.id_to_token(token.label) for token in tokens]
    centres = [time * width / seconds for time in times]
    places = place_texts(pieces, centres, width)
    rows = 1 + max([row for _, row in places], default=0)
    strip = 2 * EM * rows
    border = 0.8  # inches round the panels
    height = strip + 5.0
    figure = Figure((width + 2 * border, height + 2 * border))
    figure.suptitle(one_line(utterance.path, width), fontsize=FONT + 2)

    def add_panel(bottom, size):
        """A panel as wide as the audio; bottom and size in inches"""
        total_width, total_height = figure.get_size_inches()
        left = border / total_width
        bottom = (border + bottom) / total_height
        return figure.add_axes((left, bottom, width / total_width, size / total_height))

    # 2. The tokens.
    panel = add_panel(height - strip, strip)
    panel.set_axis_off()
    panel.set_xlim(0, width)
    panel.set_ylim(0, rows)
    for piece, (left, row) in zip(pieces, places):
        panel.text(left, row + 0.5, piece, fontsize=FONT, family="monospace", va="center")

    # 3. The features with a line for each token, and below them the lattice.
    panel = add_panel(2.6, 2.3)
    extent = (0, seconds, 0, features.shape[1])
    panel.imshow(features.T.numpy(), origin="lower", aspect="auto", extent=extent)
    panel.vlines(times, 0, features.shape[1], color="white", linewidth=0.5)
    panel.set_xlim(0, seconds)
    panel.set_ylabel("log-mel bin")
    panel = add_panel(0.0, 2.3)
    posterior = lattice_posterior(student, features, tokens, chunk)
    extent = (0, len(posterior) * FRAME_SECONDS, -0.5, len(tokens) + 0.5)
    panel.imshow(posterior.T.numpy(), origin="lower", aspect="auto", extent=extent)
    panel.set_xlim(0, seconds)
    panel.set_xlabel("seconds")
    panel.set_ylabel("labels emitted so far")
    return figure


def one_line(path, width):
    """The end of a path that is too long for a title `width` inches wide"""
    letters = int(width / text_width("m"))
    return path if len(path) <= letters else "... " + path[4 - letters :]


def plot_alignment(path, student, tokenizer, utterance, tokens, chunk):
    """Write the picture of an utterance and its tokens, a list of Token, to `path`."""
    draw_alignment(student, tokenizer, utterance, tokens, chunk).savefig(path)
