"""Draw the house of solpath from its real imports, and write the list of its rooms.

The floors are those of the contract `story` in .importlinter, the words are the first sentence of
every room's docstring, and the imports are read from the source.

python docs/draw/architecture.py            # after any change of them
python docs/draw/architecture.py --check    # fail if the pictures or the page show other ones
"""

import argparse
import ast
import configparser
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import grimp

from sheet import THEMES, Sheet, Theme, length, publish

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "solpath"
PAGE = ROOT / "docs" / "architecture.md"
TITLE = "The house of solpath"
WIDTH, GAP, PAD = 820, 10.0, 12.0
MAP_WIDTH, MAP_ROW = 46.0, 6.5  # of the small house in every room
BODY = 13.5
PHONE = 560  # pixels; below, names are large and sentences are left to the page


@dataclass(frozen=True)
class House:
    """What is drawn.

    Attributes:
        floors: names of rooms, from top to bottom.
        words: by room: the first sentence of its docstring.
        imports: by room: the rooms it imports, in the order of the floors.
    """

    floors: list[list[str]]
    words: dict[str, str]
    imports: dict[str, list[str]]


def main() -> None:
    """Write or check the pictures and the list."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    check = parser.parse_args().check
    house = read_house()
    publish({f"architecture-{t.name}.svg": picture(house, t) for t in THEMES}, check=check)
    page = PAGE.read_text(encoding="utf-8")
    mark = r"(<!-- rooms -->\n).*?(<!-- end -->)"
    new = re.sub(mark, lambda found: f"{found[1]}\n{rooms(house)}\n\n{found[2]}", page, flags=re.S)
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        raise SystemExit("docs/architecture.md has another list of rooms; run its script again.")


def read_house() -> House:
    """From .importlinter, the docstrings and the imports."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:story"]["layers"].split("\n")
    floors = [re.findall(r"\w+", layer) for layer in layers if layer.strip()]
    rooms = [room for floor in floors for room in floor]
    sys.path.insert(0, str(PACKAGE.parent))  # this checkout, whatever is installed
    graph = grimp.build_graph("solpath", cache_dir=None)
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            here, there = (name.split(".")[1:2] for name in (module, other))
            if here and there and here != there and here[0] in found:
                found[here[0]].update(there)
    return House(
        floors,
        {room: first_sentence(room) for room in rooms},
        {room: [other for other in rooms if other in found[room]] for room in rooms},
    )


def first_sentence(room: str) -> str:
    """Of the docstring of a package or a module."""
    file = PACKAGE / room / "__init__.py"
    file = file if file.exists() else PACKAGE / f"{room}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    text = " ".join(text.split()).replace("`", "")
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0].removesuffix(".")


def rooms(house: House) -> str:
    """The house in markdown, from top to bottom."""
    lines = []
    for room in (room for floor in house.floors for room in floor):
        imports = ", ".join(house.imports[room]) or "nothing"
        lines.append(f"- **`{room}`** {house.words[room]}. *Imports {imports}.*")
    return "\n".join(lines)


def picture(house: House, theme: Theme) -> str:
    """All floors; a small house in every room shows what it imports."""
    sheet = Sheet(WIDTH, TITLE, _description(house), theme)
    sheet.style(f"@media(min-width:{PHONE}px){{.s{{display:none}}}}")
    sheet.style(f"@media(max-width:{PHONE - 0.01}px){{.l{{display:none}}}}")
    y = _legend(sheet)
    for floor in house.floors:
        width = (WIDTH - GAP * (len(floor) - 1)) / len(floor)
        height = max(_height(house.words[room], width) for room in floor)
        for i, room in enumerate(floor):
            _room(sheet, house, room, i * (width + GAP), y, width, height)
        y += height + GAP
    return sheet.svg(y - GAP + 1)


def _legend(sheet: Sheet) -> float:
    """How to read it; returns where the first floor begins."""
    this, imported = ("this room", sheet.theme.ramp[5]), ("what it imports", sheet.theme.ramp[1])
    words = "Rooms import rooms on floors below them. In every room a small house shows"
    with sheet.group("l"):
        sheet.runs(0, 16, 14, (words, ""), this, ("and", ""), imported)
    with sheet.group("s"):
        sheet.runs(0, 22, 28, ("Imports go down:", ""), this, ("and", ""), imported)
    return 38.0


def _height(words: str, width: float) -> float:
    return max(len(_lines(words, width)) * 1.32 * BODY + 38, _map_height(9) + 2 * PAD)


def _lines(words: str, width: float) -> list[str]:
    """Lines of a sentence that flows around the small house in the corner."""
    full = width - 2 * PAD
    lines = [""]
    for word in words.split():
        beside = 30 + 1.32 * BODY * (len(lines) - 1) < PAD + _map_height(9)
        room = full - MAP_WIDTH - 8 if beside else full
        if lines[-1] and length(f"{lines[-1]} {word}", BODY) > room:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _room(
    sheet: Sheet, house: House, room: str, x: float, y: float, width: float, height: float
) -> None:
    theme = sheet.theme
    sheet.box(x + 0.5, y + 0.5, width - 1, height - 1, theme.card, radius=9, stroke=theme.line)
    corner = x + width - PAD - MAP_WIDTH
    with sheet.group("l"):
        sheet.text(x + PAD, y + 26, room, 16, bold=True)
        for i, line in enumerate(_lines(house.words[room], width)):
            where = y + 30 + 1.32 * BODY * (i + 1) - 3
            sheet.text(x + PAD, where, line, BODY, fill=theme.soft)
        _map(sheet, house, room, corner, y + PAD)
    with sheet.group("s"):
        sheet.text(x + PAD, y + 38, room, 31, bold=True)
        _map(sheet, house, room, corner, y + height - PAD - _map_height(len(house.floors)))


def _map(sheet: Sheet, house: House, room: str, x: float, y: float) -> None:
    """The house as small bars."""
    theme = sheet.theme
    places: dict[str, list[tuple[float, float, float, float]]] = {}
    for i, floor in enumerate(house.floors):
        width = (MAP_WIDTH - 2 * (len(floor) - 1)) / len(floor)
        for j, other in enumerate(floor):
            colour = theme.ramp[1] if other in house.imports[room] else theme.ghost
            colour = theme.ramp[5] if other == room else colour
            bar = (x + j * (width + 2), y + i * MAP_ROW, width, MAP_ROW - 2)
            places.setdefault(colour, []).append(bar)
    for colour, bars in places.items():
        sheet.boxes(bars, colour)


def _map_height(floors: int) -> float:
    return floors * MAP_ROW - 2


def _description(house: House) -> str:
    floors = "; ".join(", ".join(floor) for floor in house.floors)
    return f"{len(house.words)} rooms on {len(house.floors)} floors, from top to bottom: {floors}."


if __name__ == "__main__":
    main()
