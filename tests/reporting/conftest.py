"""What the tests of several pages need."""

import pytest

from common.reporting import figures


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are built but not drawn, for tests that look at texts and tables alone."""
    monkeypatch.setattr(figures, "image", lambda figure: "data:image/svg+xml;base64,")
