"""Safe opening of encoded images: supported formats only, with limits on bytes and pixels.

Pillow has plugins for dozens of formats, and some start other programs (EPS starts Ghostscript). Untrusted files are
opened only by the plugins listed here.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dl2pa.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SUFFIX_OF = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
MAX_BYTES = 2**28
_FAULTS_OF_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_BMP_HEADERS = 54
_FREE_PIXELS = 2**24
"""Number of pixels that any file may claim: 48 MiB in RGB."""
_PIXELS_PER_BYTE = 1024
"""Approximately the best compression of a uniform image."""
_UNSUPPORTED = (
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x01\x00", "ICO"),
    *((b"P%d" % kind + space, "PNM") for kind in range(1, 7) for space in (b"\n", b" ")),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    *((start, "HTML") for start in (b"<html", b"<HTML", b"<!doctype", b"<!DOCTYPE")),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ", "xz"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
}
_AN = ("A", "E", "HTML", "I", "SVG", "X", "xz")


class BadImage(Exception):
    """An image that cannot be decoded; the message gives the reason."""


def is_fault_of_process(error: Exception) -> bool:
    """Whether a read failed because of too many open files or no memory, for which the image is not to blame."""
    return isinstance(error, OSError) and error.errno in _FAULTS_OF_PROCESS


def check_bytes(length: int) -> None:
    """Check the size of an image file.

    Raises:
        BadImage: more than 256 MiB.
    """
    if length > MAX_BYTES:
        raise BadImage(f"has {length} bytes, more than the maximum of {MAX_BYTES >> 20} MiB")


def read_image_file(path: Path | str) -> bytes:
    """Read an image file.

    Raises:
        BadImage: not a regular file, or more than 256 MiB.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    # System calls without a file object, which costs as much as the read.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise BadImage("is not a regular file")
        check_bytes(state.st_size)
        data = os.read(descriptor, state.st_size)
        while len(data) < state.st_size and (more := os.read(descriptor, state.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def check_image_file(path: Path) -> None:
    """Check that a file can be read and has the header of an image; its pixels are not decoded.

    Raises:
        UserError: the file cannot be read or is not an image.
    """
    try:
        with open_image(read_image_file(path)):
            pass
    except (BadImage, OSError) as error:
        raise unreadable_image(path, error) from None


def unreadable_image(path: Path, error: Exception) -> UserError:
    """Error of an image file that the user named."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError("image", str(path), f"cannot be read ({reason})", "Give an image file.")


def unsupported_format(data: bytes) -> str | None:
    """Name of an unsupported format recognized by the first bytes of a file, or None."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12])
    return next((name for magic, name in _UNSUPPORTED if data.startswith(magic)), None)


def image_suffix(data: bytes) -> str | None:
    """File suffix of the format of an image, by its first bytes; None for an unsupported one."""
    if data.startswith(b"RIFF") and data[8:12] != b"WEBP":
        return None
    return next((suffix for magic, suffix in _SUFFIX_OF.items() if data.startswith(magic)), None)


def why_not_an_image(data: bytes) -> str:
    """Reason why a file is not a supported image, such as ``is a GIF file``."""
    name = unsupported_format(data)
    if name is not None:
        return f"is {'an' if name.startswith(_AN) else 'a'} {name} file"
    return "contains only zeros" if data and data.count(0) == len(data) else "is not an image"


def check_pixels(height: int, width: int, length: int) -> None:
    """Check that a header does not claim more pixels than `length` bytes can encode.

    Raises:
        BadImage: more pixels than any compression reaches.
    """
    if height * width > max(_FREE_PIXELS, _PIXELS_PER_BYTE * length):
        raise BadImage(f"cannot be decoded (its header claims {width} x {height} pixels in {length} bytes)")


@contextmanager
def open_image(data: bytes, length: int | None = None) -> Generator[Image.Image]:
    """Open the image in `data`: the header is read, the pixels are not.

    Args:
        length: bytes of the file, if `data` is only its beginning.

    Raises:
        BadImage: not an image of ``FORMATS``, damaged, or too many pixels. Errors of the block are converted too.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.height, image.width, len(data) if length is None else length)
            yield image
    except UnidentifiedImageError:
        raise BadImage(why_not_an_image(data)) from None
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


def size_of_bmp(height: int, width: int) -> int:
    """Bytes of ``encode_bmp``: two headers, and rows of a multiple of four bytes."""
    return _BMP_HEADERS + (3 * width + 3) // 4 * 4 * height


def encode_bmp(pixels: NDArray[np.uint8]) -> bytes:
    """Encode an array [H, W, 3] without compression, which every decoder reads at the cost of a copy."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def convert_to_bmp(data: bytes) -> bytes:
    """Decode an image with Pillow and encode its RGB pixels without compression, see ``convert_to_png``.

    Raises:
        BadImage: Pillow cannot decode it.
    """
    file = io.BytesIO()
    with open_image(data) as image:
        image.convert("RGB").save(file, "BMP")
    return file.getvalue()


def convert_to_png(data: bytes) -> bytes:
    """Decode an image with Pillow and encode its RGB pixels as PNG, which every decoder reads.

    Raises:
        BadImage: Pillow cannot decode it.
    """
    file = io.BytesIO()
    with open_image(data) as image:
        pixels = image.convert("RGB")
    pixels.info.clear()  # a color profile or EXIF data would be written too
    pixels.save(file, "PNG", compress_level=1)
    return file.getvalue()
