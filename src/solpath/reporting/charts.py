"""Charts of the report as inline SVG whose colours are CSS variables, so that one fits any theme.

Matplotlib draws with stand-in colours, and each of them is then replaced by ``var(--name)``. Text
stays text and takes the font of the page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from solpath.pair import flatten, unflatten
from solpath.planning.path import SolutionPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 10
"""The number of colours in `entry_chart`."""
_COLOURS = ("ink", "muted", "grid", "accent", "soft", *(f"heat{i}" for i in range(LEVELS)))
_STAND_IN = {name: f"#fe{i:02x}ef" for i, name in enumerate(_COLOURS)}
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 2)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (9, 3)))
_ALIGN: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: The text at the end of the line.
        x: Sizes in percent: of what is removed, ascending, or of what is left, descending.
        y: The value at each size.
        strong: Whether the line is drawn in the accent colour, over the others.
        ends: The ends of a confidence interval at each size, or None where there is none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    strong: bool
    ends: Sequence[Sequence[float] | None] = ()


def quality_chart(series: Sequence[Series], *, name: str, narrow: bool) -> str:
    """Draw lines over sizes, each labelled at its end, as an ``<svg>`` element.

    The dense model is on the left. ``data-from`` and ``data-to`` of the element are the sizes at
    the left and right end of the axis, ``data-left`` and ``data-right`` where these are in the
    units of its ``viewBox``.

    Args:
        series: The lines: at least one, each with at least one point, all from the same size on.
        name: A name for the chart that is unique on the page.
        narrow: Whether to draw for a screen of about 360 pixels.
    """
    width, height = (3.6, 3.3) if narrow else (5.4, 3.5)
    figure, axes = _figure(width, height)
    left, right = (0.13, 0.68) if narrow else (0.1, 0.77)
    figure.subplots_adjust(left=left, right=right, top=0.97, bottom=0.14)
    weak = 0
    for line in sorted(series, key=lambda line: line.strong):
        colour = _STAND_IN["accent" if line.strong else "soft"]
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linewidth=2.4 if line.strong else 1.2,
            linestyle="-" if line.strong else _DASHES[weak % len(_DASHES)],
            marker="o" if line.strong else _MARKERS[weak % len(_MARKERS)],
            markersize=5.5 if line.strong else 3.5,
            markeredgewidth=0,
            zorder=4 if line.strong else 3,
            clip_on=False,
        )
        weak += not line.strong
        for x, ends in zip(line.x, line.ends, strict=False):
            if ends is not None:
                axes.plot([x, x], ends, color=colour, linewidth=1.2, zorder=2, clip_on=False)
    first = series[0].x[0]
    last = max((line.x[-1] for line in series), key=lambda x: abs(x - first))
    values = [value for line in series for value in line.y]
    values += [end for line in series for ends in line.ends if ends is not None for end in ends]
    pad = max(0.05 * (max(values) - min(values)), 1e-3 * abs(max(values)), 1e-9)
    floor = max(0.0, min(values) - pad) if min(values) >= 0 else min(values) - pad
    axes.set_xlim(first, last if last != first else first + 1)
    axes.set_ylim(floor, max(max(values), floor + 2 * pad))
    ticks = sorted({x for line in series for x in line.x}, reverse=last < first)
    axes.set_xticks(_thinned(ticks, 0.09 * abs(last - first)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(axis="y", color=_STAND_IN["grid"], linewidth=0.8)
    _label_ends(axes, series, last)
    places = {"from": first, "to": last, "left": 72 * left * width, "right": 72 * right * width}
    return _svg(figure, name, places)


def _thinned(ticks: Sequence[float], gap: float) -> list[float]:
    """Return `ticks` without those that come closer than `gap` to the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(tick - kept[-1]) >= gap:
            kept.append(tick)
    return kept


def _label_ends(axes: "Axes", series: Sequence[Series], last: float) -> None:
    """Write each label to the right of its last point, pushed apart where labels would overlap."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ends = sorted(series, key=lambda line: line.y[-1])
    places = spread([line.y[-1] for line in ends], gap, low, high)
    for line, place in zip(ends, places, strict=True):
        end = line.y[-1]
        axes.annotate(
            f"{line.label} {end:.3g}",
            xy=(last, place),
            xytext=(13, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if line.strong else "normal",
            color=_STAND_IN["accent" if line.strong else "muted"],
            annotation_clip=False,
            parse_math=False,
        )
        if abs(end - place) > 0.15 * gap:
            axes.annotate(
                "",
                xy=(last, end),
                xytext=(11, (place - end) / (high - low) * _plot_height(axes)),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": _STAND_IN["grid"],
                    "linewidth": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 4,
                },
                annotation_clip=False,
            )


def _plot_height(axes: "Axes") -> float:
    """Return the height of the plot in points."""
    figure = cast("Figure", axes.get_figure())
    return float(axes.get_position().height * figure.get_figheight() * 72)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending `values` as little as possible so that neighbours are at least `gap` apart.

    The values stay in ``[low, high]`` if they can.

    Example:
        >>> spread([1.0, 1.0, 5.0], gap=1.0, low=0.0, high=6.0)
        [0.5, 1.5, 5.0]
    """
    groups: list[list[float]] = []  # [sum of (value - offset), count]
    for i, value in enumerate(values):
        groups.append([value - i * gap, 1.0])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    starts = [total / count for total, count in groups for _ in range(int(count))]
    top = high - (len(values) - 1) * gap
    return [min(max(start, low), max(top, low)) + i * gap for i, start in enumerate(starts)]


