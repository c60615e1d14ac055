import os

import pytest


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers 4.57 leaves the precision of one run in the environment, where the next one finds it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that a test saves."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return drawn
