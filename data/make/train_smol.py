"""Train what the smol models add to their pretrained parts; resumes where it was stopped.

    python -m data.make.train_smol smol-qwen2-audio [--seed 1]

SmolLM2's embeddings, norms and MLPs and Whisper's encoder are frozen. What learns is the layer that
carries a tower's features to the decoder, the delimiters' embeddings and, where RANK is above 0,
adapters of the decoder's attention. Rows are asked as minerlib asks them: `MLLM.encode` makes the
prompts, in the model's own chat template; further questions on the same medium follow as turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from minerlib.model import MLLM
from minerlib.tasks import REGISTRY, Sample, benchmark

from . import grafts, vision
from .train_audio import Clips
from .training import IGNORED, schedule, train

BENCHMARKS = grafts.parts.ROOT / "data/benchmarks"
Turn = tuple[str, str]  # a question and its answer
Drawn = tuple[list[Sample], list[list[Turn]]]  # samples, and what is asked on each
Draw = Callable[[np.random.Generator], Drawn]

MIX = {
    "smol-qwen2-vl": {"text_vqa": 0.4, "coco_caption": 0.15, "msvd_qa": 0.3, "crowd": 0.15},
    "smol-qwen2-audio": {"libri": 0.8, "vocal_sound": 0.2},
    "smol-qwen2.5-omni": {"text_vqa": 0.28, "coco_caption": 0.1, "msvd_qa": 0.2, "crowd": 0.1}
    | {"libri": 0.25, "vocal_sound": 0.07},
}
ROWS = {"text_vqa": 8, "coco_caption": 16, "msvd_qa": 8, "crowd": 8, "libri": 12, "vocal_sound": 12}
QUESTIONS = 5  # at most, on one picture or clip
END_WEIGHT = 3.0
LEARNS = ("merger", "multi_modal_projector", "audio_tower.proj", "lora_", "delimiters")


# --- what is asked -------------------------------------------------------------------------------


def prompt(name: str, **fields: str) -> str:
    """A benchmark's prompt as minerlib asks it."""
    return REGISTRY[name].prompt.format_map(fields)


def visual(name: str, make: vision.Maker, turns_of: Callable) -> Draw:
    """Fresh scenes that no test row shows, with the turns on each."""
    held_out, clip = vision.held_out(), name == "msvd_qa"

    def draw(rng: np.random.Generator) -> Drawn:
        scenes = [vision.fresh(make, rng, held_out) for _ in range(ROWS[name])]
        turns = [turns_of(scene, rng)[:QUESTIONS] for scene in scenes]
        samples = []
        for scene, asked in zip(scenes, turns, strict=True):
            if clip:
                medium = {"video": vision.clip(scene)}
            else:
                medium = {"image": Image.fromarray(vision.render(scene)[0])}
            samples.append(Sample(asked[0][0], ("",), **medium))
        return samples, turns

    return draw


def asked(name: str, questions_of: Callable) -> Callable:
    """Turns of a benchmark's questions."""
    return lambda scene, rng: [
        (prompt(name, question=q.text), q.answer) for q in questions_of(scene, rng)
    ]


def caption(scene: vision.Scene, rng: np.random.Generator) -> list[Turn]:
    """One caption; the first wording is the commonest, so the greedy answer is sure of its way."""
    wording = vision.captions(scene)[rng.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
    return [(prompt("coco_caption"), wording)]


def heard(name: str, draw_clip: Callable, say: Callable[[str], str]) -> Draw:
    """Clips and what is said or made on them."""

    def draw(rng: np.random.Generator) -> Drawn:
        drawn = [draw_clip(rng) for _ in range(ROWS[name])]
        samples = [Sample(prompt(name), ("",), audio=clip) for clip, *_ in drawn]
        return samples, [[(prompt(name), say(text))] for *_, text in drawn]

    return draw


def tasks(names: Sequence[str]) -> dict[str, Draw]:
    """The tasks of these names."""
    made: dict[str, Draw] = {}
    if "text_vqa" in names:
        signs, clips = vision.sign_questions, vision.clip_questions
        made["text_vqa"] = visual("text_vqa", vision.sign_scene, asked("text_vqa", signs))
        made["crowd"] = visual("crowd", vision.crowd_scene, asked("text_vqa", signs))
        made["msvd_qa"] = visual("msvd_qa", vision.clip_scene, asked("msvd_qa", clips))
        made["coco_caption"] = visual("coco_caption", vision.pair_scene, caption)
    if "libri" in names:
        spoken = Clips(12000, 2400)
        # SmolLM2 knows words in small letters; WRR does not tell them apart.
        made["libri"] = heard("libri", spoken.spoken, str.lower)
        made["vocal_sound"] = heard("vocal_sound", spoken.sound, str)
    return made


def batch_of(mllm: MLLM, samples: list[Sample], turns: list[list[Turn]]) -> dict:
    """Model inputs, padded on the right, with labels on the answers alone."""
    tokens = mllm.tokenizer
    inputs = dict(mllm.encode(samples))
    shape, kept = inputs["input_ids"].shape, inputs["attention_mask"].bool()
    end = "<|im_end|>"
    rows, labels = [], []
    for ids, real, told in zip(inputs["input_ids"], kept, turns, strict=True):
        row = ids[real].tolist()
        label = [IGNORED] * len(row)
        for i, (question, answer) in enumerate(told):
            if i:
                between = f"\n<|im_start|>user\n{question}{end}\n<|im_start|>assistant\n"
                more = tokens(between, add_special_tokens=False)["input_ids"]
                row, label = row + more, label + [IGNORED] * len(more)
            more = tokens(answer + end, add_special_tokens=False)["input_ids"]
            row, label = row + more, label + more
        rows.append(row)
        labels.append(label)
    longest = max(map(len, rows))
    batch = {k: v for k, v in inputs.items() if v.shape != shape}
    for name in (k for k, v in inputs.items() if v.shape == shape):
        batch[name] = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, real in enumerate(kept):
            value = inputs[name][i][real]
            batch[name][i, : len(value)] = value
    batch["labels"] = torch.full((len(rows), longest), IGNORED)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        batch["input_ids"][i, : len(row)] = torch.tensor(row)
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, : len(row)] = torch.tensor(label)
    return batch


