import os

import pytest


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers 4.57 leaves the precision of one run in the environment, where the next one finds it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
