"""What reaches the last prompt token, from which the answer is read (paper finding III).

Attention and saliency by source set, attention knockout and the logit lens, each per sample and
of one answer token, chosen before anything is silenced, so that conditions compare in pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minerlib import inference
from minerlib.answering import begun
from minerlib.artifacts import computation
from minerlib.findings.attention import dense_bias, needs_dense_masks, together
from minerlib.model import MLLM
from minerlib.scoring import visible
from minerlib.separation import separate

MEASURES = ("attention", "saliency", "knockout", "lens")
_BY = ["measure", "layer", "set"]


@torch.inference_mode()
def answer_tokens(mllm: MLLM, bench, target: str = "reference", *, batch_size=8) -> np.ndarray:
    """The token id that answers each sample, int [sample]: what the other functions follow.

    target "reference": the most frequent reference's first token; "model": the model's own first.
    """
    if target == "reference":
        texts = [sample.reference for sample in bench]
        # Every prompt ends as the chat template does, without one as it is asked.
        shown = bench[:1] if mllm.family.template else bench
        ends = [int(mllm.encode([sample])["input_ids"][0, -1]) for sample in shown]
        ids = [begun(mllm, end, text) if text else [] for end, text in zip(cycle(ends), texts)]
        if empty := [i for i, found in enumerate(ids) if not found]:
            raise ValueError(f"samples {empty[:5]} have an empty reference; use target='model'")
        return np.array([found[0] for found in ids])
    if target != "model":
        raise ValueError(f"unknown target {target!r}; use reference or model")
    batches = mllm.batches(bench, batch_size, "answers")
    logits = (mllm.forward(batch).logits[:, -1] for _, batch in batches)
    return np.concatenate([x.argmax(-1).cpu().numpy() for x in logits])


def _asked(mllm: MLLM, bench, answers, batch_size: int, what: str) -> Iterator[tuple]:
    """Batches with their first sample's number and their answer tokens (default: references)."""
    answers = answer_tokens(mllm, bench) if answers is None else np.asarray(answers)
    if answers.shape != (n := len(bench),):
        way_out = f"there are {n} samples; take it from answer_tokens(mllm, bench)"
        raise ValueError(f"answers has shape {answers.shape}, but {way_out}")
    for first, batch in mllm.batches(bench, batch_size, what):
        part = answers[first : first + len(batch["input_ids"])]
        yield first, batch, torch.from_numpy(part)


def _sources(mllm: MLLM, batch) -> tuple[list[str], Tensor]:
    """Names and members, bool [batch, source, token]: base sets without the last token, and it."""
    base = separate(mllm, batch)
    sets = torch.stack([base[k] for k in (*mllm.kinds, "prompt")], 1)
    sets[:, :-1, -1] = False
    sets[:, -1, :-1] = False
    return [*mllm.kinds, "last"], sets


def _log_p(logits: Tensor, answers: Tensor) -> Tensor:
    """Log-probability of each prompt's answer token at its last position, [batch] float32."""
    log_p = logits[:, -1].float().log_softmax(-1)
    return log_p.gather(1, answers.to(log_p.device)[:, None])[:, 0]


def _last_step(mllm: MLLM, batch, answers: Tensor) -> tuple[Tensor, Callable]:
    """The answers' log-probability, and a function that recomputes it for the last token alone."""
    # Over the cached keys and values of the tokens before, which what is done to it cannot change.
    settings = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "use_cache": True}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    settings["pad_token_id"] = mllm.tokenizer.pad_token_id
    out = mllm.model.generate(**batch, **settings)  # generate knows every family's positions
    cache, before = out.past_key_values, _log_p(out.logits[0][:, None], answers)
    settings |= {key: batch[key] for key in ("input_ids", "attention_mask")}

    def step() -> Tensor:
        cache.crop(-1)
        done = mllm.model.generate(past_key_values=cache, **settings)
        return _log_p(done.logits[0][:, None], answers)

    if (step() - before).abs().max() > (0.3 if torch.finfo(mllm.model.dtype).eps > 1e-5 else 1e-3):
        what = f"{mllm.name}: over cached keys the last token's logits differ"
        raise RuntimeError(f"{what} from those of the whole prompt; call with cache=False")
    return before, step


def last_row(query: Tensor, key: Tensor, seen: Tensor, scaling: float | None = None) -> Tensor:
    """The last token's attention per head, [batch, head, key] float32; seen bool [batch, key]."""
    q = query[:, :, -1].float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    q = q.view(len(q), key.shape[1], -1, q.shape[-1])  # [batch, kv head, group, dim]
    logits = (q @ key.float().transpose(-1, -2)).flatten(1, 2)
    return logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


