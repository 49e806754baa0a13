"""Docstrings as the site shows them.

A docstring says `search` or `SolutionPath.plan`, and docs/method.md: on the site these are links to
the entry of the name and to the page. ``Example:`` becomes a section of the reference, and an entry
for several names, as in ``query, key: layers``, becomes one for each.
"""

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parents[1]
ENTRY = re.compile(r"^::: ([\w.]+)", re.M)
NAME = re.compile(r"(?<![`\w])`([A-Za-z_]\w*(?:\.\w+)*)`(?!`)")
PAGE = re.compile(r"\bdocs/([a-z-]+)\.md\b")
RESULTS = ("Achieved", "Choice", "CurvePoint", "Measurement", "Pair", "Result")
"""Classes that public functions return, wherever they are defined."""
SEVERAL = re.compile(r"^(    )((?:\w+, )+\w+): ")


class References(griffe.Extension):
    """Rewrites the docstrings once the package has been read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Link what every docstring of `pkg` names."""
        for thing in list(_own(pkg)):
            if thing.is_class and thing.name in RESULTS:
                pkg.set_member(thing.name, griffe.Alias(thing.name, thing))
        entries = _entries(pkg)
        for thing in _own(pkg):
            if thing.is_module:
                _know_errors(thing, pkg)
            if thing.docstring:
                text = _apart(re.sub(r"^Example:$", "Examples:", thing.docstring.value, flags=re.M))
                thing.docstring.value = _linked(text, entries)


def _entries(pkg: griffe.Module) -> dict[str, str]:
    """What docstrings call the entries of the reference: short name to full name."""
    found: dict[str, str] = {}
    for page in sorted((PAGES / "reference").glob("*.md")):
        for full in ENTRY.findall(page.read_text()):
            entry = pkg[full.removeprefix(f"{pkg.name}.")]
            entry = entry.final_target if entry.is_alias else entry
            short = full.rpartition(".")[2]
            found[full] = found[full.removeprefix(f"{pkg.name}.")] = found[short] = full
            if entry.is_module or entry.is_class:
                for name, member in entry.members.items():
                    shown = member.is_public and not member.is_alias and member.has_docstring
                    if shown and not name.startswith("_"):
                        found[f"{short}.{name}"] = f"{full}.{name}"
                        if entry.is_module:
                            found.setdefault(name, f"{full}.{name}")
    return found


def _own(thing: Any) -> Any:
    """`thing` and all that is defined in it."""
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _own(member)


def _know_errors(module: griffe.Module, pkg: griffe.Module) -> None:
    """Let ``Raises:`` name errors that come from further down and that `module` never imports."""
    for name, error in pkg["errors"].members.items():
        if error.is_class and name not in module.members:
            module.set_member(name, griffe.Alias(name, error))


def _apart(text: str) -> str:
    """Entries for several names, once for every name."""
    lines = text.split("\n")
    result = []
    while lines:
        line = lines.pop(0)
        names = SEVERAL.match(line)
        entry = [line]
        while names and lines and lines[0].startswith(" " * 8):
            entry.append(lines.pop(0))
        for name in names[2].split(", ") if names else [""]:
            first = f"    {name}: {line[names.end() :]}" if names else line
            result += [first, *entry[1:]]
    return "\n".join(result)


def _linked(text: str, entries: dict[str, str]) -> str:
    lines = []
    for line in text.split("\n"):
        if not line.lstrip().startswith((">>>", "...")):
            line = NAME.sub(lambda m: _link(m[0], entries.get(m[1])), line)
            line = PAGE.sub(_page, line)
        lines.append(line)
    return "\n".join(lines)


def _page(match: re.Match[str]) -> str:
    shown = (PAGES / f"{match[1]}.md").exists()
    return f"[{match[0]}](../{match[1]}.md)" if shown else match[0]


def _link(text: str, full: str | None) -> str:
    return f"[{text}][{full}]" if full else text
