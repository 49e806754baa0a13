"""The report of a family: one HTML file that needs no network, in light and dark."""

import os
from pathlib import Path
from typing import Any

from solpath.errors import ConfigError
from solpath.files import write_file
from solpath.planning.path import SolutionPath
from solpath.reporting.charts import LEVELS, Series, entry_chart, quality_chart
from solpath.reporting.family import Family

LABELS = {
    "spp": "solpath",
    "inclusion": "inclusion",
    "gauss_newton": "Gauss–Newton",
    "iterative_curvature": "iterative, curv.",
}
"""Method to the name that the report shows, where the two differ."""
KINDS = {"qk": "query–key", "vo": "value–output", "mlp": "MLP", "experts": "experts"}
"""Kind of pair to the name that the report shows."""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Build ``report.html`` from ``family.json`` and ``path/`` in the same folder.

    Returns:
        The file that was written.

    Raises:
        FileError: A file is missing or damaged, or the report cannot be written. The message names
            the file and the field.
        ConfigError: jinja2 or matplotlib is not installed.
    """
    check_installed()
    family = Family.read(Path(folder))
    path = SolutionPath.load(Path(folder) / "path")
    family.check_widths(Path(folder), path)
    target = Path(folder) / "report.html"
    write_file(target, render(family, path).encode())
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


def render(family: Family, path: SolutionPath) -> str:
    """Return the report as HTML.

    Args:
        family: What the report shows.
        path: The path that the family was cut from.
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
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "seconds": duration,
    }
    dense, *small = family.members
    charts = {
        f"{metric}_{size}": Markup(
            quality_chart(_series(family, metric), name=f"{metric}-{size}", narrow=size == "narrow")
        )
        for metric in ("cosine", "retrieval")
        for size in ("wide", "narrow")
    }
    for size in ("wide", "narrow"):
        chart = entry_chart(path, name=f"entry-{size}", narrow=size == "narrow", titles=KINDS)
        charts[f"entry_{size}"] = Markup(chart)
    return environment.get_template("report.html.j2").render(
        family=family,
        dense=dense,
        small=small,
        lead=min(small, key=lambda member: abs(member.sparsity - 0.4)) if small else None,
        charts=charts,
        heat=heat_maps(family, path),
        kinds=KINDS,
        labels=LABELS,
        strong=family.search.method,
        levels=LEVELS,
        points=_point_table(family),
    )


def duration(seconds: float) -> str:
    """Return seconds as text for reading: ``"48 s"``, ``"3 min 20 s"``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}\u202fs" if seconds >= 1 else "under 1\u202fs"
    return f"{whole // 60}\u202fmin {whole % 60}\u202fs"


def _series(family: Family, metric: str) -> list[Series]:
    result = []
    for method in family.methods:
        points = sorted(method.points, key=lambda point: point.sparsity)
        result.append(
            Series(
                label=LABELS.get(method.name, method.name),
                x=[round(100 * point.sparsity, 1) for point in points],
                y=[getattr(point, metric) for point in points],
                strong=method.name == family.search.method,
            )
        )
    return result


def _point_table(family: Family) -> dict[str, Any]:
    """Return every value of the charts for the table below them: methods by sizes."""
    sizes = sorted({round(p.sparsity, 2) for m in family.methods for p in m.points})
    rows = []
    for method in family.methods:
        at = {round(point.sparsity, 2): point for point in method.points}
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
