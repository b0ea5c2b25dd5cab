"""A student that streams: chunk by chunk it hears what the masked pass over the whole utterance hears."""
from dataclasses import replace

import pytest
import torch

import model
from model import RANDOM, Config, Student

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
        for s in range(max(0, t - 2), t + 1):                               # causal convolution of three frames, each ...
            start = s // chunk * chunk                                      # ... after an attention over its own chunk
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
