"""Stage 1, modality separation: which prompt tokens belong to which set (paper section 3.1)."""

from __future__ import annotations

import pandas as pd
import torch

from minerlib.model import KINDS, MLLM

SETS = ("text", "special", "special_text", "image", "video", "audio", "prompt")
"""The seven token sets, in the order of the scores' `modality` coordinate."""

BASE_SETS = KINDS
"""The five disjoint sets the others are unions of."""

UNIONS = {"special_text": ("special", "text"), "prompt": BASE_SETS}

SPLITS = {
    "prompt": ("prompt",),
    "special_text_as_one": ("special_text", "image", "video", "audio"),
    "special_text_separate": ("text", "special", "image", "video", "audio"),
}
"""How the prompt is cut into the modalities that neurons are selected for (stage 4)."""


def separate(mllm: MLLM, batch) -> dict[str, torch.Tensor]:
    """Token sets of encoded prompts: {set name: bool [batch, token]}, in the order of SETS.

    The base sets text, special, image, video and audio partition each prompt; special_text and
    prompt are unions. Padding belongs to no set. A set that does not occur is all False.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    sets = {k: torch.isin(ids, ids.new_tensor(of)) & real for k, of in mllm.token_ids.items()}
    other = sets["special"] | sets["image"] | sets["video"] | sets["audio"]
    sets["text"] = real & ~other
    sets["special_text"] = sets["special"] | sets["text"]
    sets["prompt"] = real
    return {name: sets[name] for name in SETS}


def so_far(given) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the tokens that a forward pass is given, and which of those so far are real.

    given: the pass's arguments. Generation leaves a mask out that hides nothing; then what is
    cached counts: [batch, new token] and [batch, token].
    """
    ids, mask, past = (given.get(k) for k in ("input_ids", "attention_mask", "past_key_values"))
    if mask is None:
        length = ids.shape[1] + (0 if past is None else past.get_seq_length())
        mask = ids.new_ones(len(ids), length)
    return ids, mask


def separate_new(mllm: MLLM, given) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The sets of the tokens that a forward pass is given, their ids, and what is real `so_far`."""
    ids, mask = so_far(given)
    sets = separate(mllm, {"input_ids": ids, "attention_mask": mask[:, -ids.shape[1] :]})
    return sets, ids, mask


def kinds_of(sets: dict[str, torch.Tensor]) -> list[str]:
    """The base set of every token of one prompt, without padding."""
    return [next(k for k in BASE_SETS if sets[k][0, i]) for i in range(sets["prompt"].shape[1])]


def stack(sets: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sets as one mask, bool [batch, set, token], in the order of SETS."""
    return torch.stack([sets[name] for name in SETS], dim=1)


def token_table(mllm: MLLM, sample) -> pd.DataFrame:
    """A prompt's tokens, as text, and the kind of each: columns token, kind."""
    batch = mllm.encode([sample])
    sets = separate(mllm, batch)
    text = [mllm.tokenizer.decode([i]) for i in batch["input_ids"][0].tolist()]
    return pd.DataFrame({"token": text, "kind": kinds_of(sets)})
