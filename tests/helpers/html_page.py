"""An HTML file as a browser sees it, for the tests of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class HtmlPage(HTMLParser):
    """Its elements with their attributes, its text, and the contents of its JSON scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.records: list[dict[str, Any]] = []
        self._in = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = "json" if ("type", "application/json") in attrs else tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "json":
            self.records.append(json.loads(data))
        elif self._in not in ("script", "style"):
            self.text += data

    def all(self, tag: str, of_class: str = "") -> list[dict[str, str | None]]:
        """Return the attributes of each element of a tag, and of a class if one is named."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if not of_class or of_class in (a.get("class") or "").split()]

    @property
    def attributes(self) -> set[str]:
        return {name for _, attributes in self.elements for name in attributes}

    @property
    def headings(self) -> list[str]:
        return [attributes["id"] or "" for attributes in self.all("h2")]
