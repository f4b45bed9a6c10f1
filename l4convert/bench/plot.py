"""Draw figures into files: the same bytes for the same numbers, and never half a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4convert.errors import InputError, UsageError, backend_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ending -> what of a file's metadata matplotlib would fill with the date or its own version.
FORMATS: dict[str, dict[str, Any]] = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}

# Text stays text, so that the file is small and can be searched; ids are made from a fixed salt, not at random.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "l4convert",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

COLOURS = {
    "ours": "#0072b2",
    "theirs": "#d55e00",
    "third": "#009e73",
    "fourth": "#cc79a7",
    "fifth": "#e69f00",
    "sixth": "#56b4e9",
    "grey": "#999999",
}
"""Colours that people with any colour vision tell apart (Okabe and Ito, "Color Universal Design", 2008)."""


def check_plot_file(file: Path) -> None:
    """Refuse early what :func:`draw` would refuse late.

    Raises:
        UsageError: The ending is not one of :data:`FORMATS`.
        InputError: The folder does not exist.
        BackendMissing: matplotlib is not installed.
    """
    if file.suffix.lower() not in FORMATS:
        ending = f"the ending {file.suffix}" if file.suffix else "no ending"
        raise UsageError(f"{file}: a plot with {ending}", f"plots are written as {' or '.join(sorted(FORMATS))}")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder")
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise backend_missing("matplotlib") from error


def draw(file: Path, size: tuple[float, float], grid: tuple[int, int], paint: Callable[[list[Axes]], None]) -> None:
    """Draw panels in a grid and write them to a file, whose ending decides the format.

    Args:
        file: Where; what is there is replaced when the figure is complete.
        size: Width and height in inches.
        grid: Rows and columns of panels.
        paint: Draws on their axes, which are given row by row.

    Raises:
        UsageError, InputError, BackendMissing: See :func:`check_plot_file`; also where the file cannot be written.
    """
    check_plot_file(file)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ending = file.suffix.lower()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        paint(list(figure.subplots(*grid, squeeze=False).flat))
        _write(file, _rendered(figure, ending))


def _rendered(figure: Figure, ending: str) -> bytes:
    content = BytesIO()
    figure.savefig(content, format=ending[1:], dpi=150, metadata=FORMATS[ending])
    if ending == ".png":
        return content.getvalue()
    # matplotlib leaves blanks at the ends of lines, which no reviewer wants to see in a diff.
    return b"\n".join(line.rstrip() for line in content.getvalue().splitlines()) + b"\n"


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
