"""What a GGUF file says of itself: its name, what was cut, the dense model, and its licence."""

from typing import Any

from torch import nn

from solpath.exporting.facts import sizes_of
from solpath.exporting.origin import origin_of
from solpath.planning.plan import plan_of


def write_origin(writer: Any, model: nn.Module) -> None:
    """Add the fields ``general...`` to a writer, with what the model card says of the dense model.

    Args:
        writer: A writer of gguf-py.
        model: The model that is written.
    """
    import gguf

    origin, sizes = origin_of(model), sizes_of(plan_of(model))
    kind, said = type(model).__name__, origin.license
    about = gguf.Metadata(name=f"{(origin.base or kind).rpartition('/')[2]} cut by solpath")
    about.license, about.license_name = said.get("license"), said.get("license_name")
    about.license_link = said.get("license_link")
    if sizes:
        dense, small = sizes["parameters"]
        share = f"{small / dense:.1%} of the {dense:,} parameters of a {kind}"
        about.description, about.tags = f"{share}, pruned by solpath.", ["pruned"]
    if origin.models:
        about.base_models = [_base_model(name) for name in origin.models]
    about.set_gguf_meta_model(writer)


def _base_model(name: str) -> dict[str, str]:
    organization, _, short = name.rpartition("/")
    found = {"name": short, "repo_url": f"https://huggingface.co/{name}"}
    return found | ({"organization": organization} if organization else {})
