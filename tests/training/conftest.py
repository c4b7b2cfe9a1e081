import pytest


@pytest.fixture(autouse=True)
def _empty_pictures(empty_pictures):
    """Runs draw their curve twice."""
