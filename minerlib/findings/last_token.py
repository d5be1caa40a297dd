"""What reaches the last prompt token, from which the answer is read (paper finding III).

Attention and saliency by source set, attention knockout and the logit lens, each per sample and
of one answer token, chosen before anything is silenced, so that conditions compare in pairs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.findings.attention import visible
from minerlib.model import MLLM
from minerlib.separation import separate

_CLAIMS = {
    "attention": "the last token's attention to {}",
    "saliency": "the saliency that reaches it from {}",
    "knockout": "what cutting it off from {} costs the answer",
    "lens": "how well the answer can be read along the layers",
}
MEASURES = tuple(_CLAIMS)
_BY = ["measure", "layer", "set"]


def answer_tokens(
    mllm: MLLM, bench, target: str = "reference", *, batch_size: int = 8
) -> np.ndarray:
    """The token id that answers each sample, int [sample]: what the other functions follow.

    target "reference": the first token of the most frequent reference; "model": the model's own
    first answer token, to be taken outside `deactivate`.
    """
    if target == "reference":
        common = [Counter(sample.references).most_common(1)[0][0] for sample in bench]
        ids = [mllm.tokenizer.encode(text, add_special_tokens=False) for text in common]
        if empty := [i for i, id_ in enumerate(ids) if not id_]:
            raise ValueError(f"samples {empty[:5]} have an empty reference; use target='model'")
        return np.array([id_[0] for id_ in ids])
    if target != "model":
        raise ValueError(f"unknown target {target!r}; use reference or model")
    with torch.inference_mode():
        batches = mllm.batches(bench, batch_size, "answers")
        logits = (mllm.forward(batch).logits[:, -1] for _, batch in batches)
        return np.concatenate([x.argmax(-1).cpu().numpy() for x in logits])


def _wanted(mllm: MLLM, bench, answers: np.ndarray | None) -> Tensor:
    answers = answer_tokens(mllm, bench) if answers is None else np.asarray(answers)
    if answers.shape != (n := len(bench),):
        way_out = f"there are {n} samples; take it from answer_tokens(mllm, bench)"
        raise ValueError(f"answers has shape {answers.shape}, but {way_out}")
    return torch.from_numpy(answers)


def _sources(mllm: MLLM, batch) -> tuple[list[str], Tensor]:
    """Names and members of the last token's sources, bool [batch, source, token].

    The base sets without the last token, and that token by itself (`last`).
    """
    base = separate(mllm, batch)
    sets = torch.stack([base[k] for k in mllm.kinds] + [base["prompt"]], 1)
    sets[:, :-1, -1] = False
    sets[:, -1, :-1] = False
    return [*mllm.kinds, "last"], sets


def _log_p(logits: Tensor, answers: Tensor) -> Tensor:
    """Log-probability of each prompt's answer token at its last position, [batch] float32."""
    log_p = logits[:, -1].float().log_softmax(-1)
    return log_p.gather(1, answers.to(log_p.device)[:, None])[:, 0]


def _last_step(mllm: MLLM, batch, answers: Tensor) -> tuple[Tensor, Callable]:
    """The answers' log-probability, and a function that recomputes it for the last token alone.

    It runs over the cached keys and values of the tokens before, which nothing done to the last
    token can change.
    """
    settings = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "use_cache": True}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    settings |= {"pad_token_id": mllm.tokenizer.pad_token_id}
    out = mllm.model.generate(**batch, **settings)  # generate knows every family's positions
    cache, before = out.past_key_values, _log_p(out.logits[0][:, None], answers)
    settings |= {key: batch[key] for key in ("input_ids", "attention_mask")}

    def step() -> Tensor:
        cache.crop(-1)
        done = mllm.model.generate(past_key_values=cache, **settings)
        return _log_p(done.logits[0][:, None], answers)

    if (step() - before).abs().max() > (0.3 if torch.finfo(mllm.model.dtype).eps > 1e-5 else 1e-3):
        raise RuntimeError(
            f"{mllm.name}: the last token's logits over cached keys differ from those of the whole "
            "prompt; call with cache=False"
        )
    return before, step


