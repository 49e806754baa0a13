"""What the pictures share: two palettes, an SVG that any browser reads, and a check of the files.

An SVG is written as text, without fonts, times or random names, so that equal data give equal
bytes. Its background is transparent: the page shows through.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
NARROW, WIDE = 0.42, 0.8  # widths of letters, in ems; others are MEDIUM
MEDIUM = 0.56


@dataclass(frozen=True)
class Theme:
    """Colours of one mode.

    Attributes:
        name: ends the names of the files.
        ink: of what is read first.
        soft: of what is read second.
        line: of borders.
        ghost: of what is not there.
        card: of boxes.
        ground: about what the page has behind the picture.
        ramp: from the first to the last of things in order.
    """

    name: str
    ink: str
    soft: str
    line: str
    ghost: str
    card: str
    ground: str
    ramp: tuple[str, ...]


LIGHT = Theme(
    name="light",
    ink="#17222d",
    soft="#546270",
    line="#cfd8df",
    ghost="#e1e7ec",
    card="#f6f8fa",
    ground="#ffffff",
    ramp=("#1d4e89", "#0b7aa5", "#1fa08f", "#86b25b", "#eab23c", "#e4693f"),
)
DARK = Theme(
    name="dark",
    ink="#e9eef2",
    soft="#a3b0bb",
    line="#3b4650",
    ghost="#303b45",
    card="#1a2129",
    ground="#0d1117",
    ramp=("#5b8fd6", "#2fa4d4", "#35bba8", "#a0c877", "#f2c458", "#f08a63"),
)
THEMES = (LIGHT, DARK)


class Sheet:
    """An SVG that grows by one shape at a time.

    Args:
        width: units across, which are pixels at full size.
        title: what a screen reader says first.
        description: and what it says then.
    """

    def __init__(self, width: int, title: str, description: str, theme: Theme) -> None:
        self.width, self.theme = width, theme
        self._head = (title, description)
        self._shapes: list[str] = []

    def style(self, rule: str) -> None:
        """A rule of CSS. Widths in its media queries are those of the picture on the page."""
        self._shapes.append(f"<style>{rule}</style>")

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Shapes drawn in the block are of one class."""
        self._shapes.append(f'<g class="{name}">')
        yield
        self._shapes.append("</g>")

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        radius: float = 0,
        stroke: str = "",
    ) -> None:
        """A rectangle."""
        more = f' rx="{_n(radius)}"' if radius else ""
        more += f' stroke="{stroke}"' if stroke else ""
        size = f'width="{_n(width)}" height="{_n(height)}"'
        self._shapes.append(f'<rect x="{_n(x)}" y="{_n(y)}" {size} fill="{fill}"{more}/>')

    def boxes(self, places: Sequence[tuple[float, float, float, float]], fill: str) -> None:
        """Many rectangles of one colour: x, y, width, height."""
        path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in places)
        if path:
            self._shapes.append(f'<path d="{path}" fill="{fill}"/>')

    def line(self, *points: tuple[float, float], stroke: str, width: float = 1) -> None:
        """A line through points."""
        path = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        style = f'fill="none" stroke="{stroke}" stroke-width="{_n(width)}"'
        self._shapes.append(f'<path d="M{path}" {style}/>')

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """A disc."""
        centre = f'cx="{_n(x)}" cy="{_n(y)}"'
        self._shapes.append(f'<circle {centre} r="{_n(radius)}" fill="{fill}"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float,
        *,
        fill: str = "",
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        """One line of text; `y` is its base line, `anchor` is start, middle or end."""
        style = f'font-size="{_n(size)}" fill="{fill or self.theme.ink}"'
        style += ' font-weight="650"' if bold else ""
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._shapes.append(f'<text x="{_n(x)}" y="{_n(y)}" {style}>{escape(words)}</text>')

    def runs(self, x: float, y: float, size: float, *runs: tuple[str, str]) -> None:
        """One line of text whose runs have their own colours; coloured ones are bold."""
        spans = []
        for words, colour in runs:
            style = f' fill="{colour}" font-weight="650"' if colour else ""
            spans.append(f"<tspan{style}>{escape(words)}</tspan>")
        style = f'font-size="{_n(size)}" fill="{self.theme.soft}"'
        self._shapes.append(f'<text x="{_n(x)}" y="{_n(y)}" {style}>{" ".join(spans)}</text>')

    def paragraph(
        self, x: float, y: float, words: str, size: float, width: float, *, fill: str = ""
    ) -> float:
        """Text broken to `width`; returns where the next line would be."""
        for line in wrap(words, width, size):
            self.text(x, y, line, size, fill=fill)
            y += 1.32 * size
        return y

    def svg(self, height: float) -> str:
        """The whole picture, cut at `height`."""
        title, description = (escape(words) for words in self._head)
        size = f'width="{self.width}" height="{_n(height)}" viewBox="0 0 {self.width} {_n(height)}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">',
                f"<title>{title}</title>",
                f"<desc>{description}</desc>",
                *self._shapes,
                "</svg>\n",
            ]
        )


def length(words: str, size: float) -> float:
    """About how long a line of text is, a little too long rather than too short."""
    ems = [NARROW if c in " .,:;'ijltfI|()-" else WIDE if c in "mwMWO" else MEDIUM for c in words]
    return size * sum(ems)


def wrap(words: str, width: float, size: float) -> list[str]:
    """Lines that are at most `width` long."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def publish(pictures: Mapping[str, str], *, check: bool) -> None:
    """Write the pictures by file name, or fail if one is not what it would be."""
    for name, svg in pictures.items():
        file = PICTURES / name
        if not check:
            PICTURES.mkdir(exist_ok=True)
            file.write_text(svg, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != svg:
            raise SystemExit(f"docs/pictures/{name} is not what its script draws; run it again.")


def _n(value: float) -> str:
    """Two decimals at most, and no more digits than it takes."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))
