"""The families whose cut models have classes in `modeling`, and the file that holds them."""

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

_ROOM = "solpath.exporting.modeling"


@dataclass(frozen=True)
class Family:
    """The classes of one `model_type`; those of cut models begin with ``Solpath``.

    Attributes:
        module: Name of the file in `modeling`.
        config: Name of the stock configuration class.
        classes: Names of the stock model classes to the Auto classes that load them.
    """

    module: str
    config: str
    classes: Mapping[str, str]

    @property
    def file(self) -> str:
        """Name of the file in an exported folder."""
        return f"modeling_solpath_{self.module}.py"

    def cut_class(self, stock: str) -> Any:
        """Return the class of cut models, or of their configuration, for a stock class."""
        return getattr(import_module(f"{_ROOM}.{self.module}"), f"Solpath{stock}")


def _decoder(module: str, name: str, inner: str = "") -> Family:
    inner = inner or name
    classes = {f"{inner}Model": "AutoModel", f"{name}ForCausalLM": "AutoModelForCausalLM"}
    return Family(module, f"{inner}Config", classes)


_BERT = {
    "BertModel": "AutoModel",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForTokenClassification": "AutoModelForTokenClassification",
}
_VIT = {"ViTModel": "AutoModel", "ViTForImageClassification": "AutoModelForImageClassification"}
_T5 = {
    "T5Model": "AutoModel",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
FAMILIES = {
    "bert": Family("bert", "BertConfig", _BERT),
    "gemma3_text": _decoder("gemma3", "Gemma3", "Gemma3Text"),
    "gpt2": Family(
        "gpt2",
        "GPT2Config",
        {"GPT2Model": "AutoModel", "GPT2LMHeadModel": "AutoModelForCausalLM"},
    ),
    "llama": _decoder("llama", "Llama"),
    "mistral": _decoder("mistral", "Mistral"),
    "qwen2": _decoder("qwen2", "Qwen2"),
    "qwen3": _decoder("qwen3", "Qwen3"),
    "t5": Family("t5", "T5Config", _T5),
    "vit": Family("vit", "ViTConfig", _VIT),
}
"""The `model_type` of dense models to their family."""


@cache
def written_out(module: str) -> str:
    """Return the source of a file in `modeling`, with what it imports from the others written out.

    It is the same for every model of a family: nothing of a model, nor of a folder, goes into it.

    Args:
        module: Name of the file.
    """
    imports: dict[str, set[str]] = {}
    bodies: list[str] = []
    _collect(module, imports, bodies, set())
    groups = ["\n".join(_statements(imports, outer)) for outer in (False, True)]
    docstring = ast.get_docstring(ast.parse(_source(module)))
    source = "\n\n".join([f'"""{docstring}"""', *groups]) + "\n"
    return re.sub(r"  # type: ignore.*", "", "\n\n".join([source, *bodies]))


def _source(module: str) -> str:
    return files(_ROOM).joinpath(f"{module}.py").read_text(encoding="utf-8")


def _collect(module: str, imports: dict[str, set[str]], bodies: list[str], seen: set[str]) -> None:
    """Add the imports and the body of a file, after those of the files of the room it imports.

    Imports are added as modules to the names that are taken from them, or to none.
    """
    seen.add(module)
    source = _source(module)
    statements = ast.parse(source).body[1:]  # after the docstring
    for node in statements:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom):
            place, names = node.module or "", {alias.name for alias in node.names}
            if not place.startswith(f"{_ROOM}."):
                imports.setdefault(f"{place} ", set()).update(names)
            elif (inner := place.removeprefix(f"{_ROOM}.")) not in seen:
                _collect(inner, imports, bodies, seen)
    last = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    bodies.append("\n".join(source.splitlines()[last.end_lineno :]).lstrip("\n") + "\n")


def _statements(imports: Mapping[str, set[str]], outer: bool) -> list[str]:
    """Return the sorted statements that import the standard library, or what is outside of it."""
    lines = {False: list[str](), True: list[str]()}
    for place, names in sorted(imports.items()):
        if (place.strip().partition(".")[0] not in sys.stdlib_module_names) is outer:
            line = f"from {place}import {', '.join(sorted(names))}" if names else f"import {place}"
            lines[bool(names)].append(line)
    return lines[False] + lines[True]
