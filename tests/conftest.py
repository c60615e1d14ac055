import gc
import logging
import os
import random
import sys
from pathlib import Path

import pytest


PLAIN_PROCESSOR = Path(__file__).with_name("plain_processor")


def pytest_addoption(parser):
    parser.addoption("--order-seed", type=int, help="run the files, and the tests in each, in this random order")
    parser.addoption(
        "--plain-processor", action="store_true", help="mask what not all processors have: AVX, AVX-512 and bf16"
    )


def pytest_configure(config):
    if config.getoption("--plain-processor"):
        # Before torch is imported; workers of xdist and what tests start have it from here.
        os.environ |= {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
        paths = [str(PLAIN_PROCESSOR), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        import torch

        torch.cpu.get_capabilities = dict


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--order-seed")
    if seed is not None:
        order = random.Random(seed)
        # Files stay whole: some make models for all of their tests.
        files = {path: order.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (files[item.path], order.random()))


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Every training ends in a full garbage collection, which need not look at what was imported before."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: no random number hangs on the tests before."""
    random.seed(0)
    if "torch" in sys.modules:
        import numpy
        import torch

        numpy.random.seed(0)
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left():
    """Takes back what tests, and the programs and libraries that they call, change in the whole process."""
    # transformers 4.57 leaves the precision of one run there, where the next one finds it.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if "hf_dskd.precision" in sys.modules:
        sys.modules["hf_dskd.precision"]._left = (None, None)
    parts = [environment(), log_levels(), *([libraries()] if "transformers" in sys.modules else [])]
    for part in parts:
        next(part)
    yield
    for part in parts:
        next(part, None)


def environment():
    """Variables, working directory, and who prints an error that nobody caught."""
    variables, folder, hook = dict(os.environ), os.getcwd(), sys.excepthook
    yield
    sys.excepthook = hook
    variables["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    os.environ.clear()
    os.environ |= variables
    os.chdir(folder)


def log_levels():
    """What every logger lets through and whereto; pytest's own handlers are there before."""
    disabled = logging.root.manager.disable
    # That of the package is made when somebody first asks for it.
    known = [logging.root, logging.getLogger("hf_dskd"), *logging.root.manager.loggerDict.values()]
    loggers = [logger for logger in known if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, logger.propagate, logger.disabled, logger.handlers[:]) for logger in loggers]
    yield
    logging.disable(disabled)
    for logger, level, logger.propagate, logger.disabled, logger.handlers[:] in before:
        logger.setLevel(level)


def libraries():
    """Precision, threads and switches of torch, accelerate's processes, progress bars."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.utils import logging as bars

    switches = (
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
    )
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept, shown = [dict(state) for state in states], bars.is_progress_bar_enabled()
    yield
    for write, value in switches:
        write(value)
    for state, values in zip(states, kept):
        state.clear()
        state.update(values)
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are saved without being drawn, which is most of the time that a report takes."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"\x89PNG"))


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