def _bias(mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as additive, [batch, 1 or head, query, key]; no row is all -inf, so none is NaN."""
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask.expand(len(seen), *mask.shape[1:])
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, lowest)[:, None]


def _needs_dense_masks(mllm: MLLM) -> None:
    kind = mllm.text_config._attn_implementation
    if "flash" in kind or "flex" in kind:
        raise ValueError(
            f"{mllm.name} runs {kind}, whose kernel takes no dense mask, and this changes single "
            "entries of it; load it with attn_implementation='sdpa'"
        )


def last_row(query: Tensor, key: Tensor, seen: Tensor, scaling: float | None = None) -> Tensor:
    """The last token's attention per head, [batch, head, key] float32; seen bool [batch, key]."""
    q = query[:, :, -1].float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    q = q.view(len(q), key.shape[1], -1, q.shape[-1])  # [batch, kv head, group, dim]
    logits = (q @ key.float().transpose(-1, -2)).flatten(1, 2)
    return logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


def last_token_flow(
    mllm: MLLM, bench, answers: np.ndarray | None = None, *, batch_size: int = 8
) -> pd.DataFrame:
    """What the last prompt token draws from each source set, by layer and sample (finding III).

    answers int [sample] from `answer_tokens` (default: the references). Saliency is Wang et al.'s
    (2023) |sum over heads of A dL/dA| with A the last token's attention to one source token and L
    the answer's negative log-probability, summed over the set's tokens. It comes from one backward
    pass through the model's own kernel: a zero added to the last row of the additive mask yields
    A (dL/dA - c) summed over heads, where c, the last token's mean of dL/dA under A, equals the
    head's output times its gradient, read at the output projection. No attention matrix is kept,
    only the activations that a backward pass needs: use a small batch.

    Columns sample, layer, set (the base sets without the last token, and `last`, the token
    itself), tokens (in the set), attention (head-averaged; sums to 1 over the sets), uniform (the
    same if attention were uniform over the tokens seen), saliency.
    """
    wanted = _wanted(mllm, bench, answers)
    _needs_dense_masks(mllm)
    parts = []
    for first, batch in mllm.batches(bench, batch_size, "last token"):
        names, sets = _sources(mllm, batch)
        real = sets.any(1)
        found: dict[str, dict[int, Tensor]] = defaultdict(dict)

        def attend(layer, query, key, mask, scaling, real=real, found=found):
            seen = visible(mask, real.to(query.device))
            found["row"][layer] = last_row(query, key, seen[:, -1], scaling).detach()
            found["seen"][layer] = seen[:, -1].float()
            bias = _bias(mask, seen, query.dtype)
            found["gate"][layer] = gate = bias.new_zeros(seen[:, -1].shape, requires_grad=True)
            return torch.cat([bias[:, :, :-1], bias[:, :, -1:] + gate[:, None, None]], 2)

        with ExitStack() as stack:
            for i, output in enumerate(map(mllm.family.output_projection, mllm.layers)):

                def keep(module, args, i=i, found=found):
                    found["heads"][i] = args[0]

                stack.callback(output.register_forward_pre_hook(keep).remove)
            stack.enter_context(mllm.tap(attention=attend))
            stack.enter_context(torch.enable_grad())
            log_p = _log_p(mllm.forward(batch).logits, wanted[first : first + len(real)])
            slope = _saliency(-log_p.sum(), found)

        for i, row in found["row"].items():
            members, seen = sets.to(row.device).float(), found["seen"][i]
            columns = torch.stack([row.mean(1), seen / seen.sum(1, keepdim=True), slope[i]])
            per_set = torch.einsum("cbn,bsn->bsc", columns, members).cpu().numpy()
            count = members.sum(-1).int().cpu().numpy()
            for b, s in np.argwhere(count):
                parts.append((first + b, i, names[s], count[b, s], *per_set[b, s]))
    named = ["sample", "layer", "set", "tokens", "attention", "uniform", "saliency"]
    return pd.DataFrame(parts, columns=named)


def _saliency(loss: Tensor, found: dict) -> dict[int, Tensor]:
    """|sum over heads of A dL/dA| of the last token, [batch, token] float32 by layer."""
    n, slopes = len(found["gate"]), {}
    grads = torch.autograd.grad(loss, [found[k][i] for k in ("gate", "heads") for i in range(n)])
    for layer, (gate, slope) in enumerate(zip(grads[:n], grads[n:], strict=True)):
        a, last = found["row"][layer], (found["heads"][layer].detach()[:, -1], slope[:, -1])
        heads, theirs = (x.float().view(*a.shape[:2], -1) for x in last)
        mean = (heads * theirs).sum(-1, keepdim=True)  # of dL/dA under A, [batch, head, 1]
        slopes[layer] = (gate.float() + (a * mean).sum(1)).abs()
    return slopes


def width(mllm: MLLM, window: int | None = None) -> int:
    """Layers in which attention is cut at a time: `window`, or a fifth of the layers."""
    window = max(1, round(mllm.n_layers / 5)) if window is None else window
    if not 1 <= window <= mllm.n_layers:
        raise ValueError(f"window={window}: give 1 to {mllm.n_layers} layers")
    return window


@torch.inference_mode()
def knockout(
    mllm: MLLM,
    bench,
    answers: np.ndarray | None = None,
    *,
    window: int | None = None,
    layers: Sequence[int] | None = None,
    cache: bool | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The answer's probability when the last token may not look at a set (Geva et al. 2023).

    For each set, and each centre in `layers` (default all), the last token's attention to the
    set's tokens, itself excepted, is cut in the `window` layers around it (default a fifth of the
    layers; an even number reaches further down); the softmax renormalises what is left. Each
    costs a step of the last token over cached keys and values, or with cache=False a forward pass
    of the prompt (the default for models with other than full attention, whose cache cannot step
    back).

    Columns sample, layer (the centre), set, probability (nothing cut), blocked (cut), loss
    (probability - blocked).
    """
    _needs_dense_masks(mllm)
    wanted, window, n = _wanted(mllm, bench, answers), width(mllm, window), mllm.n_layers
    if cache is None:
        cache = set(getattr(mllm.text_config, "layer_types", None) or ()) <= {"full_attention"}
    parts = []
    for first, batch in mllm.batches(bench, batch_size, "knockout"):
        names, members = _sources(mllm, batch)
        real, answer = members.any(1), wanted[first : first + len(members)]

        def whole(batch=batch, answer=answer):
            return _log_p(mllm.forward(batch).logits, answer)

        before, run = _last_step(mllm, batch, answer) if cache else (whole(), whole)
        for name, cut in zip(names[:-1], members.unbind(1), strict=False):
            held = cut.any(1).nonzero()[:, 0].tolist()

            def block(layer, query, key, mask, scaling, cut=cut, real=real):
                seen = visible(mask, real.to(query.device), query.shape[2])
                bias = _bias(mask, seen, query.dtype).clone()
                lowest = torch.finfo(bias.dtype).min
                bias[:, :, -1].masked_fill_(cut.to(bias.device)[:, None], lowest)
                return bias

            for centre in (range(n) if layers is None else layers) if held else ():
                low = centre - window // 2
                with mllm.tap(attention=block, layers=range(max(low, 0), min(low + window, n))):
                    after = run().exp()
                for b in held:
                    parts.append((first + b, centre, name, float(before[b].exp()), float(after[b])))
    table = pd.DataFrame(parts, columns=["sample", "layer", "set", "probability", "blocked"])
    return table.assign(loss=table["probability"] - table["blocked"])


def unembed(mllm: MLLM, hidden: Tensor) -> Tensor:
    """Logits float32 [..., vocabulary] of hidden states [..., hidden]: final norm, then lm_head.

    A model's own scaling or capping of its logits is left out.
    """
    norm, head = mllm.family.final_norm(), mllm.model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{mllm.name} has no output embeddings to read hidden states with")
    return head(norm(hidden.to(head.weight.device, head.weight.dtype))).float()


@torch.inference_mode()
def read(mllm: MLLM, hidden: np.ndarray, top: int = 1) -> list[list[str]]:
    """The `top` tokens that the logit lens reads in each hidden state [n, hidden], best first."""
    parts = torch.from_numpy(np.asarray(hidden, np.float32)).split(256)
    best = torch.cat([unembed(mllm, part).topk(top, -1)[1].cpu() for part in parts])
    return [[mllm.tokenizer.decode([i]) for i in row] for row in best.tolist()]


@torch.inference_mode()
def logit_lens(
    mllm: MLLM, bench, answers: np.ndarray | None = None, *, batch_size: int = 8
) -> pd.DataFrame:
    """How far the answer can be read at the last prompt token, by layer (the logit lens).

    Columns sample, layer (0 the embeddings, i after the i-th layer), probability and rank (0 the
    most probable token) of the answer token.
    """
    wanted, parts = _wanted(mllm, bench, answers), []
    for first, batch in mllm.batches(bench, batch_size, "logit lens"):
        answer = wanted[first : first + len(batch["input_ids"])]

        def lens(layer, h, first=first, answer=answer):
            logits = unembed(mllm, h[:, -1])
            rank = (logits > logits.gather(1, answer.to(logits.device)[:, None])).sum(1)
            p = _log_p(logits[:, None], answer).exp()
            parts.extend((first + b, layer, float(p[b]), int(rank[b])) for b in range(len(p)))

        with mllm.tap(hidden=lens):
            mllm.forward(batch)
    return pd.DataFrame(parts, columns=["sample", "layer", "probability", "rank"])


# --- the finding ---------------------------------------------------------------------------------


@computation(version=1)
def measures(
    mllm: MLLM, bench, answers: np.ndarray | None = None, *, window: int | None = None, batch_size=8
) -> pd.DataFrame:
    """The four measures as one table, in percent; windows of knockout lie side by side.

    Columns measure (one of MEASURES, or `uniform`, the attention's null), sample, layer, set,
    value: share of attention; share of the sample's whole saliency, over all layers and sets;
    probability of the answer lost by knockout (layer: the window's centre); and its probability
    in the logit lens (set `answer`; layer 0: the embeddings).
    """
    n, window = mllm.n_layers, width(mllm, window)
    flow = last_token_flow(mllm, bench, answers, batch_size=batch_size)
    flow["saliency"] /= flow.groupby("sample")["saliency"].transform("sum")
    centres = [min(i + window // 2, n - 1) for i in range(0, n, window)]  # so that all are cut
    cut = knockout(mllm, bench, answers, window=window, layers=centres, batch_size=batch_size)
    lens = logit_lens(mllm, bench, answers, batch_size=batch_size)
    keys = ["sample", "layer", "set"]
    parts = [
        flow.melt(keys, ["attention", "uniform", "saliency"], "measure"),
        cut.assign(measure="knockout", value=cut["loss"]),
        lens.assign(measure="lens", set="answer", value=lens["probability"]),
    ]
    table = pd.concat(parts, ignore_index=True)[["measure", *keys, "value"]]
    return table.assign(value=100 * table["value"])


def changes(before: pd.DataFrame, after: Mapping[Hashable, pd.DataFrame]) -> pd.DataFrame:
    """Tables of `measures` by condition, minus the one before; the condition is `silenced`."""
    tables = {name: inference.paired(before, table, "value", _BY) for name, table in after.items()}
    return pd.concat(tables, names=["silenced"]).reset_index("silenced").reset_index(drop=True)


def over_layers(table: pd.DataFrame) -> pd.Series:
    """One value for each measure, set and sample: the mean over layers, of saliency the sum.

    From a table of `measures` or `changes`; indexed by silenced (if there), measure, set, sample.
    """
    by = [name for name in ("silenced", "measure", "set", "sample") if name in table]
    value = table.groupby(by)["value"].agg(["mean", "sum"])
    shares = value.index.get_level_values("measure") == "saliency"
    return value["mean"].mask(shares, value["sum"]).rename("value")


def by_source(changed: pd.DataFrame, chance: pd.DataFrame) -> pd.DataFrame:
    """Mean change by measure and silenced modality, then `random` (rows) and source (columns)."""
    random = over_layers(chance).rename(lambda draw: "random", level="silenced")
    both = pd.concat([over_layers(changed), random])
    return both.groupby(["measure", "silenced", "set"]).mean().unstack("set")


def at_own_source(changed: pd.DataFrame, chance: pd.DataFrame) -> pd.DataFrame:
    """Each modality's change at its own source by layer, against the range of the random draws.

    changed and chance from `changes`, the former under the modalities' names. The lens has no
    source: its change is the answer's own. Columns silenced, measure, layer, set, value, low,
    high (95 % interval over samples), n, null (the draws' mean), null_low, null_high (their
    range), clear (by how much the interval lies beyond that range; negative: they overlap).
    """
    own = changed[changed["measure"].isin(MEASURES)]
    own = own[(own["set"] == own["silenced"]) | (own["set"] == "answer")]
    table = inference.mean_over_samples(own, "value", ["silenced", *_BY])
    draws = chance.pivot_table("value", _BY, "silenced")  # means over samples
    draws = draws.reindex(pd.MultiIndex.from_frame(table[_BY])).to_numpy().T
    least, most = draws.min(0), draws.max(0)
    clear = np.maximum(table["low"] - most, least - table["high"])
    return table.assign(null=draws.mean(0), null_low=least, null_high=most, clear=clear)


def claims(before: pd.DataFrame, changed: pd.DataFrame, chance: pd.DataFrame) -> pd.DataFrame:
    """The paper's claim, then a line for each modality's neurons and measure, over all layers.

    before from `measures`, changed and chance as in `at_own_source`; columns of `claims_table`.
    """
    start, change = over_layers(before), over_layers(changed)
    draws = over_layers(chance).groupby(["measure", "set", "silenced"]).mean()
    lines: list[dict] = []
    for modality, (measure, what) in product(changed["silenced"].unique(), _CLAIMS.items()):
        source = "answer" if measure == "lens" else modality
        values, null = change[modality, measure, source], draws[measure, source].to_numpy()
        size = inference.bootstrap(values)
        change_of = f"change {inference.spread(*size, '+', 1)}"
        line = {
            "claim": f"{modality} neurons change {what.format(modality)}",
            "measured": f"{start[measure, source].mean():z.1f} %, {change_of}",
            "null": f"random: {null.min():+z.1f} to {null.max():+z.1f}",
            "p": inference.rank_p(size.mean, null, "two-sided"),
            "verdict": inference.change_against_draws(*size, null, len(values), tolerance=0.1),
        }
        lines.append(line)
    verdicts = [line["verdict"] for line in lines]
    held = sum(verdict.word == inference.HOLDS for verdict in verdicts)
    whole = {
        "claim": "modality-specific neurons influence how key information of each modality "
        "reaches the last token",
        "measured": f"{held} of {len(lines)} lines hold",
        "null": "the lines below",
        "verdict": inference.majority(verdicts),
    }
    return inference.claims_table("III", [whole, *lines])
