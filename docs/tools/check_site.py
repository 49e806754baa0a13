"""Does the built site stand alone? Whatever a page loads must be one of its files.

python docs/tools/check_site.py build/docs
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
"""Attributes whose address a browser fetches by itself. Those of ``a`` wait for a click."""

PASSIVE = {"alternate", "author", "canonical", "license", "next", "prev"}
"""Kinds of ``link`` that nothing is fetched for."""

STYLE = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
REMOTE = re.compile(r"""["'`](https?:)?//[\w.-]+\.[a-z]{2,}/[^"'`]*""")
COMMENT = re.compile(r"/\*.*?\*/", re.S)

DORMANT = {
    "https://api.github.com/": "repo_url",
    "https://unpkg.com/mermaid": 'class="mermaid"',
    "https://unpkg.com/resize-observer-polyfill": None,  # for browsers from before 2020
}
"""What the theme's script only fetches for pages with this text (None: never nowadays)."""


class Loads(HTMLParser):
    """Collects the addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one element loads."""
        given = {name: value or "" for name, value in attrs}
        self.found += _styled(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").lower().split()) <= PASSIVE:
            return
        for name in LOADS.get(tag, ()):
            if name == "srcset":
                parts = given.get(name, "").split(",")
                self.found += [part.split()[0] for part in parts if part.strip()]
            elif given.get(name):
                self.found.append(given[name])


def problems(site: Path) -> Iterator[str]:
    """One line for each thing that does not come from the site."""
    pages = {page: page.read_text() for page in sorted(site.rglob("*.html"))}
    for page, text in pages.items():
        parser = Loads()
        parser.feed(text)
        parser.found += [
            a for style in re.findall(r"<style.*?</style>", text, re.S) for a in _styled(style)
        ]
        yield from _missing(site, page, parser.found)
    for style in sorted(site.rglob("*.css")):
        yield from _missing(site, style, _styled(style.read_text()))
    for script in sorted(site.rglob("*.js")):
        if script.name.startswith("search_index"):
            continue
        for match in REMOTE.finditer(COMMENT.sub("", script.read_text())):
            address = match[0].strip("\"'`")
            wanted = [text for start, text in DORMANT.items() if address.startswith(start)]
            if not wanted or (wanted[0] and any(wanted[0] in text for text in pages.values())):
                yield f"{script.relative_to(site)}: may fetch {address}"


def _styled(text: str) -> list[str]:
    return [a or b for a, b in STYLE.findall(COMMENT.sub("", text))]


def _missing(site: Path, file: Path, addresses: list[str]) -> Iterator[str]:
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme == "data" or not (parts.scheme or parts.netloc or parts.path):
            continue
        path = unquote(parts.path)
        local = site / path.lstrip("/") if path.startswith("/") else file.parent / path
        if parts.scheme or parts.netloc or not local.is_file():
            yield f"{file.relative_to(site)}: loads {address}, which is not in the site"


def main(site: Path) -> None:
    """Exit with every problem, or say that there is none."""
    pages = len(list(site.rglob("*.html")))
    if not pages:
        raise SystemExit(f"{site}: no pages here.")
    if found := list(problems(site)):
        raise SystemExit("\n".join(found))
    print(f"{pages} pages load nothing from elsewhere.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
