"""What an answer's probability owes to each neuron: gradients at the activations.

With L the mean log-probability of the tokens of a row's commonest reference, a a neuron's
activation at one token and g = dL/da there: attribution is |a g|; CAN (arXiv 2512.00918) takes
|a| |g|^alpha; integrated gradients (Sundararajan et al. 2017) follow all activations from 0 to what
they are, at once, and share out L(as it is) - L(all silenced) among them.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xarray as xr

from minerlib.answering import logprobs
from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.separation import SETS, separate, stack

ALPHAS = (0.5, 0.25)
"""The powers of the gradient besides 1 and 0."""
METHODS = ("attribution", *(f"can {alpha:g}" for alpha in ALPHAS), "integrated")


def slopes(
    mllm: MLLM, batch, answers: Sequence[str], share: float = 1.0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Activations, and the slope of the answers' summed log-probability at them, of each layer.

    Each [batch, token, neuron], tokens of the prompt and then the answer. Every activation is
    multiplied by `share` on its way.
    """
    seen: dict[int, torch.Tensor] = {}
    added: dict[int, torch.Tensor] = {}

    def at(layer, x):
        seen[layer] = x.detach()
        added[layer] = torch.zeros_like(x, requires_grad=True)
        return x * share + added[layer]

    with torch.enable_grad(), mllm.tap(activation=at):
        told = logprobs(mllm, batch, answers).sum()
        found = torch.autograd.grad(told, [added[i] for i in sorted(added)])
    return [seen[i] for i in sorted(seen)], list(found)


@computation(version=1)
def gradients(
    mllm: MLLM, benches: Iterable, *, steps: int = 8, batch_size: int = 8
) -> xr.DataArray:
    """Each of `METHODS` over the prompt tokens of each set: float32 [by, modality, layer,
    neuron], summed over a set's tokens, the mean over rows; integrated gradients keep their sign.

    `steps` of the path from 0, at the middle of each. The answer's own tokens count nowhere.
    """
    shape = len(METHODS), len(SETS), mllm.n_layers, mllm.n_neurons
    total, rows = torch.zeros(shape, dtype=torch.float64), 0
    for bench in benches:
        for first, batch in mllm.batches(bench, batch_size, "gradients"):
            answers = [bench[i].reference for i in range(first, first + len(batch["input_ids"]))]
            members = stack(separate(mllm, batch)).transpose(0, 1).flatten(1).double()
            length = batch["input_ids"].shape[1]

            def add(method, layer, values, members=members, length=length):
                of = values[:, :length].flatten(0, 1).double()
                total[method, :, layer] += (members.to(of.device) @ of).cpu()

            for layer, (a, g) in enumerate(zip(*slopes(mllm, batch, answers), strict=True)):
                for method, power in enumerate((1.0, *ALPHAS)):
                    add(method, layer, a.abs() * g.abs() ** power)
            for step in range(steps):
                path = slopes(mllm, batch, answers, (step + 0.5) / steps)
                for layer, (a, g) in enumerate(zip(*path, strict=True)):
                    add(-1, layer, a * g / steps)
            rows += len(answers)
    coords = {"by": list(METHODS), "modality": list(SETS), "layer": range(mllm.n_layers)}
    dims = ("by", "modality", "layer", "neuron")
    return xr.DataArray((total / rows).numpy().astype(np.float32), coords, dims, "gradients")
