"""Where the stages and the configurations lie: beside the package in a checkout, inside it once it is installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def own_folder(name: str) -> Path:
    """The folder `stages` or `configs`."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def configuration(path: Path) -> Path:
    """The path as it is; or agrpo's own file or folder where it begins with `configs/` and nothing lies there."""
    if path.exists() or path.is_absolute() or path.parts[:1] != ("configs",):
        return path
    own = own_folder("configs").joinpath(*path.parts[1:])
    return own if own.exists() else path
