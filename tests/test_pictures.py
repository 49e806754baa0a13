"""The pictures are what their scripts draw, and the page of the house names what exists."""

import ast
import importlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
DRAW, PICTURES = ROOT / "docs" / "draw", ROOT / "docs" / "pictures"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
PLACES = [span for span in SPANS if re.fullmatch(r"[\w/]+\.py(::[\w.]+)?", span)]
DOTTED = [span for span in SPANS if re.fullmatch(r"solpath(\.\w+)+", span)]


@pytest.mark.parametrize("script", ["architecture", "one_order"])
def test_a_picture_is_what_its_script_draws(script):
    command = [sys.executable, DRAW / f"{script}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_house_gives_another_picture(monkeypatch):
    """The guard above can fail."""
    monkeypatch.syspath_prepend(DRAW)
    architecture, sheet = (importlib.import_module(name) for name in ("architecture", "sheet"))
    house = architecture.read_house()
    drawn = architecture.picture(house, sheet.LIGHT)
    assert drawn == (PICTURES / "architecture-light.svg").read_text()
    house.imports["errors"].append("cli")
    assert architecture.picture(house, sheet.LIGHT) != drawn
    with pytest.raises(SystemExit, match=r"one-order-light\.svg is not what its script draws"):
        sheet.publish({"one-order-light.svg": drawn}, check=True)


def test_every_room_is_in_the_house(monkeypatch):
    monkeypatch.syspath_prepend(DRAW)
    house = importlib.import_module("architecture").read_house()
    package = ROOT / "src" / "solpath"
    rooms = {file.stem for file in package.iterdir() if re.fullmatch(r"[a-z]+(\.py)?", file.name)}
    assert {room for floor in house.floors for room in floor} == rooms
    assert all(house.words.values())


@pytest.mark.parametrize("file", sorted(PICTURES.glob("*.svg")), ids=lambda file: file.name)
def test_a_picture_stands_alone_and_can_be_read(file):
    """It asks for nothing from elsewhere, says what it shows, and its text is not tiny."""
    root = ElementTree.parse(file).getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert [child.tag for child in root[:2]] == [f"{name}title", f"{name}desc"]
    foreign = r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|<script"
    assert not re.search(foreign, file.read_text())
    shown = 358 if "narrow" in file.name else 700  # pixels on a phone, and on a page
    scale = min(1, shown / float(root.get("width")))
    assert min(float(text.get("font-size")) for text in root.iter(f"{name}text")) * scale > 9.9


def test_members_in_the_picture_are_nested():
    """Of every layer, a smaller member has no more than a larger one, and the strip adds up."""
    found = json.loads((ROOT / "benchmarks" / "results" / "one_order.json").read_text())["results"]
    members = [found["members"][keep] for keep in sorted(found["members"], key=float)]
    for small, large in pairwise(members):
        for one, other in zip(small["layers"], large["layers"], strict=True):
            assert one["attention"] <= other["attention"]
            assert one["mlp"] <= other["mlp"]
    layers = len(members[0]["layers"])
    for keep, member in found["members"].items():
        count = round(float(keep) * len(found["strip"]))
        for i, row in enumerate(member["layers"]):  # a third of each layer is attention
            share = (row["attention"] + 2 * row["mlp"]) / 3 * len(found["strip"]) / layers
            assert abs(found["strip"][:count].count(str(i)) - share) <= 1
    smallest = members[0]["params"] / members[-1]["params"]
    assert f"still has\n  {smallest:.0%} of all its parameters" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_the_page_names_files_and_what_is_in_them(place):
    file, _, name = place.partition("::")
    text = (ROOT / "src" / "solpath" / file).read_text()
    body = ast.parse(text).body
    for part in filter(None, name.split(".")):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{part} is not defined in {file}"
        body = found[0].body


@pytest.mark.parametrize("name", DOTTED)
def test_the_page_names_what_can_be_imported(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_the_page_names_anything():
    assert len(PLACES) > 20


def test_every_word_has_one_sentence():
    glossary = PAGE.partition("## Glossary")[2]
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", glossary, re.M)
    assert len(rows) > 15
    assert len({word for word, _ in rows}) == len(rows)
    for _, meaning in rows:
        assert re.fullmatch(r"[^.]+\.", meaning), meaning
