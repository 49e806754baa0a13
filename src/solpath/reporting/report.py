"""The report of a family: one HTML file that needs no network, in light and dark."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solpath.errors import ConfigError, FileError
from solpath.files import read_json, write_file
from solpath.planning.path import SolutionPath
from solpath.reporting.charts import LEVELS, Series, entry_chart, quality_chart

FORMAT_VERSION = 2
LABELS = {
    "spp": "solpath",
    "inclusion": "inclusion",
    "gauss_newton": "Gauss–Newton",
    "iterative_curvature": "iterative, curv.",
}
KINDS = {"qk": "query–key", "vo": "value–output", "mlp": "MLP"}
_MEMBER = ("name", "sparsity", "params", "params_share", "macs", "macs_share", "bytes")
_MEMBER_FIGURES = ("latency_ms", "latency_iqr_ms", "cosine", "retrieval")


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Build ``report.html`` from ``family.json`` and ``path/`` in the same folder.

    Returns:
        The file written.

    Raises:
        FileError: a missing or damaged file, naming the file and the field.
        ConfigError: jinja2 or matplotlib is not installed.
    """
    check_installed()
    file = Path(folder) / "family.json"
    family = read_family(file)
    path = SolutionPath.load(Path(folder) / "path")
    check_widths(file, family, path)
    target = Path(folder) / "report.html"
    write_file(target, render(family, path).encode())
    return target


def check_installed() -> None:
    """Raise `ConfigError` unless the packages that draw the report are there."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the report needs {error.name}; install it with: pip install 'solpath[report]'."
        ) from error
    del jinja2


def read_family(file: Path) -> dict[str, Any]:
    """Read ``family.json`` and check every field the report uses.

    Raises:
        FileError: naming the file and the field.
    """
    family = read_json(file)
    if family.get("format") != "solpath.family" or family.get("version") != FORMAT_VERSION:
        raise FileError(
            f"{file}: expected format solpath.family version {FORMAT_VERSION}, "
            f"got {family.get('format')!r} version {family.get('version')!r}."
        )
    for section in ("model", "search", "task", "measured", "provenance"):
        if not isinstance(family.get(section), dict):
            raise FileError(f"{file}: {section} is missing or not an object.")
    for section in ("methods", "members"):
        if not isinstance(family.get(section), list) or not family[section]:
            raise FileError(f"{file}: {section} is missing, empty or not a list.")
    model = family["model"]
    _need(file, "model", model, text=("name", "class"), number=("units",), optional=("sha256",))
    numbers = ("seconds", "compensation_seconds", "steps", "seed")
    _need(file, "search", family["search"], text=("method", "text"), number=numbers)
    _need(file, "provenance", family["provenance"], number=("threads",))
    _need(file, "task", family["task"], text=("name",), number=("pairs",))
    _need(file, "measured", family["measured"], number=("samples", "tokens", "repeats"))
    for i, method in enumerate(family["methods"]):
        _need(file, f"methods[{i}]", method, text=("name",), number=("seconds",))
        points = method.get("points")
        if not isinstance(points, list) or not points:
            raise FileError(f"{file}: methods[{i}].points is missing, empty or not a list.")
        for j, point in enumerate(points):
            where = f"methods[{i}].points[{j}]"
            _need(file, where, point, number=("sparsity", "cosine", "retrieval"))
    for i, member in enumerate(family["members"]):
        _need(file, f"members[{i}]", member, text=("name",), optional=("folder",))
        _need(file, f"members[{i}]", member, number=(*_MEMBER[1:], *_MEMBER_FIGURES))
        if not isinstance(member.get("widths"), dict):
            raise FileError(f"{file}: members[{i}].widths is missing or not an object.")
    for name in ("bytes", "latency_ms"):  # of the dense model, which shares are of
        if not family["members"][0][name] > 0:
            raise FileError(f"{file}: members[0].{name} must be positive.")
    return family


def check_widths(file: Path, family: Mapping[str, Any], path: SolutionPath) -> None:
    """Raise `FileError` unless every member has a width for every pair of the path."""
    for i, member in enumerate(family["members"]):
        for pair in path.pairs:
            width = member["widths"].get(pair.name)
            if type(width) is not int or not 0 <= width <= pair.width:
                raise FileError(
                    f"{file}: members[{i}].widths[{pair.name!r}] is {width!r}, "
                    f"expected an integer in 0..{pair.width}."
                )


def _need(
    file: Path,
    where: str,
    value: Any,
    *,
    text: Sequence[str] = (),
    number: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Raise `FileError` unless `value` has these fields; `optional` texts may be None."""
    if not isinstance(value, dict):
        raise FileError(f"{file}: {where} is not an object.")
    for name in (*text, *optional):
        found = value.get(name, ...)
        if not isinstance(found, str) and not (found is None and name in optional):
            raise FileError(f"{file}: {where}.{name} is missing or not text.")
    for name in number:
        found = value.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise FileError(f"{file}: {where}.{name} is {found!r}, expected a number.")


