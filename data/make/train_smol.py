"""Train what the smol models add to their pretrained parts; resumes where it was stopped.

    python -m data.make.train_smol smol-qwen2-audio [--seed 1]

SmolLM2's embeddings, norms and MLPs and Whisper's encoder are frozen. What learns is the layer that
carries a tower's features to the decoder, the delimiters' embeddings and, where a recipe has a
rank, adapters of the decoder's attention. Rows are asked as minerlib asks them: `MLLM.encode` makes
the prompts, in the model's own chat template; further questions on the same medium follow as turns.
Before that, as towers come pretrained with captions, the layer behind a vision tower learns to say
of each cell of a picture what it shows, in SmolLM2's own embeddings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from minerlib.model import MLLM
from minerlib.tasks import REGISTRY, Sample, benchmark

from . import grafts, vision
from .train_audio import Clips
from .train_vl import (
    BENCHMARKS,
    MAKERS,
    Eye,
    Pupil,
    asked,
    caption,
    caption_right,
    prompt,
    reading_batch,
    reading_loss,
)
from .training import IGNORED, Row, chat, collate, encode, initialise, train

Turn = tuple[str, str]  # a question and its answer
Drawn = tuple[list[Sample], list[list[Turn]]]  # samples, and what is asked on each
Draw = Callable[[np.random.Generator], Drawn]


@dataclass(frozen=True)
class Recipe:
    """How a graft is trained: shares of the tasks, steps of each phase, rate, rank of adapters.

    A tower is trained here where it has steps; `sees` is a graft whose tower this one takes,
    `hears` one whose projector it starts with; `adapted` are the decoder's modules that get
    adapters.
    """

    mix: Mapping[str, float]
    steps: int
    lr: float
    rank: int = 0
    align: int = 0
    tower: int = 0
    sees: str = ""
    hears: str = ""
    adapted: tuple[str, ...] = grafts.ATTENTION


SEEN = {"text_vqa": 0.55, "coco_caption": 0.15, "msvd_qa": 0.25, "crowd": 0.05}
HEARD = {"libri": 0.8, "vocal_sound": 0.2}
BOTH = {k: 0.75 * v for k, v in SEEN.items()} | {k: 0.25 * v for k, v in HEARD.items()}
OMNI = Recipe(BOTH, 1300, 2e-3, rank=8, align=1500, tower=2800, hears="smol-qwen2-audio")
RECIPES = {
    "smol-qwen2-audio": Recipe(HEARD, 2000, 3e-3),
    "smol-qwen2-vl": Recipe(SEEN, 1500, 2e-3, rank=8, align=2500),
    "smol-qwen2.5-omni": OMNI,
    # The same, but the neurons themselves learn from pictures and sounds.
    "smol-qwen2.5-omni-mlp": replace(
        OMNI, tower=0, sees="smol-qwen2.5-omni", adapted=(*grafts.ATTENTION, *grafts.MLP)
    ),
}
ROWS = {"text_vqa": 8, "coco_caption": 16, "msvd_qa": 8, "crowd": 8, "libri": 12, "vocal_sound": 12}
QUESTIONS = 5  # at most, on one picture or clip
TOWER = "model.visual."
LEARNS = ("merger", "multi_modal_projector", "audio_tower.proj", "lora_", "delimiters")


# --- what is asked -------------------------------------------------------------------------------


def visual(name: str, turns_of: Callable) -> Draw:
    """Fresh scenes that no test row shows, with the turns on each."""
    held_out, clip = vision.held_out(), name == "msvd_qa"

    def draw(rng: np.random.Generator) -> Drawn:
        scenes = [vision.fresh(MAKERS[name], rng, held_out) for _ in range(ROWS[name])]
        turns = [turns_of(scene, rng)[:QUESTIONS] for scene in scenes]
        samples = []
        for scene, told_of in zip(scenes, turns, strict=True):
            if clip:
                medium = {"video": vision.clip(scene)}
            else:
                medium = {"image": Image.fromarray(vision.render(scene)[0])}
            samples.append(Sample(told_of[0][0], ("",), **medium))
        return samples, turns

    return draw


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
        made["text_vqa"] = visual("text_vqa", asked("text_vqa", signs))
        made["crowd"] = visual("crowd", asked("text_vqa", signs))
        made["msvd_qa"] = visual("msvd_qa", asked("msvd_qa", clips))
        made["coco_caption"] = visual("coco_caption", caption)
    if "libri" in names:
        spoken = Clips(12000, 2400)
        # SmolLM2 knows words in small letters; WRR does not tell them apart.
        made["libri"] = heard("libri", spoken.spoken, str.lower)
        made["vocal_sound"] = heard("vocal_sound", spoken.sound, str)
    return made


def batch_of(mllm: MLLM, samples: list[Sample], turns: list[list[Turn]]) -> dict:
    """Model inputs, padded on the right, with labels on the answers alone."""
    inputs = dict(mllm.encode(samples).to("cpu"))
    shape, kept = inputs["input_ids"].shape, inputs["attention_mask"].bool()
    rows = []
    for ids, real, asked_here in zip(inputs["input_ids"], kept, turns, strict=True):
        begun = ids[real].tolist()
        # Behind the system message and the first question, which are encoded.
        more, labels = encode(mllm.tokenizer, chat(asked_here)[2:-1])
        rows.append(Row(begun + more, [IGNORED] * len(begun) + labels))
    batch = collate(rows, grafts.DECODER["pad_token_id"])
    for name, value in inputs.items():
        if value.shape != shape:
            batch[name] = value
        elif name not in batch:  # of a kind that text has none of
            batch[name] = torch.zeros_like(batch["input_ids"])
            for row, one, real in zip(batch[name], value, kept, strict=True):
                row[: real.sum()] = one[real]
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

    A number is named by its two digits, the first counting twice, for their order must not be lost;
    anything else by its word; then by colour and motion.
    """
    number = targets["what"] == vision.WHAT.index("number")
    total = torch.zeros(len(number), named["what"].shape[1], device=number.device)
    count = torch.zeros(len(number), 1, device=number.device)
    for head, embeddings in named.items():
        here = targets[head] >= 0
        if head == "what":
            here &= ~number
        elif head.startswith("character"):
            here &= number
        weight = 2 if head == "character0" else 1
        total[here] += weight * embeddings[targets[head][here]]
        count += weight * here[:, None]
    return total / count.clip(1)