@computation(version=1)
def last_token_flow(
    mllm: MLLM, bench, answers: np.ndarray | None = None, *, batch_size: int = 8
) -> pd.DataFrame:
    """What the last prompt token draws from each source set, by layer and sample (finding III).

    answers int [sample] from `answer_tokens` (default: the references). Saliency is Wang et al.'s
    (2023) |sum over heads of A dL/dA| with A the last token's attention to one source token and L
    the answer's negative log-probability, summed over the set's tokens. It comes from one backward
    pass through the model's own kernel: a zero added to the last row of the additive mask yields
    A (dL/dA - c) summed over heads, where c, the last token's mean of dL/dA under A, equals the
    head's output times its gradient, read at the output projection. Use a small batch.

    Columns sample, layer, set (the base sets without the last token, and `last`, itself), tokens
    (in the set), attention (mean over heads; 1 over all sets), uniform (were it so), saliency.
    """
    needs_dense_masks(mllm)
    parts = []
    for first, batch, answer in _asked(mllm, bench, answers, batch_size, "last token"):
        names, sets = _sources(mllm, batch)
        real = sets.any(1)
        found: dict[str, dict[int, Tensor]] = defaultdict(dict)

        def attend(layer, query, key, mask, scaling, real=real, found=found):
            seen = visible(mask, real.to(query.device))
            found["row"][layer] = last_row(query, key, seen[:, -1], scaling).detach()
            found["seen"][layer] = seen[:, -1].float()
            bias = dense_bias(mask, seen, query.dtype)
            query.requires_grad_()  # else a fused kernel keeps nothing for the mask's gradient
            found["gate"][layer] = gate = bias.new_zeros(seen[:, -1].shape, requires_grad=True)
            return torch.cat([bias[:, :, :-1], bias[:, :, -1:] + gate[:, None, None]], 2)

        with ExitStack() as stack:
            for i, output in enumerate(map(mllm.family.output_projection, mllm.layers)):

                def keep(module, args, i=i, found=found):
                    found["heads"][i] = args[0]

                stack.enter_context(output.register_forward_pre_hook(keep))
            stack.enter_context(mllm.tap(attention=attend))
            stack.enter_context(torch.enable_grad())
            slope = _saliency(-_log_p(mllm.forward(batch).logits, answer).sum(), found)

        drawn = []
        for i, row in found["row"].items():
            members, seen = sets.to(row.device).float(), found["seen"][i]
            columns = torch.stack([row.mean(1), seen / seen.sum(1, keepdim=True), slope[i]])
            drawn.append(torch.einsum("cbn,bsn->bsc", columns, members))
        count = sets.sum(-1).int().cpu().numpy()
        for i, per_set in zip(found["row"], together(drawn), strict=True):
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
    mllm: MLLM, bench, answers=None, *, window=None, layers=None, cache=None, batch_size=8
) -> pd.DataFrame:
    """The answer's probability when the last token may not look at a set (Geva et al. 2023).

    answers as in `last_token_flow`. For each set, and each centre in `layers` (default all), the
    last token's attention to the set's tokens, itself excepted, is cut in the `window` layers
    around it (default a fifth of them; an even number reaches further down); the softmax
    renormalises what is left. Each costs a step over cached keys and values, or with cache=False,
    the default where attention is not all full (such a cache cannot step back), a forward pass.
    Columns sample, layer (the centre), set, probability (nothing cut), blocked (cut), and loss.
    """
    needs_dense_masks(mllm)
    window, n, parts = width(mllm, window), mllm.n_layers, []
    if cache is None:
        cache = set(getattr(mllm.text_config, "layer_types", None) or ()) <= {"full_attention"}
    for first, batch, answer in _asked(mllm, bench, answers, batch_size, "knockout"):
        names, members = _sources(mllm, batch)
        real = members.any(1)

        def whole(batch=batch, answer=answer):
            return _log_p(mllm.forward(batch).logits, answer)

        before, run = _last_step(mllm, batch, answer) if cache else (whole(), whole)
        done, after, holds = [], [before.exp()], members.any(-1).cpu().numpy()
        for name, cut, has in zip(names[:-1], members.unbind(1), holds.T, strict=False):

            def block(layer, query, key, mask, scaling, cut=cut, real=real):
                seen = visible(mask, real.to(query.device), query.shape[2])
                bias = dense_bias(mask, seen, query.dtype).clone()
                lowest = torch.finfo(bias.dtype).min
                bias[:, :, -1].masked_fill_(cut.to(bias.device)[:, None], lowest)
                return bias

            for centre in (range(n) if layers is None else layers) if has.any() else ():
                low = centre - window // 2
                with mllm.tap(attention=block, layers=range(max(low, 0), min(low + window, n))):
                    after.append(run().exp())
                done.append((centre, name, np.flatnonzero(has)))
        p, *blocked = together(after)
        for (centre, name, held), cut_p in zip(done, blocked, strict=True):
            parts += [(first + b, centre, name, float(p[b]), float(cut_p[b])) for b in held]
    table = pd.DataFrame(parts, columns=["sample", "layer", "set", "probability", "blocked"])
    return table.assign(loss=table["probability"] - table["blocked"])


