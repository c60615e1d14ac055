import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """Every figure that a test saves."""
    drawn = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return drawn
