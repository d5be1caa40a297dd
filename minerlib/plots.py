"""Figures: each function draws one tidy table on one `ax`; and tables, as `show` shows them.

One colour, marker and hatch per modality throughout the workbook (Okabe and Ito's colours, told
apart without colour vision; marker and hatch carry the same information in print).
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.pyplot import Axes, Figure, MaxNLocator, Rectangle

COLOURS = {
    "text": "#0072B2", "special": "#E69F00", "special_text": "#56B4E9", "image": "#009E73",
    "video": "#CC79A7", "audio": "#D55E00", "prompt": "#444444", "random": "#999999",
}  # fmt: skip
MARKERS = dict(zip(COLOURS, "osPD^vX.", strict=True))
HATCHES = dict(zip(COLOURS, ("", "//", "--", "..", "xx", "\\\\", "", ""), strict=True))


def style() -> None:
    """Sizes and grid of every figure in the workbook; call once per notebook."""
    rc: dict[str, Any] = {"figure.dpi": 110, "figure.constrained_layout.use": True}
    rc |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    rc |= {"axes.titlesize": "medium", "axes.titleweight": "bold", "axes.titlelocation": "left"}
    rc |= {"hatch.linewidth": 0.5, "lines.markersize": 4}
    sns.set_theme(context="paper", style="ticks", rc=rc)


def tokens(table: pd.DataFrame, ax: Axes, width: int = 68) -> None:
    """A prompt as boxes coloured by kind; table has columns token, kind; runs are one box."""
    x = y = 0.0
    run = (table["kind"] != table["kind"].shift()) | table["kind"].isin(["text", "special"])
    for _, part in table.groupby(run.cumsum(), sort=False):
        kind, text = part["kind"].iloc[0], part["token"].iloc[0]
        text = text.replace("\n", "↵").replace(" ", "·")
        wide = len(text) + 0.8
        if len(part) > 1:
            text, wide = f"{kind} × {len(part)}", 20.0
        if x + wide > width:
            x, y = 0.0, y - 1.35
        ax.add_patch(Rectangle((x, y), wide - 0.2, 1, color=COLOURS[kind], alpha=0.35, lw=0.6))
        font: dict[str, Any] = {"family": "monospace", "fontsize": 6.5}
        ax.text(x + wide / 2 - 0.1, y + 0.47, text, ha="center", va="center", **font)
        x += wide
    handles = [Rectangle((0, 0), 1, 1, fc=COLOURS[k], alpha=0.35) for k in table["kind"].unique()]
    ax.legend(handles, table["kind"].unique(), ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(xlim=(-0.3, width), ylim=(y - 0.4, 1.2))
    ax.axis("off")


def _error(table: pd.DataFrame, value: str) -> np.ndarray:
    """How far an interval (columns low, high) reaches below and above a value: [2, row]."""
    return np.maximum([table[value] - table["low"], table["high"] - table[value]], 0)


def by_layer(
    table: pd.DataFrame, ax: Axes, *, value="value", group="modality", null="", ylabel="", like=None
) -> None:
    """One line per group over layers, with its interval (columns low, high) and a dotted null.

    null_low and null_high make a band of it; `like`: whose colour and marker a group borrows.
    """
    middle = (table[group].nunique() - 1) / 2
    for i, (name, part) in enumerate(table.groupby(group, sort=False)):
        as_if = (like or {}).get(name, name)
        colour = COLOURS.get(as_if, sns.color_palette("colorblind")[i % 10])
        style = {"color": colour, "marker": MARKERS.get(as_if, "o"), "label": name, "lw": 1.2}
        error = _error(part, value) if "low" in part else None
        x = part["layer"] + (i - middle) * 0.06
        ax.errorbar(x, part[value], error, capsize=1.5, elinewidth=0.8, **style)
        if null:
            ax.plot(x, part[null], color=colour, ls=":", lw=1)
        if null and "null_low" in part:
            band = part["layer"], part["null_low"], part["null_high"]
            ax.fill_between(*band, color=colour, alpha=0.15, lw=0)
    ax.set(xlabel="decoder layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    outside: dict[str, Any] = (
        {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if middle > 3 else {}
    )
    ax.legend(fontsize="small", **outside)


def background(table: pd.DataFrame, ax: Axes, *, by: Sequence[str], value: str = "value") -> None:
    """Thin grey lines over the layers, one for each `by`: controls behind a figure's own lines."""
    for _, line in table.groupby(list(by)):
        ax.plot(line["layer"], line[value], color="#BBBBBB", lw=0.6, zorder=0)


def projections(table: pd.DataFrame) -> Figure:
    """Pictures of `findings.states.project`: a row per layer, a column per view."""
    where = table["layer"].map(lambda layer: f"layer {layer}" if layer else "embeddings")
    axes = {"sharex": False, "sharey": False, "margin_titles": True}
    look: dict[str, Any] = {"palette": COLOURS, "markers": MARKERS, "alpha": 0.75, "linewidth": 0}
    look |= {"x": "x", "y": "y", "hue": "kind", "style": "kind", "row": "where", "col": "view"}
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn has its own
        grid = sns.relplot(table.assign(where=where), height=1.9, s=14, facet_kws=axes, **look)
    grid.set(xticks=[], yticks=[], xlabel="", ylabel="")
    grid.set_titles(col_template="{col_name}", row_template="{row_name}").tight_layout()
    return grid.figure


def stacked(counts: pd.DataFrame, ax: Axes, *, xlabel: str = "", ylabel: str = "") -> None:
    """Stacked bars: counts has one row per bar, one column per modality."""
    style = {"color": COLOURS, "ec": "white", "lw": 0.4, "width": 0.8, "rot": 0}
    counts.plot.bar(stacked=True, ax=ax, legend=False, **style)
    for name, bars in zip(counts, ax.containers, strict=True):
        plt.setp(bars, hatch=HATCHES[name])
    thin_out(ax)
    ax.set(xlabel=xlabel, ylabel=ylabel)


