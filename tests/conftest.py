"""What the tests share: random-weight models from the shipped configs, and samples for them.

Models get random weights so that nothing here depends on how well the stand-ins were trained.
"""

from __future__ import annotations

import importlib.util
import os

# Before torch and transformers read them: no network, no bars, the same sums on any machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # so that kernels run without an accelerator

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from minerlib.model import MLLM
from minerlib.tasks import Sample

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
MODELS = ("tiny-qwen2-vl", "tiny-qwen2-audio")


# What these test is the same for both models: the second is left to `make test`.
ONCE = "activity atlas attention convergence convergence_layers costs critical gradients last_token"
ONCE += " planted probing states telomeres written"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in ONCE.split() and MODELS[1] in item.name:
            item.add_marker("slow")


def run_script():
    """notebooks/run.py as a module, a new one each time."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "notebooks/run.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def random_mllm(name: str, *, dtype=torch.float32, seed: int = 0, **config_kwargs) -> MLLM:
    """An untrained model of a shipped config, with the shipped processor."""
    folder = ROOT / "data/models" / name
    config = transformers.AutoConfig.from_pretrained(folder, **config_kwargs)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config).to(dtype)
    return MLLM(model, transformers.AutoProcessor.from_pretrained(folder), str(folder))


@cache
def shared_mllm(name: str, dtype=torch.float32) -> MLLM:
    return random_mllm(name, dtype=dtype)


@pytest.fixture(params=MODELS)
def mllm(request) -> MLLM:
    """Each shipped architecture with random weights; shared, so leave it as you found it."""
    return shared_mllm(request.param)


@pytest.fixture(params=MODELS)
def exact_mllm(request) -> MLLM:
    """As `mllm` in float64: what differs between two ways to the same number is then a mistake."""
    return shared_mllm(request.param, torch.float64)


def samples_for(mllm: MLLM) -> list[Sample]:
    """Prompts of different lengths, one without media and some with each medium of the model."""
    rng = np.random.default_rng(0)

    def image(side):
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))

    def video(frames):
        return rng.integers(0, 256, (frames, 32, 32, 3), np.uint8)

    def audio(seconds):
        return (0.1 * rng.standard_normal(int(16_000 * seconds))).astype(np.float32)

    samples = [Sample("What is the capital of Taria?", ("Arlen",), benchmark="text", row=0)]
    if "image" in mllm.kinds:
        samples += [
            Sample("What word is it?", ("gym",), image=image(48), benchmark="image", row=1),
            Sample("Describe the image in one sentence.", ("x",), image=image(64), row=2),
            Sample("What is moving?", ("circle",), video=video(8), benchmark="video", row=3),
            Sample("Who?", ("square",), video=video(4), benchmark="video", row=4),
        ]
    if "audio" in mllm.kinds:
        samples += [
            Sample("Recognize the speech.", ("WATER",), audio=audio(1.7), row=1),
            Sample("Which vocal sound is this?", ("Cough",), audio=audio(0.8), row=2),
            Sample("What?", ("Sigh",), audio=audio(0.31), row=3),
        ]
    return samples


@pytest.fixture
def samples(mllm) -> list[Sample]:
    return samples_for(mllm)


@dataclass(frozen=True)
class Rows:
    """The least that `score` and `evaluate` ask of a benchmark."""

    samples: list[Sample]
    name: str = "rows"
    fingerprint: str = "rows"

    @property
    def media(self) -> list[str]:
        return [str(i) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, which):
        part = self.samples[which]
        return Rows(part, self.name, self.fingerprint) if isinstance(which, slice) else part

    def __iter__(self):
        return iter(self.samples)


def random_neurons(mllm: MLLM, share: float = 0.1, modalities: int = 2, seed: int = 0):
    """A random draw, bool [modality, layer, neuron], with modalities called m0, m1, ..."""
    import xarray as xr

    rng = np.random.default_rng(seed)
    mask = rng.random((modalities, mllm.n_layers, mllm.n_neurons)) < share
    names = [f"m{i}" for i in range(modalities)]
    return xr.DataArray(mask, {"modality": names}, ("modality", "layer", "neuron"))


def footprints(mllm: MLLM) -> tuple:
    """Everything that a tap may touch: the hooks of all modules, the attention of all configs."""
    from minerlib import tap as tap_module

    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in mllm.model.modules()]
    attention = [
        m.config._attn_implementation for m in mllm.model.modules() if hasattr(m, "config")
    ]
    return hooks, attention, dict(tap_module._listeners)
