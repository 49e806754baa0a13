"""The tokenizer of a GGUF file, from a fast tokenizer of transformers."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from solpath.errors import ExportError

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CASES}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CASES}|{_LETTERS}|\p{{N}}|{_REST}"
_PRE = {  # how texts are split, and whether whole tokens need no merges, to llama.cpp's name
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
}
_SPACE = "\u2581"  # what sentencepiece writes for a space
_NEUTRAL = (None, "", False)
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokens.

    Attributes:
        model: ``"gpt2"`` for byte-level pairs, ``"llama"`` for sentencepiece.
        pre: llama.cpp's name of the way in which texts are split before merging.
        tokens: All tokens by number, one for every row of the embeddings.
        types: Their kinds, in gguf's numbers.
        special: Numbers of special tokens by role: ``"bos"``, ``"eos"``, ``"unk"``, ``"pad"``.
        adds: Whether texts get ``"bos"`` before and ``"eos"`` after them.
        template: The chat template, or None.
        scores: What merges first, for ``"llama"``; else empty.
        merges: Merges in order, for ``"gpt2"``; else empty.
        prefix: Whether texts get a space before them, for ``"llama"``.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    adds: dict[str, bool]
    template: str | None
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    prefix: bool = False


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Say in llama.cpp's words what a tokenizer does.

    Args:
        tokenizer: A fast tokenizer of transformers. It is left untouched.
        size: The number of rows of the embeddings. Rows without a token get an unused one.

    Raises:
        ExportError: llama.cpp has no tokenizer that would give the same tokens. The message names
            the part that differs.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"GGUF is written from fast tokenizers, and {type(tokenizer).__name__} is none."
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise _unknown("model", model.get("type"))
    odd = [
        name
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name) not in _NEUTRAL
    ]
    if odd:
        raise _unknown(odd[0], model[odd[0]])
    tokens, types = _tokens(tokenizer, parts, size)
    special, adds, template = _special(tokenizer), _adds(tokenizer), tokenizer.chat_template
    if not isinstance(template, str | None):
        raise ExportError(f"the tokenizer has {len(template)} chat templates; choose one.")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(tokens, types, merges)
        kind = Vocabulary("llama", "default", tokens, types, special, adds, template)
        return replace(kind, scores=scores, prefix=_prefix(parts))
    if "eos" not in special:
        raise ExportError("the tokenizer has no eos_token, and llama.cpp would stop at another.")
    pairs = [" ".join(merge) for merge in merges]
    return Vocabulary("gpt2", _pre(parts), tokens, types, special, adds, template, merges=pairs)


def write_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Add the keys of a vocabulary to a writer of gguf-py; None says that there is no tokenizer."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    for role, whether in vocabulary.adds.items():
        getattr(writer, f"add_add_{role}_token")(whether)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _tokens(tokenizer: Any, parts: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return all tokens and their kinds."""
    from gguf import TokenType

    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(known) >= size:
        raise ExportError(
            f"the tokenizer has tokens up to {max(known)}, and the model {size} rows of embeddings."
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _unknown(f"added token {token['content']!r}", "strips spaces, or stands alone")
    fallback = bool(parts["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(size):
        token = known.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif fallback and token == parts["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        elif number in added:
            hidden = added[number]["special"] or (token.startswith("<|") and token.endswith("|>"))
            kind = TokenType.CONTROL if hidden else TokenType.USER_DEFINED
        else:
            kind = TokenType.BYTE if fallback and token in _BYTES else TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    if len(set(tokens)) < size:
        raise ExportError("two tokens of the vocabulary have one name.")
    return tokens, types


def _pre(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of how byte-level texts are split."""
    normalizer = parts["normalizer"]
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _unknown("normalizer", normalizer.get("type"))
    steps = _steps(parts["pre_tokenizer"])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown("pre_tokenizer", last.get("type"))
    whole = bool(parts["model"].get("ignore_merges"))
    kinds = [step["type"] for step in steps]
    regex, name = None, None
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        regex = steps[0]["pattern"].get("Regex")
        if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            name = _PRE.get((regex, whole))
    elif kinds == ["ByteLevel"] and last["use_regex"] and not whole:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and last["use_regex"] and not whole:
        name = "smollm" if steps[0]["individual_digits"] else None
    if name is None:
        raise _unknown("pre_tokenizer", regex or ", ".join(kinds))
    return name


def _prefix(parts: dict[str, Any]) -> bool:
    """Return whether a sentencepiece-like tokenizer puts a space before texts."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = {"type": "Prepend", "prepend": _SPACE}
    normalizers, steps = _steps(parts["normalizer"]), _steps(parts["pre_tokenizer"])
    if not steps and normalizers in ([before, spaces], [spaces]):
        return len(normalizers) == 2
    alone = len(steps) == 1 and not normalizers and steps[0]["type"] == "Metaspace"
    if alone and steps[0]["replacement"] == _SPACE and not steps[0]["split"]:
        return str(steps[0]["prepend_scheme"]) != "never"
    kinds = [part.get("type") for part in (*normalizers, *steps)]
    raise _unknown("normalizer and pre_tokenizer", ", ".join(map(str, kinds)))


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges.

    It merges two neighbours whenever their text is a token, that of the highest score first. So all
    ways to make a token must be merges, and must follow each other.
    """
    from gguf import TokenType

    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in ranks and token != last:
            raise _unknown("merges", f"those that make {token!r} do not follow each other")
        ranks.setdefault(token, rank)
        last = token
    usual = {t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    pairs = {(left, right) for left, right in merges}
    for token in usual:
        for place in range(1, len(token)):
            split = (token[:place], token[place:])
            if usual.issuperset(split) and split not in pairs:
                raise _unknown("merges", f"{split[0]!r} and {split[1]!r} do not merge")
    return [-float(ranks.get(token, len(merges))) if token in usual else 0.0 for token in tokens]


def _special(tokenizer: Any) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    return {role: number for role, number in found.items() if number is not None}


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Return which special tokens a text gets around it, as seen on one."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    for before in (False, True):
        for after in (False, True):
            around = [tokenizer.bos_token_id] * before + bare + [tokenizer.eos_token_id] * after
            if full == around:
                return {"bos": before, "eos": after}
    raise _unknown("post_processor", f"it makes {full} of {bare}")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, which may be one, several or none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return list(part.get("pretokenizers") or part.get("normalizers") or [])


def _unknown(part: str, value: object) -> ExportError:
    return ExportError(
        f"llama.cpp has no tokenizer like this one, by its {part}: {value}. Export without "
        "tokenizer=, and give llama.cpp token numbers."
    )