def entry_chart(path: SolutionPath, *, name: str, narrow: bool, titles: Mapping[str, str]) -> str:
    """Draw one strip per pair, coloured by when its units enter, as an ``<svg>`` element.

    The units of a strip run from the first that enters to the last. The colour of a unit is the
    share of the prunable parameters that is kept when it enters, in `LEVELS` steps.

    Args:
        path: The path.
        name: A name for the chart that is unique on the page.
        narrow: Whether to draw for a screen of about 360 pixels.
        titles: Kind of pair to the title above its strips. A kind without an entry is its own
            title.
    """
    kinds = list(dict.fromkeys(pair.kind for pair in path.pairs))
    rows = max(sum(pair.kind == kind for pair in path.pairs) for kind in kinds)
    row = 0.2 if rows <= 16 else 3.2 / rows
    strip = rows * row + 0.62
    width, height = (3.6, strip * len(kinds)) if narrow else (8.6, strip)
    shape = (len(kinds), 1) if narrow else (1, len(kinds))
    figure, _ = _figure(width, height, bare=True)
    entries = entry_shares(path)
    for i, kind in enumerate(kinds):
        axes = figure.add_subplot(*shape, i + 1)
        _style(axes)
        pairs = [pair for pair in path.pairs if pair.kind == kind]
        for layer, pair in enumerate(pairs):
            left = 0.0
            counts = torch.bincount(
                (entries[pair.name].flatten() * LEVELS).long().clamp(0, LEVELS - 1),
                minlength=LEVELS,
            )
            for level, count in enumerate(counts.tolist()):
                share = count / pair.units
                axes.barh(
                    layer, share, left=left, height=0.84, linewidth=0,
                    color=_STAND_IN[f"heat{level}"],
                )  # fmt: skip
                left += share
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        every = max(1, -(-len(pairs) // 12))
        axes.set_yticks(range(0, len(pairs), every), [str(n) for n in range(0, len(pairs), every)])
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        for label, align in zip(axes.get_xticklabels(), _ALIGN, strict=True):
            label.set_horizontalalignment(align)
        axes.set_title(
            titles.get(kind, kind),
            loc="left",
            fontsize=10,
            color=_STAND_IN["ink"],
            fontweight="bold",
            parse_math=False,
        )
        axes.spines["bottom"].set_visible(False)
    pad = 0.62 / height
    if narrow:
        each = strip / height
        figure.subplots_adjust(
            left=0.06, right=0.99, top=1 - 0.3 / height, bottom=0.26 / height,
            hspace=(0.62 / height) / (each - pad),
        )  # fmt: skip
    else:
        figure.subplots_adjust(
            left=0.03, right=0.99, top=1 - 0.3 / height, bottom=0.26 / height, wspace=0.1
        )
    return _svg(figure, name)


def entry_shares(path: SolutionPath) -> dict[str, torch.Tensor]:
    """Return the share of the prunable parameters that is kept when each unit enters.

    The unit itself is included.

    Returns:
        Pair name to float64 ``[heads, width]`` in (0, 1].
    """
    cost = torch.cat(
        [torch.full((p.units,), float(path.costs.unit["params"][p.name])) for p in path.pairs]
    ).double()
    order = path.order()
    share = torch.empty_like(flatten(path.pairs, path.score).double())
    share[order] = cost[order].cumsum(0) / cost.sum()
    return unflatten(path.pairs, share)


def _figure(width: float, height: float, *, bare: bool = False) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    if bare:
        return figure, None
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: "Axes") -> None:
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_STAND_IN["grid"])
    axes.tick_params(length=0, labelsize=9, labelcolor=_STAND_IN["muted"], pad=5)
    axes.set_axisbelow(True)


def _svg(figure: "Figure", name: str, data: Mapping[str, float] | None = None) -> str:
    """Draw an ``<svg>`` element for HTML: no prolog, no metadata, no namespaces, no fixed size.

    Args:
        figure: The figure.
        name: A name that is unique on the page.
        data: Name to value of its ``data-`` attributes. With them it has a line of the class
            ``cursor``, which the page may move.
    """
    import matplotlib

    stream = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["sans-serif"]}
    with matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    own = "".join(f' data-{key}="{value:g}"' for key, value in (data or {}).items())
    start = f'<svg class="chart" {view[0]}{own} aria-hidden="true">'
    text = re.sub(r"<svg[^>]*>", start, text, count=1)
    if data:
        text = text.replace("</svg>", '<line class="cursor"/></svg>')
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;]*;", "", text)
    for key, colour in _STAND_IN.items():
        text = text.replace(colour, f"var(--{key})")
    return re.sub(r"\n\s*", "\n", text).strip()
