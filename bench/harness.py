"""Timing two things side by side, peak memory of a process, and models of real width."""

from __future__ import annotations

import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
import xarray as xr

import minerlib as ml
from minerlib import scoring

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 16
TEXT = {
    "tiny-qwen2-vl": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "tiny-qwen2-audio": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""The decoder widths of Qwen2-VL-7B and Qwen2-Audio-7B, given to the stand-ins' configs."""
REAL = {"tiny-qwen2-vl": "Qwen2-VL-7B width", "tiny-qwen2-audio": "Qwen2-Audio-7B width"}


def stand_in(name: str) -> ml.MLLM:
    return ml.load(ROOT / "data/models" / name)


def real_width(
    name: str, layers: int = 2, dtype=torch.float32, device: str = "cpu", **text
) -> ml.MLLM:
    """A stand-in's class, tower and vocabulary around decoder layers of a 7 B model's width."""
    folder = ROOT / "data/models" / name
    config = transformers.AutoConfig.from_pretrained(folder)
    sizes = TEXT[name] | {"num_hidden_layers": layers} | text
    for key, value in sizes.items():
        setattr(config.text_config, key, value)
    config.text_config.layer_types = ["full_attention"] * layers
    config.text_config.head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    if hasattr(config, "vision_config"):
        config.vision_config.hidden_size = sizes["hidden_size"]
        third = config.text_config.head_dim // 16  # as 16, 24, 24 of the real 128
        config.text_config.rope_parameters = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2 * third, 3 * third, 3 * third],
        }
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    model = model.to(dtype).to_empty(device=device)
    block = torch.randn(2**20 - 3).to(device, dtype)
    with torch.no_grad():
        for weight in model.parameters():
            flat = weight.view(-1)
            scale = weight[0].numel() ** -0.5 if weight.dim() > 1 else 0
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)] * scale) if scale else part.fill_(1)
        for buffer in model.buffers():  # left unset by to_empty
            buffer.zero_()
        for module in model.modules():
            if hasattr(module, "compute_default_rope_parameters") and hasattr(module, "inv_freq"):
                inverse, _ = module.compute_default_rope_parameters(module.config)
                module.inv_freq = inverse.to(device)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return ml.MLLM(model, processor, str(folder))


def prompt(mllm: ml.MLLM, tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Token ids as of a chat with one medium: a head of text, four fifths medium, a question.

    Placeholders without a medium's features keep their own embedding, so that only the decoder
    works.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(300, 600, (batch, tokens))
    medium = next(mllm.token_ids[k][0] for k in ("image", "audio") if mllm.token_ids[k])
    special = mllm.token_ids["special"]
    first = tokens // 10
    ids[:, first : first + int(0.8 * tokens)] = medium
    ids[:, [0, first - 1, first + int(0.8 * tokens), tokens - 3]] = special[1]
    ids = torch.from_numpy(ids).to(mllm.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def forward(mllm: ml.MLLM, batch) -> None:
    mllm.forward(batch)


def rows_of(benchmark: str, limit: int) -> ml.benchmarks.Benchmark:
    return ml.benchmark(benchmark, source=ROOT / "data/benchmarks", limit=limit)


def mine(mllm: ml.MLLM, batch) -> None:
    scoring.add_batch(mllm, batch, scoring.Sums(mllm.n_layers))


def scored_and_plain(mllm: ml.MLLM, batch) -> dict:
    """The two sides of every comparison of scoring with its floor."""
    return {"score": lambda: mine(mllm, batch), "forward": lambda: forward(mllm, batch)}


@torch.inference_mode()
def generate(mllm: ml.MLLM, batch, tokens: int = NEW_TOKENS) -> None:
    """Exactly so many greedy tokens, whatever they are."""
    mllm.model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=mllm.tokenizer.pad_token_id,
    )


def two_percent(mllm: ml.MLLM, seed: int = 0) -> xr.DataArray:
    """A random 2 % of the neurons: what silencing costs does not depend on which."""
    rng = np.random.default_rng(seed)
    mask = rng.random((1, mllm.n_layers, mllm.n_neurons)) < 0.02
    return xr.DataArray(mask, {"modality": ["random"]}, ("modality", "layer", "neuron"))


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, np.ndarray]:
    """Seconds of each side per round, [round]; the order turns round by round, after a warm-up."""
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(what: str, setting: str, seconds: dict, target: float | None = None, **more) -> dict:
    """A line of the table: the first side over the second, median of the rounds and quartiles."""
    first, second = seconds.values()
    rounds = first / second
    low, high = np.quantile(rounds, [0.25, 0.75])
    return line(what, setting, np.median(rounds), "x", target, low=low, high=high, **more) | {
        "seconds": [float(np.median(first)), float(np.median(second))]
    }


def line(
    what: str, setting: str, value: float | None, unit: str, target: float | None = None, **more
) -> dict:
    """A line of the table, without a value where nothing was measured.

    `target` is the most that is asked for.
    """
    met = None if target is None else bool(value <= target)
    value = None if value is None else float(value)
    found = {"what": what, "setting": setting, "value": value, "unit": unit}
    numbers = {k: float(v) if isinstance(v, np.floating) else v for k, v in more.items()}
    return found | numbers | {"target": target, "met": met}


def exponent(points: dict[int, float]) -> float:
    """The power of the size that the seconds grow with: the slope on logarithms."""
    return np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]


def peak_mib() -> float:
    """The most memory that this process has held, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at what the parent process held
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak() -> float:
    """Begin `peak_mib` anew, where the system can; returns what the process holds now, MiB."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def _child(function, arguments, pipe) -> None:
    pipe.send((function(*arguments), peak_mib()))


def alone(function: Callable, *arguments) -> tuple:
    """What a function returns in a fresh process of its own, and that process's peak in MiB."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(function, arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} died; see above") from None
    finally:
        process.join()


def footprint(tokens: int, rows: int, scored: bool) -> int:
    """Run prompts of so many tokens once; returns the bytes of one layer's activations."""
    mllm = real_width("tiny-qwen2-vl", hidden_size=1024, num_attention_heads=8,
                      num_key_value_heads=2, intermediate_size=5504)  # fmt: skip
    inputs, sums = prompt(mllm, tokens), scoring.Sums(mllm.n_layers)
    for _ in range(rows):
        if scored:
            scoring.add_batch(mllm, inputs, sums)
        else:
            forward(mllm, inputs)
    return tokens * mllm.n_neurons * 4
