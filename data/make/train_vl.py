"""Make data/models/tiny-qwen2-vl: a small Qwen2-VL trained from scratch on the four benchmarks.

    python -m data.make.train_vl                 # the whole recipe; resumes where it stopped
    python -m data.make.train_vl --random        # the same model, untrained
    python -m data.make.train_vl --last         # the last phase alone, from the saved model
    python -m data.make.train_vl --evaluate      # score the saved model on the test rows

Three phases. First the vision tower is taught directly what each cell of a picture shows, as real
towers come pretrained. Then the tower rests and the language model learns to answer, the letters of
four-choice questions among it, and last to look things up by their colour. Test scenes and test
choice lists are kept out of all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from minerlib.model import MLLM, load
from minerlib.tasks import REGISTRY, benchmark

from . import knowledge, vision
from .grafts import PATCH, eyes
from .training import Pieces, Row, Task, chat, collate, encode, initialise, train

ROOT = Path(__file__).parents[2]
MODEL, BENCHMARKS = ROOT / "data/models/tiny-qwen2-vl", ROOT / "data/benchmarks"
RUNS = ROOT / "runs/train"
BATCH, HIDDEN = 64, 192
# Rows of a step of each task: the longer the row, and the more answers in it, the fewer.
ROWS = {"text_vqa": 32, "crowd": 32, "coco_caption": 64, "msvd_qa": 28, "open": 64, "one_list": 64,
        "few_shot": 32}  # fmt: skip
MERGE = 2
SPECIAL = """
<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|>
""".split()  # noqa: SIM905
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""


def prompt(name: str, **fields: str) -> str:
    """A benchmark's prompt as minerlib asks it."""
    return REGISTRY[name].prompt.format_map(fields)


def corpus() -> list[str]:
    """Text in which every word of the four benchmarks occurs often enough to be one token."""
    rng, texts, facts = np.random.default_rng(7), [], knowledge.Questions()
    for _ in range(300):
        scene, moving = vision.sign_scene(rng), vision.clip_scene(rng)
        asked = [("text_vqa", q) for q in vision.sign_questions(scene, rng)]
        asked += [("msvd_qa", q) for q in vision.clip_questions(moving, rng)]
        texts += [f"{prompt(name, question=q.text)}\n{q.answer}" for name, q in asked]
        texts += [prompt("coco_caption"), *vision.captions(vision.pair_scene(rng))]
        texts += [text + letter for text, letter in facts.few_shot(rng)]
        texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    answers = [*vision.WORDS, *vision.COLOURS, *vision.SHAPES, *vision.MOTIONS, *vision.COUNTS]
    answers += [fact.answer for fact in knowledge.FACTS]
    return texts + [f"{space}{answer}" for answer in answers for space in ("", " ")] * 5


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of the Qwen2 class, of the benchmarks' words."""
    blank = Qwen2Tokenizer().backend_tokenizer
    blank.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        min_frequency=4,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    blank.train_from_iterator(corpus(), trainer)
    learnt = json.loads(blank.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        model_max_length=2048,
    )
    tokenizer.padding_side = "left"
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """The real processor class, with patches of 4 pixels; larger pictures are scaled down."""
    return Qwen2VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **eyes())


