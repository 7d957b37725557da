"""A page as a tree walker sees it, and text that tries to be more than text."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input", "br", "hr", "img", "link"}
HOSTILE = (
    "</script><img src=x onerror=alert(1)><svg onload=alert(2)>", "\"><a href='javascript:alert(3)'>x</a>", "{{ 7*7 }}{% raw %}",
    "<!--", "</details></main>", "\u202eevil\u202c \x00\x1b[2J",
    "![p](http://evil.example/p.png) [l](http://evil.example) | a | b\n# Heading",
    "`code` **bold** _it_ <http://evil.example> www.evil.example x@evil.example", "&lt;b&gt; &amp;",
)


class Page(HTMLParser):
    """The page as a tree walker sees it: elements with attributes, the text of each, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(piece for pieces in self.text.values() for piece in pieces).split())
