"""A training run as its settings say it, from the data to what there is to look at: what every recipe imports."""

from ..launch import command
from ..offline.packaged import model_name
from ..training.run_folder import SETTINGS_NAME
from ..utils.files import write_yaml
from .arguments import parse, variant
from .data import load_data
from .settings import Run, RunArguments
from .teacher import cache_teacher, chosen_teacher
from .training import analyse, changed_settings, distil, make_trainer, show, train


__all__ = [
    "SETTINGS_NAME",
    "Run",
    "RunArguments",
    "analyse",
    "cache_teacher",
    "changed_settings",
    "chosen_teacher",
    "command",
    "distil",
    "load_data",
    "make_trainer",
    "model_name",
    "parse",
    "show",
    "train",
    "variant",
    "write_yaml",
]
