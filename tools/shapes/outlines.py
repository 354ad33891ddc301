"""Outlines of the shapes, centred and within the unit circle."""

import numpy as np
from numpy.typing import NDArray

Contour = NDArray[np.float64]  # [points, 2], xy


def _arc(start: float, stop: float, points: int = 48, radius: float = 1.0, x: float = 0.0) -> Contour:
    angles = np.linspace(np.radians(start), np.radians(stop), points)
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], -1)


def _star() -> Contour:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)[:, None]
    return _arc(0, 324, 10) * radius


def _heart() -> Contour:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y + 2.5], -1) / 17


def _crescent() -> Contour:
    """A unit disc less the disc of radius .8 at (.55, 0); both circles meet at x = .602."""
    ends = np.degrees(np.arccos([0.602, (0.602 - 0.55) / 0.8]))
    return np.concatenate([_arc(ends[0], 360 - ends[0]), _arc(360 - ends[1], ends[1], radius=0.8, x=0.55)])


def _points(*xy: tuple[float, float]) -> Contour:
    return np.array(xy, np.float64)


# A second contour is a hole.
OUTLINES: dict[str, tuple[Contour, ...]] = {
    "circle": (_arc(0, 360),),
    "triangle": (_arc(0, 240, 3),),
    "square": (_arc(45, 315, 4),),
    "star": (_star(),),
    "cross": (
        _points(
            *((1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)),
            *((-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)),
        ),
    ),
    "ring": (_arc(0, 360), _arc(0, 360, radius=0.55)),
    "heart": (_heart(),),
    "arrow": (_points((1, 0), (0.15, 0.75), (0.15, 0.28), (-1, 0.28), (-1, -0.28), (0.15, -0.28), (0.15, -0.75)),),
    "crescent": (_crescent(),),
    "bolt": (_points((0.35, 1), (-0.6, 0), (-0.08, -0.05), (-0.35, -1), (0.6, 0.1), (0.08, 0.15)),),
}
CLASS_NAMES = tuple(OUTLINES)
