"""Speech encoders that others wrote, behind one class: waveforms -> frames at their own rate.

    encoder = SpeechEncoder("microsoft/wavlm-base-plus:6,12")    # of Hugging Face, or a folder
    encoder = SpeechEncoder("my_teacher.py:MyTeacher")           # a module of your own
    [[six, twelve]] = encoder.encode([waveform])                 # (n, D) each

What stage 1 makes of them is in pretrain_kd.py: class Teacher.
"""

import bisect
import functools
import importlib.util
import pickle
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from data import SAMPLE_RATE
from tools.command_line import UserError, first_line
from tools.machine import autocast

# Relative change of a layer that rounding makes: 1e-3 on a GPU (TF32), 1e-6 on a CPU.
# Padding changes the layers of those encoders that do not hide it by 5e-3 and more.
ROUNDING = 3e-3


def split_spec(spec):
    """ "NAME:6,12" -> "NAME", ["6", "12"]; "NAME", or a module of your own -> itself, ["last"]"""
    if ":" not in spec or ".py:" in spec or Path(spec).exists():
        return spec, ["last"]
    name, _, layers = spec.rpartition(":")
    return name, layers.split(",")


class SpeechEncoder:
    """A frozen encoder: SpeechEncoder("NAME[:LAYER,...]").encode(waveforms)

    name, layers: the two parts of `spec`. Layers are "last" (the default) or numbers of hidden
        layers, 0 being what enters the first one.
    title: a short name.   parameters: how many.
    clocks, dims: of each layer, when its frames are and how wide (D).

    One law: what an utterance gives does not depend on its batch. Some architectures break it (a
    group norm before the first layer sees the padding), so this is measured here, and those encode
    one utterance at a time. Clocks are measured too, so that no list of families stands here.
    Raises UserError for all that cannot be loaded, cannot be run or is no speech encoder.
    """

    def __init__(self, spec, device="cpu", dtype=torch.float32):
        self.spec = spec
        self.name, self.layers = split_spec(spec)
        try:
            self.model = load_model(self.name, torch.device(device))
            self._check_layers()
            self._measure_layers()
            self.shortest = self._shortest()
            self.batched = self._padding_is_harmless()
        except UserError:
            raise
        except Exception as error:  # Extractors and encoders that do not fit raise all sorts.
            cure = "choose another, or mend its files: its feature extractor may be another model's"
            if isinstance(getattr(self, "model", None), OwnModel):
                cure = f"mend {self.model.line_of(error)}"
            raise UserError(
                f"teacher {spec}: cannot encode audio ({type(error).__name__}: "
                f"{first_line(error)}); {cure}"
            ) from error
        self.title = self.model.title
        self.parameters = self.model.parameters
        if dtype != torch.float32:
            self.model.compute_in(dtype)

    def __str__(self):
        network = type(self.model.network).__name__
        rates = dict.fromkeys(f"{clock.rate:.4g} Hz" for clock in self.clocks)
        padding = "in batches"
        if not self.batched:
            padding = "one utterance at a time (padding would change it)"
        return (
            f"{network}, {self.parameters / 1e6:.1f} M parameters, {', '.join(rates)}, "
            f"layer {', '.join(self.layers)}, {padding}"
        )

    def encode(self, waveforms):
        """list of (S,) at 16 kHz -> for each utterance, for each layer, frames (n, D), float32"""
        padded = []
        for waveform in waveforms:
            missing = max(0, self.shortest - len(waveform))
            padded.append(F.pad(waveform.cpu(), (0, missing)))
        return self._encode(padded, self.batched)

    def _encode(self, waveforms, batched):
        """As `encode`, all in one batch or each piece alone"""
        # An utterance longer than the model's window is several, each as if it stood alone.
        pieces = []
        owners = []
        for b, waveform in enumerate(waveforms):
            for piece in waveform.split(self.model.window or len(waveform)):
                pieces.append(piece)
                owners.append(b)
        groups = [pieces]
        if not batched:
            groups = [[piece] for piece in pieces]

        # The frames of each piece, of each layer, without those of the padding.
        encoded = []
        for group in groups:
            layers = self.model(group, self.layers)
            for row, piece in enumerate(group):
                frames = []
                for states, clock in zip(layers, self.clocks):
                    frames.append(states[row, : clock.frames(len(piece))])
                encoded.append(frames)

        # The pieces of an utterance are put together again.
        pieces_of = [[] for _ in waveforms]
        for b, frames in zip(owners, encoded):
            pieces_of[b].append(frames)
        utterances = []
        for parts in pieces_of:
            utterances.append([torch.cat(layer) for layer in zip(*parts)])
        return utterances

    # ---- what is found out when it is loaded

    def _check_layers(self):
        """UserError for layers that the model does not have; the deeper ones are dropped."""
        depth = self.model.depth
        known = ["last"]
        advice = f"choose {self.name}"
        if depth is not None:
            known += map(str, range(depth + 1))
            advice = (
                f"choose {self.name}:last, one of {self.name}:0 to {self.name}:{depth}, or "
                f"several: {self.name}:{depth // 2},{depth}"
            )
        for layer in self.layers:
            if layer not in known:
                raise UserError(f"teacher {self.name} has no layer {layer!r}; {advice}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"teacher {self.spec} names a layer twice; {advice}")
        if "last" not in self.layers:
            self.model.drop_layers_above(max(map(int, self.layers)))

    def _measure_layers(self):
        """The clock and the width of each layer"""

        @functools.cache
        def frames_of(samples):
            states = self.model([torch.zeros(samples)], self.layers)
            return [layer.shape[1] for layer in states]

        self.clocks = []
        self.dims = []
        for k, states in enumerate(self.model([noise(SAMPLE_RATE)], self.layers)):
            if not states.isfinite().all():
                raise UserError(
                    f"teacher {self.spec}: its embeddings are not finite, its weights are damaged; "
                    f"download it again or choose another"
                )
            if self.model.window is not None:
                clock = Clock(self.model.window // states.shape[1], 0)
            else:
                clock = measure_clock(self.spec, lambda samples: frames_of(samples)[k])
            self.clocks.append(clock)
            self.dims.append(states.shape[2])

    def _shortest(self):
        """-> samples. Shorter audio is padded: it gives no frame, no number or an exception."""
        if self.model.window is not None:
            return 1
        samples = max(1, *[clock.hop - clock.offset for clock in self.clocks])
        # At the latest the half second will do from which the clocks were measured.
        while samples < SAMPLE_RATE // 2 and not self._encodes(samples):
            samples += min(clock.hop for clock in self.clocks)
        return samples

    def _encodes(self, samples):
        """Does so little audio give hidden states?"""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                states = self.model([noise(samples)], self.layers)
        except Exception:  # Each family has its own way to refuse short audio.
            return False
        # A model that sees nothing but its own padding gives 0.
        return all(layer.isfinite().all() and layer.any() for layer in states)

    def _padding_is_harmless(self):
        """Are utterances encoded alike when alone and in a batch of very different ones?"""
        waveforms = []
        for k, samples in enumerate((4_000, 10_000, 16_000, 28_000, 64_000)):
            # Quiet beside loud: an extractor might scale a batch as a whole.
            waveforms.append(noise(samples) / 2**k)
        together = self._encode(waveforms, batched=True)
        for waveform, in_batch in zip(waveforms, together):
            [alone] = self._encode([waveform], batched=False)
            for a, b in zip(alone, in_batch):
                if a.shape != b.shape or not (a - b).norm() < ROUNDING * a.norm():
                    return False
        return True


def noise(samples):
    """-> (S,), the same in every call: what encoders are measured with"""
    generator = torch.Generator().manual_seed(samples)
    return 0.1 * torch.randn(samples, generator=generator)


# ---------------------------------------- time


@dataclass(frozen=True)
class Clock:
    """Which samples the frames of a layer belong to. Every encoder is a chain of convolutions:
    S samples give (S + offset) // hop frames; frame i is centred on i * hop + (hop - offset) / 2.
    """

    hop: int  # samples from frame to frame
    offset: int  # samples; negative: a frame needs more than a hop, positive: the ends are padded

    def frames(self, samples):
        return max(1, (samples + self.offset) // self.hop)

    @property
    def centre(self):
        """of the first frame, in samples"""
        return (self.hop - self.offset) / 2

    @property
    def rate(self):
        """frames per second"""
        return SAMPLE_RATE / self.hop


def measure_clock(name, count):
    """-> Clock. count: a function, samples -> frames. UserError about `name` if it has no clock"""
    start = SAMPLE_RATE // 2
    later = 6 * SAMPLE_RATE
    frames = count(start)
    grown = count(later) - frames
    if grown < 1:
        raise UserError(
            f"teacher {name}: gives {frames} frames however long the audio is; a teacher must "
            f"follow the audio frame by frame"
        )
    # From which number of samples on is there one frame more, and two more?
    lengths = range(start, start + 4 * (later - start) // grown)
    one_more = lengths[bisect.bisect(lengths, frames, key=count)]
    two_more = lengths[bisect.bisect(lengths, frames + 1, key=count)]
    hop = two_more - one_more
    clock = Clock(hop, (frames + 1) * hop - one_more)
    # Is it still right after several seconds?
    last = clock.frames(later)
    samples = last * hop - clock.offset
    if (count(samples - 1), count(samples)) != (last - 1, last):
        raise UserError(
            f"teacher {name}: its frames are not a fixed whole number of samples apart: {frames} "
            f"in {start} samples, {frames + grown} in {later}; a module of your own should give "
            f"lengths // hop"
        )
    return clock


# ---------------------------------------- models


def load_model(name, device):
    """-> FrozenModel of a hub name, a folder, or "FILE.py:CLASS". UserError names the cure."""
    if ".py:" in name:
        return OwnModel(name, device)
    if name.endswith(".py"):
        raise UserError(f"teacher {name}: name the class in it too, as in {name}:MyTeacher")
    return HubModel(name, device)


class FrozenModel:
    """A network that is never trained.

    name: what it was loaded from.   title: what a log calls it.   parameters: how many.
    window: samples that every input is padded to (Whisper), or None.
    depth: of its hidden layers, 0 being what enters the first one; None if it gives only "last".
    """

    def __init__(self, name, title, network, device):
        self.name = name
        self.title = title
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        self.dtype = torch.float32
        self.parameters = sum(p.numel() for p in network.parameters())
        self.window = None
        self.depth = None

    def __call__(self, waveforms, layers):
        """list of (S,) at 16 kHz -> for each layer its states (B, n, D), float32, padded anyhow"""
        raise NotImplementedError

    def compute_in(self, dtype):
        """Autocast to dtype, and cast the large weights once instead of in every call."""
        self.dtype = dtype
        for module in self.network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
                module.to(dtype)


class HubModel(FrozenModel):
    """Any audio encoder that transformers loads, with its feature extractor.

    A folder is read without any network call. Code that comes with a model never runs.
    """

    def __init__(self, name, device):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            refuse_other_models(name, config)
            extractor = AutoFeatureExtractor.from_pretrained(name, **options)
            whole, report = AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **options
            )
        except UserError:
            raise
        except Exception as error:  # Nobody can list what foreign files make a library raise.
            raise UserError(f"teacher {name}: {why_not_loaded(name, error)}") from error
        if getattr(extractor, "sampling_rate", None) != SAMPLE_RATE:
            raise UserError(
                f"teacher {name}: not a model of speech at {SAMPLE_RATE} Hz; choose another"
            )
        # Weights that a checkpoint lacks are random. One is used only while masking: it may be.
        missing = [key for key in report["missing_keys"] if "masked_spec_embed" not in key]
        if missing:
            raise UserError(
                f"teacher {name}: its weights lack {len(missing)} tensors (e.g. {missing[0]}), "
                f"which would be random; save the model again or choose another"
            )
        # The encoder of Whisper, Moonshine and Parakeet is a model of its own, without a decoder.
        # What other families call encoder takes no audio.
        network = whole.get_encoder()
        if not isinstance(network, transformers.PreTrainedModel):
            network = whole
        super().__init__(name, Path(name).name, network, device)
        self.extractor = extractor
        self.window = getattr(extractor, "n_samples", None)
        output = self._run([torch.zeros(SAMPLE_RATE)], hidden_states=True)
        if getattr(output, "hidden_states", None):
            self.depth = len(output.hidden_states) - 1

    def __call__(self, waveforms, layers):
        output = self._run(waveforms, hidden_states=layers != ["last"])
        states = []
        for layer in layers:
            if layer == "last":
                states.append(output.last_hidden_state)
            else:
                states.append(output.hidden_states[int(layer)])
        # Some families pad beyond the longest utterance; they return a mask of the last layer's
        # frames, which says nothing about layers of another rate.
        mask = getattr(output, "attention_mask", None)
        for k, layer in enumerate(states):
            if mask is not None and mask.shape[1] == layer.shape[1]:
                states[k] = layer[:, : int(mask.sum(1).max())]
        return [layer.float() for layer in states]

    @torch.no_grad()
    def _run(self, waveforms, hidden_states):
        """list of (S,) -> the encoder's output for what its own feature extractor makes of them

        The extractor knows whether to normalise the audio.
        """
        padding = {}
        if self.window is None:
            padding = {"padding": "longest", "return_attention_mask": True}
        inputs = self.extractor(
            [waveform.numpy() for waveform in waveforms],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            **padding,
        )
        mask = inputs.get("attention_mask")
        if mask is not None and mask.all():
            # It hides nothing, and models with group norm never saw one in their training.
            del inputs["attention_mask"]
        with autocast(self.device, self.dtype):
            output = self.network(**inputs.to(self.device), output_hidden_states=hidden_states)
        if getattr(output, "last_hidden_state", None) is None:
            raise UserError(f"teacher {self.name}: gives no hidden states; choose a speech encoder")
        return output

    def drop_layers_above(self, layer):
        """Free the layers that nobody asked for, where the network has a list of them."""
        parts = dict(self.network.named_modules())
        stack = parts.get("layers", parts.get("encoder.layers"))
        if stack is not None:
            # One more stays: some families put a norm behind the last one.
            del stack[layer + 1 :]


def refuse_other_models(name, config):
    """UserError if this is the config of a model of text or images, or of a quantised one"""
    classes = transformers.MODEL_MAPPING.get(type(config), None)
    if isinstance(classes, tuple):
        classes = classes[0]
    kinds = {"input_ids": "text", "pixel_values": "vision"}
    kind = kinds.get(getattr(classes, "main_input_name", None))
    if kind is not None:
        raise UserError(
            f"teacher {name}: a {kind} model ({config.model_type}); choose a speech model"
        )
    quantisation = config.to_dict().get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown method")
        raise UserError(
            f"teacher {name}: a quantised checkpoint ({method}); choose the one in full precision"
        )


def why_not_loaded(name, error):
    """-> the cause in the user's words, and the cure"""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "needs code that comes with it, which never runs here; choose a model that "
            "transformers knows, or wrap this one in a module of your own (my_teacher.py:MyTeacher)"
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return (
            "its weights are a pickle with other objects than tensors, which is never opened; "
            "choose a model with model.safetensors"
        )
    if Path(name).is_dir():
        return (
            f"{first_line(error)} - the folder must hold what `hf download` or save_pretrained "
            f"leaves there"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "no such folder"
    if "not a valid model identifier" in text:
        return (
            "the hub has no such model; give owner/name as https://huggingface.co spells it, or a "
            "folder (if it is private: set HF_TOKEN or log in with `hf auth login`)"
        )
    if "gated repo" in text or "401 Client Error" in text:
        return (
            f"its owner grants access on request: ask at https://huggingface.co/{name}, then set "
            f"HF_TOKEN or log in with `hf auth login`"
        )
    if "connect" in text or "offline" in text:
        return (
            f"no such folder, not in the cache either, and the hub cannot be asked "
            f"(HF_HUB_OFFLINE or no network); "
            f"where there is one: hf download {name}   (kept in HF_HOME)"
        )
    return f"{first_line(error)} - give a folder or a hub name of a speech model"


# ---------------------------------------- your own


class OwnModel(FrozenModel):
    """A class in a Python file of yours, named as "my_teacher.py:MyTeacher". The contract:

        MyTeacher() takes no arguments and is a torch.nn.Module.
        forward(waveforms (B, S) float32 at 16 kHz, padded with 0, lengths (B,) in samples)
            -> frames (B, n, D), lengths (B,) in frames; a frame every so many whole samples,
            where everything is on the device of the training.

    Its weights must be the same at every start, so random ones need a seed. For example:

        class MyTeacher(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(320, 64)

            def forward(self, waveforms, lengths):
                frames = waveforms[:, :waveforms.shape[1] // 320 * 320].unflatten(1, (-1, 320))
                return self.layer(frames), lengths // 320

    Its frame rate and whether padding changes it are measured, as of every teacher, and where its
    frames are is taken from their number (see Clock): with lengths // hop, frame i is that of the
    samples from i * hop to (i + 1) * hop.
    """

    def __init__(self, name, device):
        self.path, _, title = name.rpartition(":")
        if not Path(self.path).is_file():
            raise UserError(f"teacher {name}: no such file: {self.path}")
        try:
            spec = importlib.util.spec_from_file_location(name, self.path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            network = getattr(module, title)()
        except Exception as error:  # Anything can happen in code that is not ours.
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"teacher {name}: {problem}; mend {self.path}") from error
        if not isinstance(network, torch.nn.Module):
            raise UserError(f"teacher {name}: {title} is no torch.nn.Module; derive it from that")
        super().__init__(name, title, network, device)

    def line_of(self, error):
        """-> "my_teacher.py:12", the line of the file that led to the error, if it was one"""
        path = Path(self.path).resolve()
        place = self.path
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).resolve() == path:
                place = f"{self.path}:{frame.lineno}"
        return place

    @torch.no_grad()
    def __call__(self, waveforms, layers):
        batch = pad_sequence(waveforms, batch_first=True).to(self.device)
        lengths = torch.tensor([len(waveform) for waveform in waveforms], device=self.device)
        with autocast(self.device, self.dtype):
            output = self.network(batch, lengths)
        try:
            frames, lengths = output
            B, n, D = frames.shape
            assert lengths.shape == (B,) == (len(waveforms),) and lengths.max() <= n
        except (AssertionError, AttributeError, TypeError, ValueError):
            raise UserError(
                f"teacher {self.name}: forward must return frames (B, n, D) and lengths (B,), here "
                f"with B = {len(waveforms)}, but returned {describe(output)}; mend {self.path}"
            )
        return [frames[:, : int(lengths.max())].float()]


def describe(output):
    """-> the shapes of what a module returned, for people"""
    if isinstance(output, torch.Tensor):
        return f"one tensor {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return " and ".join(describe(part) for part in output)
    return type(output).__name__
