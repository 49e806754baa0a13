"""Targets: the constraints under which one runtime can hold a cut model.

A target is a named set of constraints. Which set it is depends on the class of the model and on its
pairs, and some models cannot be cut for some targets:

- ``"onnx"``, ``"openvino"``: any widths but 0, on which both fail; channels in multiples of 8, for
  speed.
- ``"vllm"``: decoders in its transformers backend, widths of their own in every layer; channels of
  heads in multiples of 8.
- ``"stock"``: what the classes of transformers hold exactly, with a changed configuration and
  nothing else: one width of MLPs; and where the class has a `head_dim`, one width of heads, which
  for rotary queries and keys also needs the same couples in all of them, or, if `whole_groups` is
  asked for, one number of whole heads.
- ``"gguf"``: llama.cpp's architecture ``deci``: MLPs of their own width in every layer, in
  multiples of 32; attention stays whole, or loses whole heads if `whole_groups` is asked for.
"""

import re
from collections.abc import Callable, Sequence

from solpath.errors import ConfigError
from solpath.pair import Pair
from solpath.planning.constraints import Constraints

_ROTARY = ("Llama", "Mistral", "Qwen2", "Gemma")
_NORMED = ("Qwen3", "Gemma3")
_HEAD_DIM = ("ViT", "DeiT", "T5")
_RATIO = ("Dinov2", "Dinov2WithRegisters")
_ONE_MLP = ("Bert", "Electra", "DistilBert", "GPT2", "OPT", "CLIP", "Siglip", "Whisper")
_DECI = ("Llama", "Mistral", "Qwen2")

_ALIGNED = 8  # channels


def _run_time(architecture: str, pairs: Sequence[Pair], whole: bool) -> Constraints | str:
    """Return the constraints of runtimes that take any shape without an empty dimension."""
    return Constraints(multiple_of=_aligned(pairs), min_width=1)


def _vllm(architecture: str, pairs: Sequence[Pair], whole: bool) -> Constraints | str:
    if not architecture.endswith("ForCausalLM"):
        return f"{architecture} is no decoder of text (…ForCausalLM)"
    if any(pair.kind == "experts" for pair in pairs):
        return "vLLM runs experts in kernels of its own, which need their dense layout"
    return Constraints(multiple_of=_aligned(pairs), min_width=1)


def _gguf(architecture: str, pairs: Sequence[Pair], whole: bool) -> Constraints | str:
    if not architecture.endswith("ForCausalLM") or _family(architecture) not in _DECI:
        names = ", ".join(f"{name}ForCausalLM" for name in _DECI)
        return f"the architecture deci of llama.cpp holds {names}"
    protect = () if whole else _attentions(pairs)
    return Constraints(multiple_of={"mlp": 32}, min_width={"mlp": 1}, protect=protect)


def _stock(architecture: str, pairs: Sequence[Pair], whole: bool) -> Constraints | str:
    family = _family(architecture)
    if family == "T5" and whole:
        return "all layers of T5 share one bias for every head, so they cannot lose heads apart"
    if family == "Qwen3" and whole:  # that of Gemma 3 must divide the hidden size
        return Constraints(uniform=True, min_width=1)
    if family in _ROTARY:
        return Constraints(uniform=True, tied_widths=True, shared_couples=True, min_width=1)
    if family in _RATIO:
        plain = [pair for pair in pairs if pair.kind == "mlp" and len(pair.left) == 1]
        if len(plain) < sum(pair.kind == "mlp" for pair in pairs):
            return "the width of the gated MLPs of DINOv2 is no setting of their own"
        hidden = (plain[0].cost - 1) // 2  # the configuration has a whole number of these
        return Constraints(multiple_of={"mlp": hidden}, min_width=1, uniform=True, tied_widths=True)
    if family in _HEAD_DIM:
        return Constraints(uniform=True, tied_widths=True, min_width=1)
    if family in (*_ONE_MLP, *_NORMED):
        return Constraints(uniform=("mlp",), min_width={"mlp": 1}, protect=_attentions(pairs))
    return f"no class of transformers is known that holds a cut {architecture} exactly"