def looks(
    processor, scenes: int, reading: float
) -> Callable[[int, np.random.Generator], tuple[str, dict]]:
    """Batches of pictures and clips, and what each of their cells shows; a share is to be read."""
    eye, held_out = Eye(processor), vision.held_out()
    shares = reading, *(1 - reading) * np.array([0.2, 0.5, 0.3])

    def batch_at(step: int, rng: np.random.Generator) -> tuple[str, dict]:
        name = str(rng.choice(list(MAKERS), p=shares))
        drawn = [vision.fresh(MAKERS[name], rng, held_out) for _ in range(scenes)]
        return name, reading_batch(eye, name, drawn)

    return batch_at


def naming_loss(named: dict[str, torch.Tensor]) -> Callable[[nn.Module, dict], torch.Tensor]:
    """The share of the variance of what is `told` that a tower's cells leave unexplained."""

    def loss(tower: nn.Module, batch: dict) -> torch.Tensor:
        known = batch["what"] >= 0
        goal = told(batch, named)[known]
        cells = tower(batch["patches"], grid_thw=batch["grids"]).pooler_output[known]
        return functional.mse_loss(cells.float(), goal) / goal.var(0).mean()

    return loss


def teach_to_see(mllm: MLLM, recipe: Recipe, name: str, how: dict) -> float:
    """The phases before the decoder: the tower, where it is new, and the layer behind it."""
    tower, spent = mllm.model.model.visual, 0.0
    if recipe.tower:
        pupil = Pupil(tower, grafts.HIDDEN)
        initialise(pupil, how["seed"])
        pupil.requires_grad_(True)
        # Reading takes longest to learn: of 16 scenes a step it learnt a half of the characters.
        spent += train(pupil, looks(mllm.processor, 64, 2 / 3), steps=recipe.tower, lr=1.5e-3,
                       name=f"{name}-tower", loss_of=reading_loss, **how)  # fmt: skip
    tower.requires_grad_(False)
    tower.merger.requires_grad_(True)
    return spent + train(tower, looks(mllm.processor, 16, 0.5), steps=recipe.align, lr=2e-3,
                         name=f"{name}-align", loss_of=naming_loss(names(mllm)), **how)  # fmt: skip


def taken(name: str) -> dict[str, torch.Tensor]:
    """What a graft that was trained before adds to its parts."""
    file = grafts.MODELS / name / grafts.GRAFT
    if not file.exists():
        raise SystemExit(f"{grafts.parts.shown(file)} is not there: train {name} first")
    return load_file(file)


@torch.no_grad()
def see_as(mllm: MLLM, other: str) -> None:
    """Take the vision tower of a graft that was trained before, and the layer behind it."""
    seen = taken(other)
    for name, weight in mllm.model.named_parameters():
        if name.startswith(TOWER):
            weight.copy_(seen[name])


