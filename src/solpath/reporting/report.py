"""The report of a family: one HTML file that needs no network, in light and dark."""

import os
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any

from solpath.errors import BudgetError, ConfigError
from solpath.files import write_file
from solpath.planning.path import SolutionPath
from solpath.reporting.charts import LEVELS, Series, entry_chart, quality_chart
from solpath.reporting.family import Family, Member
from solpath.reporting.scores import shown

LABELS = {
    "spp": "solpath",
    "inclusion": "inclusion",
    "gauss_newton": "Gauss–Newton",
    "iterative_curvature": "iterative, curv.",
}
"""Method to the name that the report shows, where the two differ."""
KINDS = {"qk": "query–key", "vo": "value–output", "mlp": "MLP", "experts": "experts"}
"""Kind of pair to the name that the report shows."""


COSTS = {
    "sparsity": "removed weights",
    "params": "parameters",
    "macs": "multiply-accumulates",
    "bytes": "size on disk",
    "cache": "key-value cache",
    "latency": "latency",
}
"""What quality is drawn against, with the name that the report shows."""


def write_report(
    folder: str | os.PathLike[str], *, beside: str | os.PathLike[str] | None = None
) -> Path:
    """Build ``report.html`` from ``family.json`` and ``path/`` in the same folder.

    Args:
        folder: The folder.
        beside: The folder of another path of the same model, to compare the path with.

    Returns:
        The file that was written.

    Raises:
        FileError: A file is missing or damaged, or the report cannot be written. The message names
            the file and the field.
        ConfigError: jinja2 or matplotlib is not installed, or `beside` is a path of other pairs.
    """
    check_installed()
    family = Family.read(Path(folder))
    path = SolutionPath.load(Path(folder) / "path")
    family.check_widths(Path(folder), path)
    other = None if beside is None else SolutionPath.load(beside)
    target = Path(folder) / "report.html"
    write_file(target, render(family, path, beside=other).encode())
    return target


def check_installed() -> None:
    """Raise `ConfigError` unless the packages that draw the report are installed."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the report needs {error.name}; install it with: pip install 'solpath[report]'."
        ) from error
    del jinja2


def render(family: Family, path: SolutionPath, *, beside: SolutionPath | None = None) -> str:
    """Return the report as HTML.

    Args:
        family: What the report shows.
        path: The path that the family was cut from.
        beside: Another path to compare it with.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("solpath.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: f"{100 * value:.0f}\u202f%",
        "thousands": lambda value: f"{value:,.0f}".replace(",", "\u202f"),
        "millions": lambda value: f"{value / 1e6:.1f}",
        "share": lambda value: f"{100 * value:.10g}\u202f%",  # of settings, which are not rounded
        "quoted": shlex.quote,
        "identifier": lambda name: re.sub(r"\W", "_", name),
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "figure": lambda value: f"{value:.3g}",
        "seconds": lambda value: "–" if value is None else duration(value),
    }
    dense, *small = family.members
    costs = {name: title for name, title in COSTS.items() if name != "cache" or dense.cache}
    main = shown(family.metrics)
    charts = {}
    for size in ("wide", "narrow"):
        for metric, cost in product(main, costs):
            name = f"{metric.key}_{cost}_{size}"
            series = _series(family, metric.key, cost)
            charts[name] = Markup(quality_chart(series, name=name, narrow=size == "narrow"))
        chart = entry_chart(path, name=f"entry-{size}", narrow=size == "narrow", titles=KINDS)
        charts[f"entry_{size}"] = Markup(chart)
    return environment.get_template("report.html.j2").render(
        family=family,
        dense=dense,
        small=small,
        lead=_lead(family),
        costs=costs,
        shown=main,
        charts=charts,
        heat=heat_maps(family, path),
        kinds=KINDS,
        labels=LABELS,
        strong=family.search.method,
        levels=LEVELS,
        points=_point_table(family),
        sizes=size_table(family, path),
        overlap=None if beside is None else overlap(family, path, beside),
        beside=beside,
    )