def thin_out(ax: Axes, most: int = 12) -> None:
    """Leave at most so many of an axis' labelled bars labelled, evenly."""
    step = -(-len(ax.get_xticks()) // most)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    ax.set_xticks(ax.get_xticks()[::step], labels[::step])


def heat(matrix: pd.DataFrame, ax: Axes, *, low=0.0, high=1.0, fmt=".2f", cmap="viridis") -> None:
    """A matrix on a fixed colour scale, so that panels compare; its numbers too if they are few."""
    few = len(matrix) <= 16
    style = {"cmap": cmap, "fmt": fmt, "linewidths": 0.5 * few, "annot_kws": {"fontsize": 7}}
    style |= {"annot": few, "cbar": not few, "square": few}
    shown = matrix.round(int(fmt[-2])) + 0.0  # no -0.00
    sns.heatmap(shown, ax=ax, vmin=low, vmax=high, **style)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="", ylabel="")


def densities(scores: xr.DataArray, ax: Axes) -> None:
    """Distribution of one metric over all neurons, one outlined violin per modality."""
    names = scores.modality.values.tolist()
    values = [scores.sel(modality=m).values.ravel() for m in names]
    violins: dict[str, Any] = ax.violinplot(values, showextrema=False)
    for body, name in zip(violins["bodies"], names, strict=True):
        body.set(facecolor=COLOURS[name], edgecolor="black", hatch=HATCHES[name], alpha=0.7, lw=0.5)
    ax.set(xticks=range(1, len(names) + 1), xticklabels=names, ylim=(0, 1))


def intervals(table: pd.DataFrame, ax: Axes, *, label: str, hue: str | None = None) -> None:
    """Means with intervals, one line per row: columns `label`, mean, low, high; top to bottom."""
    upwards = table[::-1]
    colours = upwards[hue] if hue else ["#222222"] * len(table)
    points = zip(upwards["mean"], _error(upwards, "mean").T, colours, strict=True)
    for y, (x, error, colour) in enumerate(points):
        ax.errorbar(x, y, xerr=error[:, None], fmt="o", color=colour, capsize=2, lw=1.2)
    ax.set(yticks=range(len(table)), yticklabels=upwards[label], ylim=(-0.6, len(table) - 0.4))
    ax.grid(axis="x", lw=0.4)


def dose(table: pd.DataFrame, ax: Axes, *, x: str, group: str, colours: dict[str, str]) -> None:
    """Dose and response on a log axis: columns x, group, mean and, for a band, low and high."""
    for (name, part), marker in zip(table.groupby(group, sort=False), cycle("osD^v")):
        ax.plot(part[x], part["mean"], color=colours[name], marker=marker, lw=1.3, label=name)
        if "low" in part:
            band = part[x], part["low"], part["high"]
            ax.fill_between(*band, color=colours[name], alpha=0.18, lw=0)
    ax.set_xscale("log")
    ax.legend(fontsize="small")


def upset(sets: Mapping[str, xr.DataArray]) -> Figure:
    """Which neurons are in which of the sets, bool [modality, layer, neuron] each: an UpSet plot
    (Lex et al. 2014)."""
    from marsilea.upset import Upset, UpsetData

    members = [set(np.flatnonzero(of.any("modality")).tolist()) for of in sets.values()]
    own = plt.rc_context({"figure.constrained_layout.use": False})  # it lays out by itself
    with own, warnings.catch_warnings(action="ignore"):  # pandas: of arguments that will go
        grid = Upset(UpsetData.from_sets(members, sets_names=list(sets)), sort_sets="ascending")
        grid.render()
    grid.figure.set_layout_engine(PlaceHolderLayoutEngine(False, False))  # nor when it is shown
    return grid.figure


def medium(sample, ax: Axes) -> None:
    """A sample's picture, its clip's frames in a strip, or its sound as a spectrogram."""
    if sample.image is not None:
        ax.imshow(sample.image, interpolation="nearest")
    elif sample.video is not None:
        four = sample.video[np.linspace(0, len(sample.video) - 1, 4).round().astype(int)]
        ax.imshow(np.vstack([np.hstack(four[:2]), np.hstack(four[2:])]), interpolation="nearest")
    elif sample.audio is not None:
        rate = sample.sampling_rate
        ax.specgram(sample.audio + 1e-6, NFFT=400, Fs=rate, noverlap=240, cmap="magma")
        ax.set(xlabel="time / s", ylabel="frequency / Hz")
        return
    ax.axis("off")


def show(table: pd.DataFrame | pd.Series, digits: int | Mapping = 2, index: bool = False) -> None:
    """Show a table, its floats rounded (digits: also by column); as text, it never wraps.

    NaN is left empty, truth values are yes and no. A series keeps its index.
    """
    from IPython.display import display

    def shown(value: object, places: int) -> object:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if not isinstance(value, float | np.floating):
            return value
        return "" if np.isnan(value) else f"{round(float(value), places) + 0.0:.{places}f}"  # no -0

    index = index or isinstance(table, pd.Series)
    text = pd.DataFrame(table).astype(object)
    given = digits if isinstance(digits, Mapping) else dict.fromkeys(text, digits)
    text = text.apply(lambda column: column.map(shown, places=given.get(column.name, 2)))
    with pd.option_context("display.max_colwidth", None):
        forms = {"text/plain": text.to_string(index=index), "text/html": text.to_html(index=index)}
    display(forms, raw=True)
