"""What all figures share: colours that colour-blind readers tell apart, sizes, and files that are
the same whenever they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
ENTROPY = "viridis"
WRITTEN = "#f1f1ee"
"""A written position: no colour of the scale."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "svg.hashsalt": "boe-vllm",  # without it the ids in an SVG are random
}


@contextmanager
def style() -> Iterator[None]:
    """The style, for figures that are made inside."""
    with matplotlib.rc_context(STYLE):
        yield


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name.png` and `name.svg`, without dates; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        save_as(figure, path)
    return paths


def save_as(figure: Figure, path: Path) -> None:
    """Write one file in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with style():
        figure.savefig(path, metadata=metadata)


def entropy_scale(steps: int = 64) -> list[str]:
    """Hexadecimal colours from no entropy to the most."""
    return [to_hex(colormaps[ENTROPY](n / (steps - 1))) for n in range(steps)]


def shade(entropy: float, highest: float, scale: list[str]) -> str:
    """The colour of an entropy on a scale that ends at the highest."""
    return scale[round(min(1.0, entropy / highest) * (len(scale) - 1))]


def ink(background: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG's relative luminance)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
