"""Packages that the ONNX export needs."""

from __future__ import annotations

import importlib.util

from dl2pa.errors import UserError, install_command

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Check that the packages for the export are installed.

    Raises:
        UserError: names the missing packages.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"Install them: {install_command('onnx')}."
        raise UserError("--onnx", ", ".join(missing), "is not installed", remedy)