# --- pictures meet words before the decoder does ------------------------------------------------


def names(mllm: MLLM) -> dict[str, torch.Tensor]:
    """SmolLM2's embedding of every class's name, the mean of its tokens, float [class, hidden]."""
    weight = mllm.model.get_input_embeddings().weight.detach()

    def embedded(word: str) -> torch.Tensor:
        ids = mllm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return weight[ids].mean(0)

    motions = [vision.DOING.get(motion, motion) for motion in vision.MOTIONS]
    said = {"what": vision.WHAT, "colour": vision.COLOURS, "motion": motions}
    said |= {f"character{i}": ("nothing", *vision.CHARACTERS) for i in range(2)}
    return {head: torch.stack([embedded(word) for word in words]) for head, words in said.items()}


def told(targets: dict[str, torch.Tensor], named: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each cell shows, in SmolLM2's own embeddings: the mean of its names [cell, hidden].

    A number is named by its two digits, anything else by its word; then by colour and motion.
    """
    number = targets["what"] == vision.WHAT.index("number")
    total = torch.zeros(len(number), named["what"].shape[1])
    count = torch.zeros(len(number), 1)
    for head, embeddings in named.items():
        here = targets[head] >= 0
        if head == "what":
            here &= ~number
        elif head.startswith("character"):
            here &= number
        total[here] += embeddings[targets[head][here]]
        count += here[:, None]
    return total / count.clip(1)


def align(mllm: MLLM, steps: int, seed: int) -> float:
    """Teach the merger to say of each cell what it shows; returns the variance explained at last.

    As towers come pretrained with captions: the decoder, which stays frozen, then meets tokens that
    are near its own words.
    """
    visual, processor, named = mllm.model.model.visual, mllm.processor, names(mllm)
    merger = [weight for weight in visual.merger.parameters()]
    optimizer = torch.optim.AdamW(merger, lr=2e-3, betas=(0.9, 0.98))
    makers = {"text_vqa": vision.sign_scene, "coco_caption": vision.pair_scene}
    makers |= {"msvd_qa": vision.clip_scene, "crowd": vision.crowd_scene}
    held_out, explained = vision.held_out(), 0.0
    for step in tqdm(range(steps), desc="align", mininterval=5):
        rng = np.random.default_rng([seed, 7, step])
        name = str(rng.choice(list(makers), p=(0.5, 0.1, 0.25, 0.15)))
        scenes = [vision.fresh(makers[name], rng, held_out) for _ in range(16)]
        size = (vision.CLIP_SIDE, vision.FRAMES) if name == "msvd_qa" else (vision.SIDE, 1)
        frames = torch.from_numpy(np.stack([vision.render(s, *size) for s in scenes]))
        frames = frames.movedim(-1, 2)
        if name == "msvd_qa":
            seen = processor.video_processor(list(frames), return_tensors="pt")
        else:
            seen = processor.image_processor(list(frames[:, 0]), return_tensors="pt")
        patches, grids = list(seen.values())[:2]
        found = [vision.targets(scene, *size) for scene in scenes]
        wanted = {h: torch.from_numpy(np.concatenate([f[h] for f in found])) for h in named}
        known = wanted["what"] >= 0
        goal = told(wanted, named)[known]
        cells = visual(patches, grid_thw=grids).pooler_output[known]
        loss = functional.mse_loss(cells, goal) / goal.var(0).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule(step, steps)
        nn.utils.clip_grad_norm_(merger, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        explained = 0.98 * explained + 0.02 * (1 - loss.item())
        if (step + 1) % 100 == 0:
            tqdm.write(f"align {step + 1}: {explained:.3f} of the variance")
    return explained


# --- what learns ---------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear module and a low-rank addition to it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + grafts.SCALE * low


def prepare(mllm: MLLM, rank: int, seed: int, tower: bool = False) -> list[int]:
    """Set free what learns, draw it anew, and return the delimiters' token ids."""
    model = mllm.model
    torch.manual_seed(seed)
    for layer in mllm.layers if rank else ():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name), rank))
    media = {mllm.family.placeholder(kind) for kind in ("image", "video", "audio")}
    delimiters = [i for i in range(grafts.VOCABULARY, len(mllm.tokenizer)) if i not in media]
    model.delimiters = nn.Parameter(torch.zeros(len(delimiters), grafts.HIDDEN))

    def add(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        for i, token in enumerate(delimiters):
            out = out + (args[0] == token)[..., None] * model.delimiters[i]
        return out

    model.get_input_embeddings().register_forward_hook(add)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in LEARNS))
    projector = getattr(model.model, "multi_modal_projector", None)
    if projector is not None:
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return delimiters


