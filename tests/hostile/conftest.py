"""What hostile files would leave behind."""

import pytest


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"