def duration(seconds: float) -> str:
    """Return seconds as text for reading: ``"48 s"``, ``"3 min 20 s"``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}\u202fs" if seconds >= 1 else "under 1\u202fs"
    return f"{whole // 60}\u202fmin {whole % 60}\u202fs"


def _lead(family: Family) -> Member | None:
    """Return the member that the page begins with: the one of the promise, or near 40 %."""
    aim = 0.4 if family.promise is None else family.promise.sparsity
    small = family.members[1:]
    return min(small, key=lambda member: abs(member.sparsity - aim)) if small else None


def _series(family: Family, metric: str, cost: str) -> list[Series]:
    """Return the lines of a chart: of all methods over what is removed, else of the members."""
    if cost != "sparsity":
        dense = family.members[0]
        return [
            Series(
                label=LABELS.get(family.search.method, family.search.method),
                x=[round(100 * _share(member, dense, cost), 1) for member in family.members],
                y=[member.metrics[metric] for member in family.members],
                strong=True,
                ends=[member.intervals.get(metric) for member in family.members],
            )
        ]
    result = []
    for method in family.methods:
        points = sorted(method.points, key=lambda point: point.sparsity)
        strong = method.name == family.search.method
        ends = [member.intervals.get(metric) for member in family.members]
        result.append(
            Series(
                label=LABELS.get(method.name, method.name),
                x=[round(100 * point.sparsity, 1) for point in points],
                y=[point.metrics[metric] for point in points],
                strong=strong,
                ends=ends if strong and len(ends) == len(points) else (),
            )
        )
    return result


def _share(member: Member, dense: Member, cost: str) -> float:
    name = "latency_ms" if cost == "latency" else cost
    return float(getattr(member, name) / getattr(dense, name))


def size_table(family: Family, path: SolutionPath) -> dict[str, Any]:
    """Return what the page shows of every size that can be chosen on it, as plain values.

    Returns:
        Under ``"sizes"`` one entry per percent of sparsity that the path can reach: what is removed
        (for a target it may be more or less than was asked for), its costs, and the share of units
        that is kept by kind. Under ``"members"`` what was measured of each.
    """
    widths = {kind: sum(p.units for p in path.pairs if p.kind == kind) for kind in KINDS}
    dense, whole = family.members[0], path.costs.dense["cache"]
    sizes: list[dict[str, Any]] = []
    for percent in range(100):
        try:
            plan = path.plan(sparsity=percent / 100, for_=family.target)
        except BudgetError:
            break  # every layer that must keep something keeps just that
        kept = dict.fromkeys(KINDS, 0)
        for pair in path.pairs:
            kept[pair.kind] += plan.kept[pair.name].numel()
        size = plan.achieved
        sizes.append(
            {
                "sparsity": percent / 100,
                "removed": size.sparsity,
                "params": size.params,
                "macs": size.macs,
                "bytes": size.bytes,
                "cache": size.cache * dense.cache / whole
                if whole
                else 0,  # in the dtype of the model
                "kinds": [(KINDS[kind], kept[kind] / n) for kind, n in widths.items() if n],
            }
        )
    return {
        "sizes": sizes,
        "members": [
            {
                "name": member.name,
                "sparsity": member.sparsity,
                "latency": member.latency_ms,
                "metrics": dict(member.metrics),
                "intervals": {name: list(ends) for name, ends in member.intervals.items()},
            }
            for member in family.members
        ],
        "metrics": [{"key": one.key, "title": one.title} for one in family.metrics],
    }


def overlap(family: Family, path: SolutionPath, beside: SolutionPath) -> list[dict[str, Any]]:
    """Return how much two paths agree: of the units that one keeps, the share that both keep.

    Args:
        family: Its members give the sizes.
        path: The path of the family.
        beside: The other path.

    Returns:
        One ``{"name", "shares", "chance"}`` per member but the dense model: kind of pair to the
        share, and the share that two random choices would have, which is what is kept of all.

    Raises:
        ConfigError: The paths are not of the same pairs.
    """
    shapes = [[(p.name, p.heads, p.width) for p in one.pairs] for one in (path, beside)]
    difference = path.fingerprint.differences(beside.fingerprint)
    if shapes[0] != shapes[1]:
        difference = "it has other pairs"
    if difference:
        raise ConfigError(
            f"beside is no path of the model of the family: {difference}; compare two paths of one "
            "model."
        )
    rows = []
    for member in family.members[1:]:
        plans = [one.plan(sparsity=member.sparsity, for_=family.target) for one in (path, beside)]
        masks = [plan.masks() for plan in plans]
        both, kept = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
        for pair in path.pairs:
            both[pair.kind] += float((masks[0][pair.name] * masks[1][pair.name]).sum())
            kept[pair.kind] += float(masks[0][pair.name].sum())
        total, units = sum(kept.values()), sum(pair.units for pair in path.pairs)
        shares = {kind: both[kind] / kept[kind] for kind in KINDS if kept[kind]}
        shares["all"] = sum(both.values()) / max(total, 1)
        rows.append({"name": member.name, "shares": shares, "chance": total / units})
    return rows


def _point_table(family: Family) -> dict[str, Any]:
    """Return every value of the charts for the table below them: methods by sizes."""
    sizes = sorted({round(p.sparsity, 6) for m in family.methods for p in m.points})
    rows = []
    for method in family.methods:
        at = {round(point.sparsity, 6): point for point in method.points}
        rows.append({"name": method.name, "seconds": method.seconds,
                     "cells": [at.get(size) for size in sizes]})  # fmt: skip
    return {"sizes": sizes, "rows": rows}


def heat_maps(family: Family, path: SolutionPath) -> list[dict[str, Any]]:
    """Return, for every member but the dense model, the share of units kept, layer by kind of pair.

    Returns:
        One ``{"name", "kinds", "rows"}`` per member. A row holds the shares of one layer, in the
        order of the kinds, with None where the layer has no such pair.
    """
    kinds = list(dict.fromkeys(pair.kind for pair in path.pairs))
    columns = [[pair for pair in path.pairs if pair.kind == kind] for kind in kinds]
    layers = max(len(column) for column in columns)
    maps = []
    for member in family.members[1:]:
        rows = [
            [
                member.widths[column[i].name] / column[i].width if i < len(column) else None
                for column in columns
            ]
            for i in range(layers)
        ]
        maps.append({"name": member.name, "kinds": kinds, "rows": rows})
    return maps