@torch.no_grad()
def hear_as(mllm: MLLM, other: str) -> None:
    """Take the projector and the audio delimiters of a graft that was trained before."""
    heard, linear = taken(other), mllm.model.model.audio_tower.proj
    linear.weight.copy_(heard["model.multi_modal_projector.linear.weight"])
    linear.bias.copy_(heard["model.multi_modal_projector.linear.bias"])
    theirs = grafts.parts.tokenizer(**grafts.AUDIO_TOKENS).get_vocab()
    for token in ("<|audio_bos|>", "<|audio_eos|>"):
        row = heard[f"embedding.{theirs[token]}"]
        mllm.model.get_input_embeddings().weight[mllm.tokenizer.get_vocab()[token]] = row.float()


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


def prepare(mllm: MLLM, rank: int, adapted: Sequence[str], seed: int) -> list[int]:
    """Set free what learns, draw it anew, and return the delimiters' token ids."""
    model = mllm.model
    torch.manual_seed(seed)
    for layer in mllm.layers if rank else ():
        for name in adapted:
            place, _, last = name.rpartition(".")
            module = layer.get_submodule(place)
            setattr(module, last, Adapted(getattr(module, last), rank))
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
    """Cross-entropy of the supervised tokens; only their positions pass the output layer."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = model.model(**inputs, use_cache=False).last_hidden_state
    wanted = batch["labels"][:, 1:] != IGNORED
    logits = model.lm_head(states[:, :-1][wanted]).float()
    return functional.cross_entropy(logits, batch["labels"][:, 1:][wanted])


def trained(
    model: nn.Module, delimiters: Sequence[int], tower: bool = False
) -> dict[str, torch.Tensor]:
    """What a graft file holds, float16: see `grafts.graft`; with the vision tower if it is new."""
    embeddings = model.get_input_embeddings().weight
    found = {n: w.detach() for n, w in model.named_parameters()
             if w.requires_grad or tower and n.startswith(TOWER)}  # fmt: skip
    moved = found.pop("delimiters")
    found |= {f"embedding.{t}": embeddings[t] + moved[i] for i, t in enumerate(delimiters)}
    return {name: weight.half().contiguous().cpu() for name, weight in found.items()}


@torch.no_grad()
def held_out(mllm: MLLM, names: Sequence[str], limit: int) -> dict[str, float]:
    """Usual figure of each benchmark's first rows; captions also by what they say."""
    scores = {}
    for name in names:
        bench, answers = benchmark(name, BENCHMARKS, limit=limit), []
        for i in range(0, limit, 24):
            answers += mllm.generate(mllm.encode(bench[i : i + 24]), 16)
        scores[name] = float(bench.corpus_score(answers))
        tqdm.write(f"{name}: {list(zip(answers, bench.references, strict=True))[:4]}")
        if name == "coco_caption":
            scores["caption facts"] = float(
                np.mean([*map(caption_right, answers, bench.references)])
            )
    return scores


def main() -> None:
    """Train one model's graft and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help="of adapters; default: the recipe's")
    parser.add_argument("--steps", type=int, help="of the last phase; default: the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, default=24, help="test rows in a report; 0: none")
    parser.add_argument("--runs", type=Path, default=grafts.parts.ROOT / "runs/train")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {k: v for k in ("rank", "steps") if (v := getattr(args, k)) is not None}
    recipe = replace(RECIPES[args.model], **given)
    name = f"{args.model}-{args.seed}-rank{recipe.rank}"
    how = {"folder": args.runs, "seed": args.seed, "device": args.device}
    mllm = MLLM(*grafts.untrained(args.model), args.model)
    mllm.model.to(args.device)
    if recipe.sees:
        see_as(mllm, recipe.sees)
    seen = f"{args.model}-{args.seed}"
    spent = teach_to_see(mllm, recipe, seen, how) if recipe.align else 0.0
    if recipe.hears:
        hear_as(mllm, recipe.hears)
    delimiters = prepare(mllm, recipe.rank, recipe.adapted, args.seed)
    made, shares = tasks(list(recipe.mix)), list(recipe.mix.values())

    def batch_at(step: int, rng: np.random.Generator) -> tuple[str, dict]:
        task = str(rng.choice(list(recipe.mix), p=shares))
        return task, batch_of(mllm, *made[task](rng))

    benchmarks = [task for task in recipe.mix if task in REGISTRY]
    spent += train(
        mllm.model, batch_at, steps=recipe.steps, lr=recipe.lr, name=name, loss_of=loss_of,
        report=(lambda step: held_out(mllm, benchmarks, args.limit)) if args.limit else None,
        report_every=100, save_every=50, **how,
    )  # fmt: skip
    other = f"-seed{args.seed}" if args.seed else ""
    out = args.out or grafts.MODELS / f"{args.model}{other}" / grafts.GRAFT
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained(mllm.model, delimiters, bool(recipe.tower or recipe.sees)), out)
    print(f"{grafts.parts.shown(out)}: trained in {spent:.0f} s")


if __name__ == "__main__":
    main()
