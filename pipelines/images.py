"""Opening an encoded image: the forms that are read, and no more pixels than the file can justify.

Pillow has a plugin for dozens of forms, and some of them start other programs (EPS starts Ghostscript). Foreign
files are opened by the plugins named here only.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MOST_BYTES = 2**28
_FREE_PIXELS = 2**24
"""So many pixels any file may claim: 48 MiB in RGB."""
_PIXELS_PER_BYTE = 1024
"""About what the best compression of an even surface reaches."""
_FOREIGN = (
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
)
_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


class BadImage(Exception):
    """One image that cannot be decoded; the text says why."""


def check_bytes(length: int) -> None:
    """Refuse a file that is larger than an image may be.

    Raises:
        BadImage: more than 256 MiB.
    """
    if length > MOST_BYTES:
        raise BadImage(f"has {length} bytes, more than the {MOST_BYTES >> 20} MiB that an image may have")


def read_image_file(path: Path) -> bytes:
    """All of an image file.

    Raises:
        BadImage: a pipe or a device, or more than 256 MiB.
        OSError: it cannot be read.
    """
    # Opening a pipe would wait for whoever writes to it.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise BadImage("is a folder, a pipe or a device, not a file")
        check_bytes(state.st_size)
        return file.read(state.st_size)


def foreign_form(data: bytes) -> str | None:
    """The name of a form that is not read, by the file's first bytes; None where it is none of the known ones."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12])
    return next((name for magic, name in _FOREIGN if data.startswith(magic)), None)


def check_pixels(height: int, width: int, length: int) -> None:
    """Refuse a header that claims more pixels than `length` bytes can hold.

    Raises:
        BadImage: far more than any compression reaches.
    """
    if height * width > max(_FREE_PIXELS, _PIXELS_PER_BYTE * length):
        raise BadImage(f"cannot be decoded (claims {width} x {height} pixels in {length} bytes)")


@contextmanager
def open_image(data: bytes, length: int | None = None) -> Generator[Image.Image]:
    """The image in `data`, its header read and its pixels not yet.

    Args:
        length: of the whole file, where `data` is only its beginning.

    Raises:
        BadImage: not an image of ``FORMATS``, damaged, or too many pixels; inside the block too.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.height, image.width, len(data) if length is None else length)
            yield image
    except UnidentifiedImageError:
        form = foreign_form(data)
        raise BadImage(f"is a {form} file" if form else "is not an image") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        ArithmeticError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadImage(f"cannot be decoded ({error})") from None
