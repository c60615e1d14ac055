"""
The Python standard library's own source as a corpus that is always there: signature and docstring -> body.

No download and no licence question beyond Python's own (PSF-2.0). What is in it depends on the Python version, so
numbers from two versions aren't comparable; the datasets say in their description which one made them.
"""

import ast
import functools
import platform
import random
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dskd.errors import UserError


if TYPE_CHECKING:
    import datasets


# The name of the dataset.
PYTHON_FUNCTIONS = "python_functions"
# Third-party code, tests, generated tables, and whole applications.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages lib-dynload __pycache__ test tests idlelib lib2to3 turtledemo encodings "
    "pydoc_data".split()
)


def python_functions(
    *,
    minimum: int = 80,
    maximum: int = 450,
    maximum_prompt: int = 600,
    methods: bool = False,
    modules: Collection[str] | None = None,
) -> list[dict[str, str]]:
    """
    Yields all documented functions of the standard library whose body has a given length.

    The list is in the same order on every machine with the same Python, and no two functions have the same body.

    Args:
        minimum, maximum (`int`): Characters of a completion.
        maximum_prompt (`int`): Most characters of a prompt.
        methods (`bool`): Also the methods of top-level classes, with the indentation that they have there.
        modules (`Collection[str]`, *optional*): Only these modules, by dotted name; all by default.

    Returns:
        `list[dict[str, str]]`: One dictionary a function: `prompt` (signature and docstring with its newline, no
            decorators), `completion` (the rest of the function as it is in the file, without trailing whitespace) and
            `source` (such as `"textwrap.dedent"`).

    Raises:
        `UserError`: If the bounds leave no room, or one of `modules` isn't there.
    """
    if not 0 < minimum <= maximum or maximum_prompt <= 0:
        raise UserError(
            f"minimum={minimum}, maximum={maximum}, maximum_prompt={maximum_prompt} leave no room; "
            "give 0 < minimum <= maximum and a positive maximum_prompt"
        )
    files = _module_files()
    unknown = sorted(set(modules or ()) - set(files))
    if unknown:
        raise UserError(f"the standard library's source has no module {unknown[0]!r}; name modules such as 'textwrap'")
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for module, path in files.items():
        if modules is not None and module not in modules:
            continue
        for row in _functions(module, path):
            fits = minimum <= len(row["completion"]) <= maximum and len(row["prompt"]) <= maximum_prompt
            if fits and (methods or row["source"].rpartition(".")[0] == module):
                body = textwrap.dedent(row["completion"]).strip()
                if body not in seen:
                    seen.add(body)
                    rows.append(dict(row))
    return rows