def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
    """Cross-entropy of the supervised tokens; only their positions pass the output layer.

    That an answer ends counts END_WEIGHT times: a frozen decoder likes to go on talking.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = model.model(**inputs, use_cache=False).last_hidden_state
    wanted = batch["labels"][:, 1:] != IGNORED
    logits, labels = model.lm_head(states[:, :-1][wanted]).float(), batch["labels"][:, 1:][wanted]
    weights = 1 + (END_WEIGHT - 1) * (labels == grafts.DECODER["eos_token_id"])
    return (
        functional.cross_entropy(logits, labels, reduction="none") * weights
    ).sum() / weights.sum()


def trained(model: nn.Module, delimiters: Sequence[int]) -> dict[str, torch.Tensor]:
    """What a graft file holds, float16: see `grafts.graft`."""
    embeddings = model.get_input_embeddings().weight
    found = {n: w.detach() for n, w in model.named_parameters() if w.requires_grad}
    moved = found.pop("delimiters")
    found |= {f"embedding.{t}": embeddings[t] + moved[i] for i, t in enumerate(delimiters)}
    return {name: weight.half().contiguous() for name, weight in found.items()}


@torch.no_grad()
def held_out(mllm: MLLM, names: Sequence[str], limit: int) -> dict[str, float]:
    """Mean score of each benchmark's first rows."""
    free, scores = [w for w in mllm.model.parameters() if w.requires_grad], {}
    for name in names:
        bench, answers = benchmark(name, BENCHMARKS, limit=limit), []
        for i in range(0, limit, 24):
            answers += mllm.generate(mllm.encode(bench[i : i + 24]), 16)
        scores[name] = float(bench.corpus_score(answers))
        print(
            name, list(zip(answers, [r[0] for r in bench.references], strict=True))[:4], flush=True
        )
        if name == "coco_caption":
            facts = [vision.caption_facts(a) == vision.caption_facts(r[0])
                     for a, r in zip(answers, bench.references, strict=True)]  # fmt: skip
            scores["caption facts"] = float(np.mean(facts))
    for weight in free:
        weight.requires_grad_(True)
    return scores


def main() -> None:
    """Train one model's graft and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(grafts.BUILD))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--runs", type=Path, default=grafts.parts.ROOT / "runs/train")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--align", type=int, default=1500)
    parser.add_argument("--stop-at", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mllm = MLLM(*grafts.untrained(args.model), args.model)
    delimiters = prepare(mllm, args.rank, args.seed)
    mix = MIX[args.model]
    made, shares = tasks(list(mix)), list(mix.values())

    def batch_at(step: int, rng: np.random.Generator) -> tuple[str, dict]:
        name = str(rng.choice(list(mix), p=shares))
        return name, batch_of(mllm, *made[name](rng))

    started = (args.runs / f"{args.model}-{args.seed}-r{args.rank}.pt").exists()
    if "text_vqa" in mix and not started:
        align(mllm, args.align, args.seed)
    asked_for = [name for name in mix if name in REGISTRY]
    spent = train(
        mllm.model, batch_at, steps=args.steps, lr=args.lr, folder=args.runs,
        name=f"{args.model}-{args.seed}-r{args.rank}", seed=args.seed, loss_of=loss_of,
        report=lambda step: held_out(mllm, asked_for, args.limit),
        report_every=args.report_every, save_every=50, stop_at=args.stop_at,
    )  # fmt: skip
    out = args.out or grafts.MODELS / args.model / grafts.GRAFT
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained(mllm.model, delimiters), out)
    print(f"{out}: trained in {spent:.0f} s")


if __name__ == "__main__":
    main()