def unembed(mllm: MLLM, hidden: Tensor) -> Tensor:
    """Logits float32 [..., vocabulary] of hidden states [..., hidden]: final norm, then lm_head."""
    # A model's own scaling or capping of its logits is left out.
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

    Columns sample, layer (0: embeddings), probability (of the answer token).
    """
    parts: list[tuple] = []
    for first, batch, answer in _asked(mllm, bench, answers, batch_size, "logit lens"):
        read_at: dict[int, Tensor] = {}

        def lens(layer, h, answer=answer, read_at=read_at):
            read_at[layer] = _log_p(unembed(mllm, h[:, -1:]), answer).exp()

        with mllm.tap(hidden=lens):
            mllm.forward(batch)
        for layer, found in zip(read_at, together([*read_at.values()]).tolist(), strict=True):
            parts.extend((first + b, layer, p) for b, p in enumerate(found))
    return pd.DataFrame(parts, columns=["sample", "layer", "probability"])


@computation(version=2)
def measures(
    mllm: MLLM, bench, answers=None, *, samples=None, which=MEASURES, window=None, batch_size=8
) -> pd.DataFrame:
    """The measures (`which` of MEASURES) of the numbered samples (default: all) as one table.

    Columns measure (of MEASURES, or `uniform`, the attention of a token that looks everywhere
    alike), sample, layer, set, value: share of attention; saliency over the sample's in an average
    layer, of all sets; probability of the answer lost by knockout (layer: the centre of a window;
    windows lie side by side), and in the lens (set `answer`).
    """
    n, window = mllm.n_layers, width(mllm, window)
    at = np.arange(len(bench)) if samples is None else np.asarray(samples)
    answers = answer_tokens(mllm, bench) if answers is None else np.asarray(answers)
    asked = [bench[i] for i in at], answers[at]
    flow = last_token_flow(mllm, *asked, batch_size=batch_size)
    flow["saliency"] /= flow.groupby("sample")["saliency"].transform("sum") / n
    keys = ["sample", "layer", "set"]
    parts = [flow.melt(keys, [x for x in flow if x == "uniform" or x in which], "measure")]
    if "knockout" in which:
        centres = [i + window // 2 for i in range(0, n, window)]  # the last may lie beyond it
        cut = knockout(mllm, *asked, window=window, layers=centres, batch_size=batch_size)
        cut["layer"] = cut["layer"].clip(upper=n - 1)
        parts.append(cut.assign(measure="knockout", value=cut["loss"]))
    if "lens" in which:
        lens = logit_lens(mllm, *asked, batch_size=batch_size)
        parts.append(lens.assign(measure="lens", set="answer", value=lens["probability"]))
    table = pd.concat(parts, ignore_index=True)[["measure", *keys, "value"]]
    return table.assign(sample=at[table["sample"]])


def changes(
    before: pd.DataFrame, after: Mapping[str, pd.DataFrame], media: Sequence
) -> pd.DataFrame:
    """What silencing changes: columns silenced, draw, medium, `was` (the value before), and those
    of `measures`.

    after holds, by modality, the measures of the samples that hold it, with its own neurons
    silenced (`neurons` 0) and then with random ones in their place; media what each is about.
    """
    tables = []
    for name, found in after.items():
        same = before[before["sample"].isin(found["sample"])]
        for draw, table in found.groupby("neurons"):
            change = inference.paired(same, table.drop(columns="neurons"), "value", _BY)
            tables.append(change.assign(silenced=name, draw=draw))
    was = before.rename(columns={"value": "was"})
    changed = pd.concat(tables).merge(was, "left", ["sample", *_BY], validate="many_to_one")
    changed = changed[changed["measure"] != "uniform"].reset_index(drop=True)
    return changed.assign(medium=np.asarray(media)[changed["sample"]])


def by_source(changed: pd.DataFrame) -> pd.DataFrame:
    """Mean changes over layers and samples: rows measure, silenced; columns are the sources."""
    drawn = "random, as " + changed["silenced"]
    silenced = changed["silenced"].where(changed["draw"] == 0, drawn)
    return changed.groupby(["measure", silenced, "set"])["value"].mean().unstack("set")


def _own(changed: pd.DataFrame) -> pd.DataFrame:
    """Changes at the source whose neurons are silenced, or of the lens, of all with draws."""
    at = (changed["set"] == changed["silenced"]) | (changed["set"] == "answer")
    return changed[at & changed["silenced"].isin(changed["silenced"][changed["draw"] > 0])]


def at_own_source(changed: pd.DataFrame) -> pd.DataFrame:
    """What a modality's neurons change at its own source, layer by layer, beside random draws.

    Columns silenced, measure, layer, set (the lens has no source but the answer), value, low, high
    (95 % interval over media, of which rows about one are averaged), n (of them), null, null_low,
    null_high (mean and range of the draws).
    """
    by = ["silenced", *_BY]
    of_media = _own(changed).groupby([*by, "draw", "medium"], sort=False)["value"].mean()
    own = of_media.reset_index().rename(columns={"medium": "sample"})
    drawn = own[own["draw"] > 0].groupby([*by, "draw"])["value"].mean().groupby(by)
    null = drawn.agg(null="mean", null_low="min", null_high="max")
    return inference.mean_over_samples(own[own["draw"] == 0], "value", by).join(null, on=by)


# --- the claims ----------------------------------------------------------------------------------

TESTED = {"III": "attention", "III specific": "attention"}
TESTED |= {"III knockout": "knockout", "III lens": "lens"}


def magnitudes(changed: pd.DataFrame, others: bool = True) -> pd.DataFrame:
    """Each sample's part in the magnitude of the mean change, averaged over layers (lens: from 1).

    A sample counts with the sign of the mean over the samples about other media, for noise has a
    magnitude, but no sign that others share: too little where their sign is uncertain. Else with
    that of the mean over all: too much. NaN where there are no others. Rows: silenced, measure,
    set, sample, medium; columns: draw.
    """
    table = changed[(changed["measure"] != "lens") | (changed["layer"] > 0)]
    by = ["silenced", "draw", *_BY]
    group, same = table.groupby(by), table.groupby([*by, "medium"])["value"]
    total = group["value"].transform("sum") - others * same.transform("sum")
    sign = np.sign(total).where(group["medium"].transform("nunique") > 1)
    keys = ["silenced", "measure", "set", "sample", "medium", "draw"]
    signed = table.assign(value=sign * table["value"])
    return signed.groupby(keys)["value"].mean().unstack("draw")


def _was(changed: pd.DataFrame, measure: str) -> float:
    """What a measure was at the media's own sources, averaged over layers (lens: from 1) and media;
    NaN where there was nothing."""
    own = _own(changed[(changed["measure"] == measure) & (changed["layer"] >= (measure == "lens"))])
    was = float(own[own["draw"] == 0].groupby("silenced")["was"].mean().mean())
    return was if was > 0 else np.nan


def judged(changed: pd.DataFrame, rows: int = 0, tested: Mapping = TESTED) -> list[dict]:
    """The lines of claims of finding III, each of a measure (`inference.judge`), as they are given.

    changed of `changes`, with the text's neurons, and draws for those of every medium; `rows` a
    benchmark were measured. Effects are means of `magnitudes` with a medium's own neurons silenced,
    averaged over the media, less the draws' (or the text's); an interval's lower end takes too
    little of the own and too much of the others', its upper end the reverse. Those of probability
    are shares of what it was, a number taken as known.
    """
    sizes, lines = [], []
    for others in (True, False):
        text = magnitudes(changed[changed["silenced"] == "text"], others)[0].rename("text")
        sizes.append(magnitudes(_own(changed), others).join(text.droplevel("silenced")))
    for name, measure in tested.items():
        was = 1.0 if measure == "attention" else _was(changed, measure)
        least, most = (size.xs(measure, level="measure") / was for size in sizes)
        drawn = least.drop(columns=[0, "text"])
        means = drawn.groupby("silenced").mean().mean()
        null, extra, against = means - means.mean(), means.var() / len(means), list(drawn)
        if name == "III specific":
            null, extra, against = "the text's neurons", 0.0, ["text"]
        estimates = []
        for own, other in ((least, least), (least, most), (most, least)):
            less = own[0] - other[against].mean(axis=1)
            of = {kind: values for kind, values in less.groupby("silenced")}
            about = {kind: values.index.get_level_values("medium") for kind, values in of.items()}
            estimates.append(inference.estimate(of, about, None, extra=extra, draws=len(means)))
        middle, lower, upper = estimates
        ends = {"low": lower.low, "low90": lower.low90, "high": upper.high, "high90": upper.high90}
        lines.append(inference.judge(name, middle._replace(**ends), null, rows=rows))
    return lines
