"""Draw *one order, many cuts* from a real search, on the model of the README.

python docs/draw/one_order.py            # from benchmarks/results/one_order.json
python docs/draw/one_order.py --check    # fail if the pictures are not what it says
python docs/draw/one_order.py --search   # search again first: a minute or two on one core
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from sheet import THEMES, Sheet, Theme, publish

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "one_order.json"
SLICES = 100  # of the order, each an equal share of the prunable parameters
KEEPS = (1.0, 0.8, 0.6, 0.4, 0.25)
TITLE = "One order, many cuts"
NOTE = (
    "A real search of all-MiniLM-L6-v2; keep is the share of the prunable parameters that stays. "
    "In every layer: MLP (thick) and attention (thin); areas are parameters, grey is cut."
)
MLP, ATTENTION, SEAM, GAP = 12.0, 6.0, 1.0, 4.0  # heights in a stack; areas are parameters
BLOCK = MLP + ATTENTION + SEAM


def main() -> None:
    """Write or check the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    parser.add_argument("--search", action="store_true", help="search again first")
    options = parser.parse_args()
    if options.search:
        record()
    found = json.loads(RECORD.read_text())["results"]
    pictures = {}
    for theme in THEMES:
        pictures[f"one-order-{theme.name}.svg"] = wide(found, theme)
        pictures[f"one-order-narrow-{theme.name}.svg"] = narrow(found, theme)
    publish(pictures, check=options.check)


