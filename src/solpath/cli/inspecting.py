"""The command that says what can be pruned in a model, and what a search would need."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import Json, ModelName, Precision
from solpath.cli.terminal import print_json, print_table


@app.command()
def inspect(
    model: ModelName,
    targets: Annotated[
        bool, typer.Option("--targets", help="List the runtimes that plan --for takes instead.")
    ] = False,
    dtype: Annotated[Precision, typer.Option(help="Dtype that it would be searched in.")] = (
        Precision.AUTO
    ),
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch; default 16 texts, 32 images.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per text.", min=1)] = 128,
    as_json: Json = False,
) -> None:
    """List what can be pruned in a model, and what a search would need, or the runtimes."""
    from solpath.model.discovery import survey
    from solpath.pretrained import from_pretrained

    loaded = from_pretrained(model, device="meta", dtype=dtype.dtype)
    total = sum(parameter.numel() for parameter in loaded.parameters())
    pairs, sites = survey(loaded)
    if targets:
        by_head = all(site.table.by_head for site in sites)
        return _print_targets(type(loaded).__name__, pairs, by_head, as_json)
    found: list[dict[str, Any]] = [
        {
            "pair": pair.name,
            "kind": pair.kind,
            "heads": pair.heads,
            "width": pair.width,
            "cost": pair.cost,
            "share": pair.units * pair.cost / total,
        }
        for pair in pairs
    ]
    prunable = sum(pair.units * pair.cost for pair in pairs)
    needs, missing = _needs(loaded, pairs, batch_size, length)
    if as_json:
        counts = {"params": total, "prunable": prunable, "pairs": found}
        return print_json(counts | {"search": needs})
    rows = [
        (p["pair"], f"{p['heads']} × {p['width']}", f"{p['cost']:,}", f"{p['share']:.2%}")
        for p in found
    ]
    print_table(("pair", "heads × width", "cost per unit", "share of parameters"), rows)
    print(f"{prunable:,} of {total:,} parameters are prunable ({prunable / total:.1%}).")
    if missing:
        return print(missing)
    from solpath.searching.estimate import size

    shown = [
        (need["machine"], "" if need["bytes"] is None else size(need["bytes"]), need["how"])
        for need in needs
    ]
    print_table(("a search on", "memory", "how"), shown)


def _needs(
    model: Any, pairs: Sequence[Any], batch_size: int | None, length: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Return what a search needs here and on some GPUs, or why that is not known."""
    import torch

    from solpath.data.feeding import takes
    from solpath.errors import UnsupportedModelError
    from solpath.running.memory import free_memory
    from solpath.searching.forecast import forecast

    longest = getattr(model.config, "max_position_embeddings", None) or length
    samples = batch_size or (32 if "image" in takes(model) else 16)
    try:
        found = forecast(model, pairs, tokens=min(length, longest), samples=samples)
    except UnsupportedModelError as error:
        return [], str(error)
    places = [("this CPU", free_memory(torch.device("cpu")), True)]
    for i in range(torch.cuda.device_count()):
        place = f"this GPU, {torch.cuda.get_device_name(i)}"
        places.append((place, free_memory(torch.device("cuda", i)), False))
    places += [(f"a GPU of {n} GB", n * 10**9, False) for n in (8, 24, 80)]
    rows = []
    for name, free, disk in places:
        count, how = found.on(free, disk=disk)
        rows.append({"machine": name, "free": free, "bytes": count, "how": how})
    return rows, None


def _print_targets(architecture: str, pairs: Sequence[Any], by_head: bool, as_json: bool) -> None:
    """Print the constraints of every target for a model, or why it is not possible.

    Args:
        architecture: Class name of the model.
        pairs: Its pairs.
        by_head: Whether its attentions can lose whole heads.
        as_json: Whether to print JSON.
    """
    from solpath.planning.targets import drops_heads, targets_of

    found = targets_of(architecture, pairs)
    whole = targets_of(architecture, pairs, whole_groups=True)
    heads = {name: by_head and drops_heads(value, pairs) for name, value in whole.items()}
    if as_json:
        return print_json(
            {
                name: {"whole_heads": heads[name]}
                | ({"impossible": value} if isinstance(value, str) else value.to_dict())
                for name, value in found.items()
            }
        )
    rows = [
        (
            name,
            "no" if isinstance(value, str) else "yes",
            "yes" if heads[name] else "no",
            str(value),
        )
        for name, value in found.items()
    ]
    print_table(("target", "possible", "whole heads", "constraints, or what is in the way"), rows)
