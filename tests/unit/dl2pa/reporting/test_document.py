from __future__ import annotations

import base64
from html.parser import HTMLParser

from dl2pa.reporting.document import Bullets, Grid, Heading, Paragraph, Picture, code, to_html, to_markdown

BLOCKS = [
    Heading(2, "A <b>table</b>"),
    Paragraph("one & *two*\nthree, squared_cosine, _base, in `a_path/*.yaml`"),
    Bullets(["[s1] suspect: equal"]),
    Grid(["method ", "d"], [["psc | dl2pa", "10"], [code("runs/a`b|c"), "25"]]),
    Picture("plot", b"<svg>drawn</svg>", 'over "d"'),
]


def test_markdown() -> None:
    assert to_markdown(BLOCKS).split("\n\n") == [
        r"## A \<b>table\</b>",
        r"one & \*two\* three, squared_cosine, \_base, in `a_path/*.yaml`",
        "- [s1] suspect: equal",
        "\n".join(
            [
                "| method | d |",
                "| --- | --: |",
                r"| psc \| dl2pa | 10 |",
                r"| `runs/a'b\|c` | 25 |",
            ]
        ),
        '![over "d"](plots/plot.svg)\n',
    ]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_text_and_embeds_its_figures() -> None:
    text = to_html(BLOCKS, "Title & <more>")
    page = Page(text)
    assert "<title>Title &amp; &lt;more&gt;</title>" in text
    assert "b" not in page.tags
    assert "A <b>table</b>" in page.text
    assert "<code>a_path/*.yaml</code>" in text
    (source,) = [value for name, value in page.attributes if name == "src"]
    assert source is not None
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == b"<svg>drawn</svg>"
    assert ("alt", 'over "d"') in page.attributes
    assert page.tags.count("td") == 4