def build_model(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """An untrained model: 8 decoder layers of 512 neurons, 6 heads on 2 key-value heads."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2VLConfig(
        text_config={
            # A multiple of 64 leaves a few rows without a token.
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            # Halves of the 32 dimensions of a head, for time, height and width.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "num_heads": 4,
            "mlp_ratio": 3,
            "hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config).float()
    initialise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=False,
    )
    return model


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> None:
    """Write model and processor as a hub checkpoint would be."""
    processor.tokenizer.backend_tokenizer.no_padding()  # a report leaves its last batch's length
    model.to("cpu").save_pretrained(MODEL)
    processor.save_pretrained(MODEL)


class Eye:
    """Pictures and clips as the model's media inputs, the processor's own way."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        names = ("<|vision_start|>", "<|vision_end|>")
        self.start, self.end = tokenizer.convert_tokens_to_ids(list(names))
        self.pads = {"image": processor.image_token_id, "video": processor.video_token_id}

    def see(self, pixels: np.ndarray) -> tuple[str, dict[str, torch.Tensor]]:
        """Pixels [picture, frame, height, width, channel] to (kind, patches and grids)."""
        frames = torch.from_numpy(pixels).movedim(-1, 2)
        if pixels.shape[1] > 1:
            kind, seen = "video", self.processor.video_processor(list(frames), return_tensors="pt")
        else:
            kind, pictures = "image", list(frames[:, 0])
            seen = self.processor.image_processor(pictures, return_tensors="pt")
        return kind, dict(seen)

    def rows(self, pixels: np.ndarray, turns: Sequence[list[tuple[str, str]]]) -> list[Row]:
        """Chat rows about pictures or clips: (prompt, answer) turns for each of them."""
        kind, seen = self.see(pixels)
        patches, grids = seen.values()
        patches, rows = patches.view(len(pixels), -1, patches.shape[-1]), []
        hole = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
        count = patches.shape[1] // MERGE**2
        for i, turn in enumerate(turns):
            ids, labels = encode(self.processor.tokenizer, chat(turn, hole))
            at = ids.index(self.pads[kind])
            ids[at : at + 1] = [self.pads[kind]] * count
            labels[at : at + 1] = [-100] * count
            names = ("pixel_values", "image_grid_thw")
            if kind == "video":
                names = ("pixel_values_videos", "video_grid_thw")
            media = dict(zip(names, (patches[i], grids[i : i + 1]), strict=True))
            rows.append(Row(ids, labels, media))
        return rows


# --- phase 1: the vision tower -------------------------------------------------------------------


class Pupil(nn.Module):
    """The vision tower with one linear reader per kind of fact about a cell."""

    def __init__(self, tower: nn.Module, width: int = HIDDEN) -> None:
        super().__init__()
        self.tower = tower
        self.readers = nn.ModuleDict({k: nn.Linear(width, n) for k, n in vision.HEADS.items()})

    def read(self, patches: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [cell, class] of every head."""
        cells = self.tower(patches, grid_thw=grids).pooler_output
        return {head: reader(cells) for head, reader in self.readers.items()}


def reading_loss(pupil: Pupil, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the readers, each averaged over the cells it speaks of."""
    logits = pupil.read(batch["patches"], batch["grids"])
    known = {head: batch[head] for head in logits if (batch[head] >= 0).any()}
    return sum(F.cross_entropy(logits[head].float(), known[head]) for head in known)


def reading_batch(eye: Eye, name: str, scenes: Sequence[vision.Scene]) -> dict[str, torch.Tensor]:
    """Patches and targets of some scenes of a benchmark."""
    size = (vision.CLIP_SIDE, vision.FRAMES) if name == "msvd_qa" else (vision.SIDE, 1)
    _, seen = eye.see(np.stack([vision.render(scene, *size) for scene in scenes]))
    patches, grids = seen.values()
    told = [vision.targets(scene, *size) for scene in scenes]
    heads = {h: torch.from_numpy(np.concatenate([t[h] for t in told])) for h in vision.HEADS}
    return {"patches": patches, "grids": grids, **heads}


MAKERS = {
    "text_vqa": vision.sign_scene,
    "coco_caption": vision.pair_scene,
    "msvd_qa": vision.clip_scene,
    "crowd": vision.crowd_scene,
}


def teach_tower(model, eye: Eye, args: argparse.Namespace) -> float:
    """Phase 1; returns seconds spent."""
    pupil = Pupil(model.model.visual)
    initialise(pupil.readers, 1)
    held_out, names = vision.held_out(), ["text_vqa", "coco_caption", "msvd_qa"]

    def batch_at(step: int, rng: np.random.Generator):
        # Reading takes longest, so it gets two thirds of the steps.
        name = names[rng.choice(3, p=[0.66, 0.12, 0.22])]
        scenes = [vision.fresh(MAKERS[name], rng, held_out) for _ in range(BATCH)]
        return name, reading_batch(eye, name, scenes)

    @torch.no_grad()
    def report(step: int) -> dict[str, float]:
        right = {}
        for name, scenes in vision.test_scenes().items():
            batch = reading_batch(eye, name, scenes[: args.limit])
            batch = {key: value.to(args.device) for key, value in batch.items()}
            for head, logits in pupil.read(batch["patches"], batch["grids"]).items():
                if (known := batch[head] >= 0).any():
                    hits = (logits.argmax(-1) == batch[head])[known]
                    right[f"{name} {head}"] = hits.float().mean().item()
            # The cells that show a thing: what the language model can hope to name.
            shown = batch["what"] > 0
            named = pupil.read(batch["patches"], batch["grids"])["what"].argmax(-1)
            right[f"{name} things"] = (named == batch["what"])[shown].float().mean().item()
        return right

    return train(
        pupil, batch_at, steps=args.tower_steps, lr=1.5e-3, folder=args.runs, name="vl-tower",
        device=args.device, loss_of=reading_loss, report=report,
        report_every=args.report_every, seconds=args.seconds, stop_at=args.stop_at,
    )  # fmt: skip


# --- phase 2: the language model -----------------------------------------------------------------


def asked(name: str, questions_of: Callable) -> Callable:
    """A benchmark's questions on a scene as turns (prompt, answer)."""
    return lambda scene, rng: [
        (prompt(name, question=q.text), q.answer) for q in questions_of(scene, rng)
    ]


def caption(scene: vision.Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One caption; the first wording is the commonest, so the greedy answer is sure of its way."""
    wording = vision.captions(scene)[rng.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
    return [(prompt("coco_caption"), wording)]


def make_tasks(eye: Eye) -> dict[str, Task]:
    """What the language model practises; every task returns the rows of one batch."""
    tokenizer, held_out, facts = eye.processor.tokenizer, vision.held_out(), knowledge.Questions()

    def about(name: str, turns_of, questions: int) -> Task:
        size = (vision.CLIP_SIDE, vision.FRAMES) if name == "msvd_qa" else (vision.SIDE, 1)

        def task(rng: np.random.Generator) -> list[Row]:
            scenes = [vision.fresh(MAKERS[name], rng, held_out) for _ in range(ROWS[name])]
            pixels = np.stack([vision.render(scene, *size) for scene in scenes])
            return eye.rows(pixels, [turns_of(scene, rng)[:questions] for scene in scenes])

        return task

    def by_colour(name: str, questions_of):
        """The shape of every colour, then questions that name a colour."""

        def turns(scene: vision.Scene, rng: np.random.Generator) -> list[tuple[str, str | Pieces]]:
            shapes = [t for t in scene.things if t.kind == "shape"]
            told = [("Shapes:", False)]
            for i in rng.permutation(len(shapes)):
                told += [(f" {shapes[i].colour}", False), (f" {shapes[i].value}", True)]
            questions = [
                (prompt(name, question=q.text), q.answer)
                for q in questions_of(scene, rng)
                if {*q.text.strip("?").split()} & {*vision.COLOURS}
            ]
            return [("Name the shape of each color.", told), *questions]

        return turns

    def letters(parts: list[tuple[str, str]]) -> Row:
        """A prompt whose earlier items' letters are learnt as well as the answer."""
        pieces = [piece for text, letter in parts[:-1] for piece in ((text, False), (letter, True))]
        (head, _), *tail = chat([("\0", parts[-1][1])])[1:]
        before, after = head.split("\0")
        opening = chat([])[0]
        pieces = [opening, (before, False), *pieces, (parts[-1][0] + after, False), *tail]
        return Row(*encode(tokenizer, pieces))

    def open_question(rng: np.random.Generator) -> Row:
        turns = [facts.open(rng) for _ in range(4)]
        if rng.random() < 0.5:
            return Row(*encode(tokenizer, chat(turns)))
        parts = [(f"\n\n{question}\nAnswer:", f" {answer}") for question, answer in turns[:-1]]
        question, answer = turns[-1]
        return letters([(parts[0][0].strip(), parts[0][1]), *parts[1:],
                        (f"\n\n{question}\nAnswer:", answer)])  # fmt: skip

    return {
        "text_vqa": about("text_vqa", asked("text_vqa", vision.sign_questions), 5),
        "coco_caption": about("coco_caption", caption, 1),
        "msvd_qa": about("msvd_qa", asked("msvd_qa", vision.clip_questions), 5),
        "crowd": about("crowd", by_colour("text_vqa", vision.sign_questions), 4),
        "colour_clips": about("msvd_qa", by_colour("msvd_qa", vision.clip_questions), 5),
        "open": lambda rng: [open_question(rng) for _ in range(ROWS["open"])],
        "one_list": lambda rng: [letters(facts.one_list(rng)) for _ in range(ROWS["one_list"])],
        "few_shot": lambda rng: [letters(facts.few_shot(rng)) for _ in range(ROWS["few_shot"])],
    }


# Four-choice questions come first and most: finding the option and naming its letter is a skill
# that stays at chance for hundreds of steps and then appears at once.
EARLY = {"text_vqa": 0.09, "coco_caption": 0.07, "msvd_qa": 0.09, "open": 0.1, "one_list": 0.3,
         "few_shot": 0.35}  # fmt: skip
LATE = {"text_vqa": 0.37, "coco_caption": 0.05, "msvd_qa": 0.52, "open": 0.01, "one_list": 0.01,
        "few_shot": 0.04}  # fmt: skip
# Last, what is learnt slowest: to ask by a colour, not for it ("what shape is red?"). Pictures of
# four shapes, where guessing among them does not pay, and answers that follow the colour at once.
COLOUR = {"crowd": 0.36, "colour_clips": 0.26, "text_vqa": 0.13, "msvd_qa": 0.13,
          "coco_caption": 0.05, "open": 0.01, "one_list": 0.01, "few_shot": 0.05}  # fmt: skip


def teach_model(model, eye: Eye, args: argparse.Namespace) -> float:
    """Phase 2, all tasks; returns seconds spent."""
    early = round(0.45 * args.steps)
    return _teach(model, eye, args, "vl-model", args.steps, 1.2e-3, 1,
                  lambda step: EARLY if step < early else LATE)  # fmt: skip


def teach_colour(model, eye: Eye, args: argparse.Namespace) -> float:
    """Phase 3, looking things up by their colour; returns seconds spent."""
    return _teach(model, eye, args, "vl-colour", args.colour_steps, 8e-4, 2, lambda step: COLOUR)


def _teach(model, eye: Eye, args, name: str, steps: int, lr: float, seed: int, mix_at) -> float:
    """Train the language model, the tower at rest, on the tasks of mix_at(step)."""
    tasks, processor = make_tasks(eye), eye.processor
    model.model.visual.requires_grad_(False)
    pad = processor.tokenizer.pad_token_id

    def batch_at(step: int, rng: np.random.Generator):
        mix = mix_at(step)
        task = list(mix)[rng.choice(len(mix), p=list(mix.values()))]
        batch = collate(tasks[task](rng), pad)
        kinds = torch.zeros_like(batch["input_ids"])
        kinds[batch["input_ids"] == eye.pads["image"]] = 1
        kinds[batch["input_ids"] == eye.pads["video"]] = 2
        return task, batch | {"mm_token_type_ids": kinds}

    return train(
        model, batch_at, steps=steps, lr=lr, folder=args.runs, name=name, seed=seed,
        device=args.device,
        loss_of=lambda model, batch: model(**batch, use_cache=False).loss,
        report=lambda step: held_out_scores(model, processor, args.limit),
        report_every=args.report_every, seconds=args.seconds, stop_at=args.stop_at,
    )  # fmt: skip


def caption_right(caption: str, references: Sequence[str]) -> float:
    """1 if both objects, their colours and their relation are those of the references."""
    told = vision.caption_facts(caption)
    return float(told is not None and told == vision.caption_facts(references[0]))


@torch.no_grad()
def held_out_scores(
    model: nn.Module, processor: Qwen2VLProcessor, limit: int | None = None, batch: int = 60
) -> dict[str, float]:
    """Mean score of each benchmark's first rows; captions also by what they say."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    mllm, scores = MLLM(model, processor, "tiny-qwen2-vl"), {}
    for name in ("text_vqa", "coco_caption", "mmlu", "msvd_qa"):
        bench, answers = benchmark(name, BENCHMARKS, limit=limit), []
        for at in range(0, len(bench), batch):
            samples = list(bench[at : at + batch])
            inputs = mllm.encode(samples)
            if samples[0].choices:
                answers += mllm.choose(inputs, samples[0].choices)
            else:
                answers += mllm.generate(inputs, bench.max_new_tokens)
        scores[name] = float(np.mean(bench.score(answers)))
        if name == "coco_caption":
            told = map(caption_right, answers, bench.references)
            scores["caption facts"] = float(np.mean(list(told)))
    for weight in trained:
        weight.requires_grad_(True)
    return scores


def main() -> None:
    """Run the recipe, or the part that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tower-steps", type=int, default=2800)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--colour-steps", type=int, default=700)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--limit", type=int, default=120, help="test rows in a report")
    parser.add_argument("--seconds", type=float, help="stop a phase after so long, to resume later")
    parser.add_argument("--stop-at", type=int, help="stop a phase at this step, to resume later")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--random", action="store_true", help="save the untrained model and end")
    parser.add_argument("--last", action="store_true", help="only phase 3, from the saved model")
    parser.add_argument("--evaluate", action="store_true", help="score the saved model and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        processor = build_processor(build_tokenizer())
        model = build_model(processor.tokenizer)
        if not args.random:
            eye, seconds = Eye(processor), 0.0
            if args.last:
                model.load_state_dict(load(MODEL, device="cpu").model.state_dict())
            else:
                seconds = teach_tower(model, eye, args) + teach_model(model, eye, args)
            seconds += teach_colour(model, eye, args)
            print(f"trained in {seconds:.0f} s on {args.device}")
        save(model, processor)
    mllm = load(MODEL, device=args.device)
    size = sum(weight.numel() for weight in mllm.model.parameters())
    limit = args.limit if args.random else None
    print(f"{MODEL.relative_to(ROOT)}: {size / 1e6:.2f} M parameters")
    for name, value in held_out_scores(mllm.model, mllm.processor, limit).items():
        print(f"{name:14} {value:.3f}")


if __name__ == "__main__":
    main()