def record() -> None:
    """One default search of all-MiniLM-L6-v2: which layer every slice is of, and five members."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch

    import solpath
    from record import save
    from workloads import workload

    torch.set_num_threads(1)
    work = workload("minilm", None, heldout=32)
    batches = work.batches(0, 256, work.batch_size)
    path = solpath.search(work.model, batches, solpath.SearchConfig(seed=0))
    layer = {pair.name: int(pair.name.split(".")[2]) for pair in path.pairs}
    plans = {keep: path.plan(sparsity=1 - keep) for keep in KEEPS}
    members = {
        f"{keep:g}": {
            "sparsity": plan.achieved.sparsity,
            "params": plan.achieved.params,
            "macs_share": plan.achieved.macs_share,
            "layers": _shares(path.pairs, plan.widths, layer),
        }
        for keep, plan in plans.items()
    }
    results = {
        "units": sum(pair.units for pair in path.pairs),
        "prunable": path.costs.prunable(path.pairs),
        "strip": _strip(path, layer),
        "members": members,
    }
    settings = {"model": work.name, "seed": 0, "batch_size": work.batch_size, "batch_count": 256}
    settings |= {"config": dict(path.config), "data": work.data}
    save(RECORD, settings, results)


def _shares(pairs: Any, widths: Any, layer: dict[str, int]) -> list[dict[str, float]]:
    """Of each layer: the share of the parameters in attention, and in the MLP, that is kept."""
    rows = []
    for i in range(max(layer.values()) + 1):
        own = [pair for pair in pairs if layer[pair.name] == i]
        row = {}
        for name, part in (
            ("attention", [pair for pair in own if pair.kind != "mlp"]),
            ("mlp", [pair for pair in own if pair.kind == "mlp"]),
        ):
            kept = sum(pair.heads * widths[pair.name] * pair.cost for pair in part)
            row[name] = round(kept / sum(pair.units * pair.cost for pair in part), 4)
        rows.append(row)
    return rows


def _strip(path: Any, layer: dict[str, int]) -> str:
    """A layer for every slice, so that any beginning has what it has of each, to one slice."""
    left = [0.0] * (max(layer.values()) + 1)
    slices = []
    kept = [path.plan(sparsity=1 - k / SLICES).widths if k else {} for k in range(SLICES + 1)]
    for before, after in pairwise(kept):
        for pair in path.pairs:
            more = after[pair.name] - before.get(pair.name, 0)
            left[layer[pair.name]] += pair.heads * more * pair.cost
        chosen = max(range(len(left)), key=left.__getitem__)
        left[chosen] -= path.costs.prunable(path.pairs) / SLICES
        slices.append(str(chosen))
    return "".join(slices)


def wide(found: dict[str, Any], theme: Theme) -> str:
    """The order on top; every cut drops to the model it gives."""
    sheet = Sheet(880, TITLE, _description(found), theme)
    x, across, stack = 0.0, 820.0, 110.0
    sheet.text(x, 24, f"One search puts all {found['units']:,} units in order.", 19, bold=True)
    sheet.text(x, 50, "kept longest", 13, fill=theme.soft)
    sheet.text(x + across, 50, "first to go", 13, fill=theme.soft, anchor="end")
    top, height = 60.0, 46.0
    _order(sheet, found["strip"], x, top, across, height)

    words = "Cut it anywhere: every cut is a smaller model, inside the larger ones."
    sheet.text(x, 144, words, 19, bold=True)
    thin, foot = 11.0, 262.0
    below = foot + len(theme.ramp) * (BLOCK + GAP) + 15
    for i, keep in enumerate(KEEPS):
        end, y = x + keep * across - 0.5, 160.0 + 17 * (i - 1)
        member = found["members"][f"{keep:g}"]
        start = y + thin if i else top + height
        if i:
            _order(sheet, found["strip"], x, y, keep * across, thin, keep)
            sheet.line((end, top - 5), (end, top + height + 5), stroke=theme.ink, width=2)
        sheet.line((end, start + 3), (end, foot - 6), stroke=theme.soft)
        _stack(sheet, member, end + 0.5 - stack, foot, stack)
        middle = end - stack / 2
        sheet.text(middle, below, _name(keep), 17, bold=True, anchor="middle")
        sheet.text(middle, below + 19, _size(member), 13, fill=theme.soft, anchor="middle")
    for i, colour in enumerate(theme.ramp):
        y = foot + (len(theme.ramp) - 1 - i) * (BLOCK + GAP) + 14
        sheet.text(x + across + 9, y, f"layer {i + 1}", 12.5, fill=colour, bold=True)
    y = sheet.paragraph(x, below + 50, NOTE, 13, 880, fill=theme.soft)
    return sheet.svg(y - 6)


def narrow(found: dict[str, Any], theme: Theme) -> str:
    """One row for every size: so much of the order, and the model it gives."""
    sheet = Sheet(390, TITLE, _description(found), theme)
    x, across, stack = 4.0, 244.0, 104.0
    right = 390 - stack - 4
    y = 24.0
    for words in (f"One search puts all {found['units']:,} units", "in order. Cut it anywhere."):
        sheet.text(x, y, words, 19, bold=True)
        y += 25
    sheet.text(x, y + 4, "kept longest", 14, fill=theme.soft)
    sheet.text(x + across, y + 4, "first to go", 14, fill=theme.soft, anchor="end")
    y += 14
    for keep in KEEPS:
        member = found["members"][f"{keep:g}"]
        sheet.box(x, y, across, 40, theme.ghost)
        _order(sheet, found["strip"], x, y, keep * across, 40, keep)
        sheet.text(x, y + 65, _name(keep), 18, bold=True)
        sheet.text(x + across, y + 65, _size(member), 15, fill=theme.soft, anchor="end")
        _stack(sheet, member, right, y, stack, 0.6)
        y += 102
    y = sheet.paragraph(x, y + 8, NOTE, 14, 386, fill=theme.soft)
    return sheet.svg(y - 6)


def _name(keep: float) -> str:
    return "dense" if keep == 1 else f"keep {keep:.0%}"


def _size(member: dict[str, Any]) -> str:
    return f"{member['params'] / 1e6:.1f} M parameters"


def _order(
    sheet: Sheet, strip: str, x: float, y: float, width: float, height: float, keep: float = 1
) -> None:
    """The first `keep` of the order, one bar a slice, in the colours of the layers."""
    count = round(keep * len(strip))
    step = width / count
    bar = step - min(1.2, 0.2 * step)
    for layer, colour in enumerate(sheet.theme.ramp):
        own = [i for i in range(count) if strip[i] == str(layer)]
        sheet.boxes([(x + i * step, y, bar, height) for i in own], colour)


def _stack(
    sheet: Sheet, member: dict[str, Any], x: float, y: float, width: float, scale: float = 1
) -> None:
    """A model: of each layer the MLP over the attention, as wide as what is kept of it."""
    for layer, row in reversed([*enumerate(member["layers"])]):
        for name, height in (("mlp", scale * MLP), ("attention", scale * ATTENTION)):
            kept = row[name] * width
            if kept < width:
                sheet.box(x, y, width, height, sheet.theme.ghost, radius=2)
            if kept:
                left = x + (width - kept) / 2
                sheet.box(left, y, kept, height, sheet.theme.ramp[layer], radius=2)
            y += height + scale * SEAM
        y += scale * (GAP - SEAM)


def _description(found: dict[str, Any]) -> str:
    sizes = ", ".join(f"{keep:.0%}" for keep in KEEPS[1:])
    return (
        f"A strip of the {found['units']:,} units of all-MiniLM-L6-v2 in the order that one search "
        f"gave, coloured by layer. Cut at {sizes} of the prunable parameters, its beginnings give "
        "models with the same layers, each narrower; every smaller one is inside the larger ones."
    )


if __name__ == "__main__":
    main()
