"""Count the files that a data set does not read, by reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_NAMES = 3
_IGNORED = frozenset(
    {
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "Thumbs.db",
        "desktop.ini",
    }
)
"""Names that operating systems and storage servers create."""
_ARCHIVES = ("tar", "tgz", "tbz2", "txz", "gz", "bz2", "xz", "zst", "zip", "7z", "rar")
_FORMATS = {
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "HEIC": ("heic", "heif"),
    "AVIF": ("avif",),
    "PNM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG 2000": ("jp2", "j2k", "jpx", "j2c"),
    "JPEG XL": ("jxl",),
    "ICO": ("ico",),
    "SVG": ("svg",),
    "PSD": ("psd",),
    "camera raw": ("dng", "cr2", "cr3", "nef", "arw", "raw"),
}
_IMAGE_REASON = {suffix: f"{name} image" for name, suffixes in _FORMATS.items() for suffix in suffixes} | {
    suffix: f"JPEG image named .{suffix} (rename it to .jpg)" for suffix in ("jfif", "jpe", "jfi", "pjpeg")
}
ARCHIVE = "archive"
NOT_AN_IMAGE = "not an image"


class SkippedFiles:
    """Files that are not read: their number for each reason, and the names of the first ones.

    The memory does not grow with the number of files.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> SkippedFiles:
        """The inverse of ``as_dict``; raises TypeError, ValueError or KeyError for other content."""
        result = cls()
        for reason, entry in content.items():
            result._add(reason, int(entry["count"]), [str(name) for name in entry["first"]])
        return result

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """JSON form: ``{reason: {"count": 4, "first": ["a/1.gif", …]}}``."""
        return {
            reason: {"count": count, "first": list(self._first[reason])}
            for reason, count in self._counts.items()
        }

    def add(self, reason: str, name: str) -> None:
        """Count one file."""
        self._add(reason, 1, [name])

    def update(self, other: SkippedFiles) -> None:
        """Add the counts of `other`; names of this object come first."""
        for reason, count in other._counts.items():
            self._add(reason, count, other._first[reason])

    def _add(self, reason: str, count: int, names: list[str]) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + count
        first = self._first.setdefault(reason, [])
        first.extend(names[: _MAX_NAMES - len(first)])

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    @property
    def only_other_files(self) -> bool:
        """Whether no image, archive or link was skipped."""
        return self._counts.keys() <= {NOT_AN_IMAGE}

    def __contains__(self, reason: str) -> bool:
        return reason in self._counts

    def __str__(self) -> str:
        """Text such as ``GIF image: 4 (a/1.gif, a/2.gif, b/1.gif, …); archive: 1 (backup.tar)``."""
        texts: list[str] = []
        for reason, count in self._counts.items():
            more = ", …" if count > len(self._first[reason]) else ""
            texts.append(f"{reason}: {count:,} ({', '.join(self._first[reason])}{more})")
        return "; ".join(texts)

    def because(self) -> str:
        """The counts as the end of an error message, empty without any."""
        return f" (skipped: {self})" if self._counts else ""


def is_ignored(name: str) -> bool:
    """Whether an entry of a folder is ignored without counting: created by a system, or AppleDouble data."""
    return name in _IGNORED or name.startswith("._")


def is_archive(name: str) -> bool:
    """Whether a file name has the suffix of an archive."""
    return name.lower().rpartition(".")[2] in _ARCHIVES and "." in name


def reason_for(name: str) -> str:
    """Reason for which a file without a supported image suffix is skipped."""
    if is_archive(name):
        return ARCHIVE
    return _IMAGE_REASON.get(name.lower().rpartition(".")[2], NOT_AN_IMAGE)