def render(family: Mapping[str, Any], path: SolutionPath) -> str:
    """The report as HTML.

    Args:
        family: what `read_family` returns.
        path: the path the family was cut from.
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
    dense = family["members"][0]
    strong = family["search"]["method"]
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
        small=family["members"][1:],
        lead=_lead(family),
        charts=charts,
        heat=heat_maps(family, path),
        kinds=KINDS,
        labels=LABELS,
        strong=strong,
        levels=LEVELS,
        points=_point_table(family),
    )


def duration(seconds: float) -> str:
    """Seconds for reading: ``"48 s"``, ``"3 min 20 s"``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}\u202fs" if seconds >= 1 else "under 1\u202fs"
    return f"{whole // 60}\u202fmin {whole % 60}\u202fs"


def _lead(family: Mapping[str, Any]) -> dict[str, Any] | None:
    """The member whose figures the opening sentence gives: nearest to 40 % removed."""
    small = family["members"][1:]
    return min(small, key=lambda member: abs(member["sparsity"] - 0.4)) if small else None


def _series(family: Mapping[str, Any], metric: str) -> list[Series]:
    result = []
    for method in family["methods"]:
        points = sorted(method["points"], key=lambda point: point["sparsity"])
        result.append(
            Series(
                label=LABELS.get(method["name"], method["name"]),
                x=[round(100 * point["sparsity"], 1) for point in points],
                y=[point[metric] for point in points],
                strong=method["name"] == family["search"]["method"],
            )
        )
    return result


def _point_table(family: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the charts, for the table below them: methods by sizes."""
    sizes = sorted({round(p["sparsity"], 2) for m in family["methods"] for p in m["points"]})
    rows = []
    for method in family["methods"]:
        at = {round(point["sparsity"], 2): point for point in method["points"]}
        rows.append({"name": method["name"], "seconds": method["seconds"],
                     "cells": [at.get(size) for size in sizes]})  # fmt: skip
    return {"sizes": sizes, "rows": rows}


def heat_maps(family: Mapping[str, Any], path: SolutionPath) -> list[dict[str, Any]]:
    """For every member but the dense one, the share of units kept, layer by kind.

    Returns:
        ``{"name", "kinds", "rows"}`` each; a row is the shares of one layer (None: no such pair).
    """
    kinds = list(dict.fromkeys(pair.kind for pair in path.pairs))
    columns = [[pair for pair in path.pairs if pair.kind == kind] for kind in kinds]
    layers = max(len(column) for column in columns)
    maps = []
    for member in family["members"][1:]:
        rows = [
            [
                member["widths"][column[i].name] / column[i].width if i < len(column) else None
                for column in columns
            ]
            for i in range(layers)
        ]
        maps.append({"name": member["name"], "kinds": kinds, "rows": rows})
    return maps
