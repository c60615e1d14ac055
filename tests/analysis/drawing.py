"""Pictures that are drawn without a warning, and what is in them."""

import warnings

from matplotlib.image import imread


def plot(draw, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The oldest matplotlib with a new pyparsing.
        warnings.filterwarnings("ignore", message=".* (argument is deprecated, use|deprecated - use)")
        draw(*args, **kwargs)


def size(path):
    height, width, _ = imread(path).shape
    return width, height
