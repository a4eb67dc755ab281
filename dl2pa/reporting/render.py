"""HTML pages from the templates in `templates/`; every value is escaped."""

from __future__ import annotations

import base64
import functools
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

CODE = re.compile(r"`([^`]*)`")


def render(template: str, **context: Any) -> str:
    """Render a template as a page that needs no other file."""
    return _environment().get_template(template).render(context)


def data_url(picture: bytes) -> str:
    """Return a PNG, JPEG or SVG picture as a `data:` URL."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
    kind = next((kind for magic, kind in kinds.items() if picture.startswith(magic)), "svg+xml")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _inline(text: str) -> Markup:
    """Escape text and turn `code` into a code element."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dl2pa.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(inline=_inline, data_url=data_url)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