_TARGETS: dict[str, Callable[[str, Sequence[Pair], bool], Constraints | str]] = {
    "onnx": _run_time,
    "openvino": _run_time,
    "vllm": _vllm,
    "stock": _stock,
    "gguf": _gguf,
}
_NEAREST = {"stock": ("vllm", "onnx"), "gguf": ("stock", "onnx"), "vllm": ("stock", "onnx")}

TARGETS = tuple(_TARGETS)
"""The names of all targets."""


def targets_of(
    architecture: str,
    pairs: Sequence[Pair],
    unreached: Sequence[str] = (),
    *,
    whole_groups: bool = False,
) -> dict[str, Constraints | str]:
    """Return the constraints of every target for one model, or why it is not possible.

    Args:
        architecture: Class name of the dense model.
        pairs: Its pairs.
        unreached: Names of the pairs that stay whole because no batch reached them.
        whole_groups: Whether attentions are to lose whole heads.

    Example:
        >>> found = targets_of("BertForSequenceClassification", path.pairs)
        >>> found["stock"].uniform, found["vllm"]
        (('mlp',), 'BertForSequenceClassification is no decoder of text (…ForCausalLM)')
    """
    return {
        name: _checked(make(architecture, pairs, whole_groups), pairs, unreached)
        for name, make in _TARGETS.items()
    }


def drops_heads(found: Constraints | str, pairs: Sequence[Pair]) -> bool:
    """Return whether attentions lose whole heads under a target.

    Args:
        found: What `targets_of` says of the target, asked with `whole_groups`.
        pairs: The pairs of the model.
    """
    attentions = [pair for pair in pairs if pair.kind in ("qk", "vo")]
    return isinstance(found, Constraints) and not all(map(found.protects, attentions))


def constraints_for(
    target: str,
    architecture: str,
    pairs: Sequence[Pair],
    unreached: Sequence[str] = (),
    *,
    whole_groups: bool = False,
) -> Constraints:
    """Return the constraints of one target for one model.

    Args:
        target: Name of the target.
        architecture: Class name of the dense model.
        pairs: Its pairs.
        unreached: See `targets_of`.
        whole_groups: See `targets_of`.

    Raises:
        ConfigError: The target is unknown, or is not possible for the model; the message names the
            nearest that is.
    """
    if target not in _TARGETS:
        raise ConfigError(f"for_ must be one of {', '.join(TARGETS)}; got {target!r}.")
    found = targets_of(architecture, pairs, unreached, whole_groups=whole_groups)
    own = found[target]
    if isinstance(own, Constraints):
        return Constraints(target=target).tightened(own)
    for name in _NEAREST.get(target, ()):
        if isinstance(found[name], Constraints):
            raise ConfigError(f"target {target!r}: {own}; the nearest possible is {name!r}.")
    raise ConfigError(f"target {target!r}: {own}; no other is possible.")


def _checked(
    found: Constraints | str, pairs: Sequence[Pair], unreached: Sequence[str]
) -> Constraints | str:
    """Return the constraints, or why the pairs of a model cannot respect them."""
    if isinstance(found, str):
        return found
    try:
        found.check(pairs, unreached)
        found.teams(pairs)
    except ConfigError as error:
        return str(error).removesuffix(".")
    return found


def _family(architecture: str) -> str:
    """Return the family in the name of a class, such as ``"Llama"``; empty if it is not known."""
    rest = r"(For|LMHead|DoubleHeads|(Text|Vision|Encoder)?Model).*"
    families = (*_ROTARY, *_NORMED, *_HEAD_DIM, *_RATIO, *_ONE_MLP)
    return next((name for name in families if re.fullmatch(name + rest, architecture)), "")


def _aligned(pairs: Sequence[Pair]) -> dict[str, int]:
    """Return for every kind how many units come to a multiple of 8 channels in all its pairs."""
    found: dict[str, int] = {}
    for pair in pairs:
        found[pair.kind] = max(found.get(pair.kind, 1), _ALIGNED // pair.channels)
    return found


def _attentions(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the patterns of all pairs of attentions that there are."""
    kinds = {pair.kind for pair in pairs}
    return tuple(f"*.{kind}" for kind in ("qk", "vo") if kind in kinds)
