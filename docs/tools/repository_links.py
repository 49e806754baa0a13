"""Links from pages to code: of use where the repository is read, plain text on the site."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of a page without links to what the site does not have."""

    def kept(match: re.Match[str]) -> str:
        target = (DOCS / page.file.src_uri).parent / match[2]
        outside = not target.resolve().is_relative_to(DOCS) or target.suffix == ".py"
        return match[1] if outside and target.exists() else match[0]

    return LINK.sub(kept, markdown)
