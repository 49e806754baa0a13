"""Tables about large models: cut from disk to disk, searched in bounded memory and in bfloat16."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from record import RESULTS

Rows = Iterator[tuple[str, ...]]


def streaming() -> Rows:
    """Checkpoints that are cut from disk to disk: memory, and time against a copy."""
    columns = ("read", "written", "largest weight", "memory", "of its own", "imports")
    keys = ("dense_bytes", "small_bytes", "largest_tensor_bytes", "peak", "anonymous")
    yield "checkpoint", *columns, "time", "÷ copy"
    for name, found in _results("streaming").items():
        if name == "digests":
            continue
        sizes = [_mb(found[key]) for key in (*keys, "anonymous_before")]
        yield name, *sizes, f"{found['seconds']:.0f} s", _x(found["ratio"])


def digests() -> Rows:
    """Digests of numbers, one row per dtype of the weights."""
    yield "weights", "÷ digest of bytes"
    for name, ratio in _results("streaming")["digests"].items():
        yield name, _x(ratio)


def bounded() -> Rows:
    """Searches of large random models: what they took, and what was said before."""
    yield "search", "memory", "of its own", "imports", "said before", "time", "said before"
    for case in ("limited", "streamed"):
        found = _results("bounded_search").get(case, {})
        for name, row in found.items():
            if name not in ("imports", "settings"):
                yield (
                    name, _mb(row["peak"]), _mb(row["anonymous"]),
                    _mb(found["imports"]["anonymous"]), _mb(row["estimate"]),
                    f"{row['seconds']:.0f} s", f"{row['estimated_seconds']:.0f} s",
                )  # fmt: skip


def steps() -> Rows:
    """Steps of the search on a real decoder, over their floor and beside an earlier version."""
    yield "Gemma 3 270M, 4 × 128 tokens", "time", "against", "ratio", "memory"
    found = _results("bounded_search").get("gemma", {})
    for name, what in (("known", "step, targets known"), ("new", "step, new targets")):
        if name in found:
            row = found[name]
            floor = f"{row['floor_seconds']:.2f} s, the floor"
            yield what, f"{row['seconds']:.2f} s", floor, _x(row["ratio"]), _mb(row["peak"])
    if "search before" in found:
        now, then = found["search"], found["search before"]
        against = f"{then['seconds']:.0f} s and {_mb(then['peak'])} before"
        ratio = _x(now["seconds"] / then["seconds"])
        yield "short search", f"{now['seconds']:.0f} s", against, ratio, _mb(now["peak"])


def half_precision() -> Rows:
    """Searches in bfloat16 beside two in float32: rank correlations, and members."""
    files = sorted(RESULTS.glob("half_precision_*.json"))
    yield "model", "", *(["rank correlation"] if files else []), "members"
    for file in files:
        record = json.loads(file.read_text())
        first, *_ = record["results"]["scores"]
        for name, sizes in record["results"]["scores"].items():
            pair = record["results"]["correlations"].get(f"{first} / {name}")
            metric = next(iter(sizes[0]))
            values = " / ".join(f"{size[metric]:.4f}" for size in sizes)
            same = "" if pair is None else f"{pair:.4f}"
            yield record["settings"]["model"], name, same, values


def rounding() -> Rows:
    """Figures of an older version beside today's, in the metric that compares with the dense."""
    found = _results("rounding")
    sizes = next(iter(found.values()))["sizes"] if found else []
    yield "model", "metric", "version", *dict.fromkeys(f"{size['keep']:.0%}" for size in sizes)
    for model, entry in found.items():
        metric = entry["sizes"][-1]["metric"]
        chosen = [size for size in entry["sizes"] if size["metric"] == metric]
        for when, commit in zip(("then", "now"), entry["commits"], strict=True):
            means = [statistics.fmean(size[when]) for size in chosen]
            yield model, metric, commit[:7], *(f"{mean:#.3g}" for mean in means)
        apart = [max(max(s[w]) - min(s[w]) for w in ("then", "now")) for s in chosen]
        yield "", "", "the seeds lie apart", *(f"{one:#.2g}" for one in apart)


TABLES: Mapping[str, Callable[[], Rows]] = {
    "streaming": streaming,
    "digests": digests,
    "bounded": bounded,
    "steps": steps,
    "half_precision": half_precision,
    "rounding": rounding,
}
"""Name to the rows of a table, its header first."""


def _results(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    return found


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _x(ratio: float) -> str:
    return f"{ratio:.2f} ×"