def load_python_functions(
    train_size: int,
    held_out_size: int,
    seed: int = 0,
    *,
    minimum: int = 80,
    maximum: int = 450,
    maximum_prompt: int = 600,
    methods: bool = False,
) -> "datasets.DatasetDict":
    """
    Loads training and held-out functions of the standard library, from different modules.

    The held-out functions come from top-level modules and packages (`textwrap`, `asyncio`) that give no training
    function, so that a model can't have seen the rest of their file. With the same seed and `held_out_size`, a smaller
    training split is the beginning of a larger one.

    Args:
        train_size, held_out_size (`int`): Numbers of functions.
        seed (`int`): Of the shuffle and of the choice of modules.
        minimum, maximum, maximum_prompt (`int`), methods (`bool`): As for [`python_functions`].

    Returns:
        `datasets.DatasetDict`: Splits `train` and `held_out` with the columns `prompt`, `completion` and `source`; the
            description in their `info` states the counts and the Python version.

    Raises:
        `UserError`: If there are fewer such functions than asked for.
    """
    if train_size < 0 or held_out_size < 0:
        raise UserError(f"train_size={train_size} and held_out_size={held_out_size} must not be negative")
    rows = python_functions(minimum=minimum, maximum=maximum, maximum_prompt=maximum_prompt, methods=methods)
    remedy = "ask for fewer or widen minimum, maximum or maximum_prompt" + ("" if methods else ", or set methods=True")
    wanted = train_size + held_out_size
    if wanted > len(rows):
        raise UserError(
            f"train_size={train_size} and held_out_size={held_out_size} ask for {wanted} functions, but Python "
            f"{platform.python_version()} has {len(rows)} with these bounds; {remedy}"
        )
    # Its own generator: the global one is left as the caller's training run needs it.
    rng = random.Random(seed)
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["source"].partition(".")[0], []).append(row)
    order = sorted(groups)
    rng.shuffle(order)
    chosen = _choose(order, {name: len(groups[name]) for name in order}, held_out_size)
    held_out = [row for name in order if name in chosen for row in groups[name]]
    train = [row for name in order if name not in chosen for row in groups[name]]
    if train_size > len(train):
        raise UserError(
            f"train_size={train_size} is too many: with held_out_size={held_out_size} from other modules, Python "
            f"{platform.python_version()} has {len(train)} training functions left; {remedy}"
        )
    rng.shuffle(train)
    rng.shuffle(held_out)

    from datasets import Dataset, DatasetDict, DatasetInfo, Features, Value

    description = (
        f"Functions of the standard library of Python {platform.python_version()}, bodies of {minimum} to {maximum} "
        f"characters, prompts of at most {maximum_prompt}, {'with' if methods else 'without'} methods, seed {seed}: "
        f"{train_size} training and {held_out_size} held-out functions of {len(rows)}, from different modules."
    )
    features = Features({column: Value("string") for column in ("prompt", "completion", "source")})
    splits = {}
    for split, part in (("train", train[:train_size]), ("held_out", held_out[:held_out_size])):
        columns = {column: [row[column] for row in part] for column in features}
        info = DatasetInfo(description=description, features=features)
        splits[split] = Dataset.from_dict(columns, features=features, info=info)
    return DatasetDict(splits)


def _choose(order: list[str], sizes: dict[str, int], wanted: int) -> set[str]:
    """Chooses names whose sizes sum to `wanted` or little more, so that few functions fall between the splits."""
    chosen: set[str] = set()
    missing = wanted
    # First without large packages: a held-out split that is half `multiprocessing` says little about the rest.
    for limit in (max(wanted // 10, 1), wanted):
        for name in order:
            if name not in chosen and sizes[name] <= min(limit, missing):
                chosen.add(name)
                missing -= sizes[name]
    # None of the others is small enough to fit now; the smallest of them overshoots least.
    if missing > 0:
        chosen.add(min((name for name in order if name not in chosen), key=lambda name: sizes[name]))
    return chosen


@functools.cache
def _module_files() -> dict[str, Path]:
    files = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    # Sorted by parts: the order doesn't depend on the file system or on the path separator.
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts[:-1]):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            files[name] = path
    return files


# Parsing the whole library takes seconds; the text kept is a few megabytes.
@functools.cache
def _functions(module: str, path: Path) -> tuple[dict[str, str], ...]:
    try:
        with tokenize.open(path) as file:  # heeds the file's coding line
            text = file.read()
        with warnings.catch_warnings():  # such as an invalid escape in an old module
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ()
    found = []
    lines = text.split("\n")  # not splitlines, which also breaks at a form feed
    for node in tree.body:
        prefix, inner = (f"{node.name}.", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
        for function in inner:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                row = _cut(lines, function)
                if row is not None:
                    found.append({**row, "source": f"{module}.{prefix}{function.name}"})
    return tuple(found)


def _cut(lines: list[str], function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str] | None:
    # Without a docstring there is too little to tell what the body should be.
    if ast.get_docstring(function, clean=False) is None or len(function.body) < 2:
        return None
    end, last = function.body[0].end_lineno, function.end_lineno
    if end is None or last is None or function.body[1].lineno <= end:  # `"""doc"""; return 1`
        return None
    # lineno is the line of `def`, after the decorators.
    prompt = "\n".join(lines[function.lineno - 1 : end]) + "\n"
    return {"prompt": prompt, "completion": "\n".join(lines[end:last]).rstrip()}
