"""Which module may know which: imports run one way, wherever in a file they stand and whatever they are for."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import hf_dskd


ROOT = Path(hf_dskd.__file__).parent
# A module knows those of its own line and of the lines above it; the longest name that it begins with counts.
LAYERS = [
    "errors redaction words",
    "launch utils methods settings field_checks losses.terms hub.names",
    "offline",
    "config precision",
    "data alignment.spans",
    "alignment kernels teacher models",
    "losses",
    "training",
    "evaluation analysis",
    "report",
    "hub",
    "trainer",
    "run",
    "experiments doctor",
    "cli",
]
# Methods of named tuples, which begin so in order not to look like fields.
PUBLIC = {"_replace", "_asdict", "_fields"}


def test_imports_run_one_way_and_private_names_stay_at_home():
    assert sorted(offenders()) == []


def test_no_module_needs_itself():
    graph = {name_of(path): {module for module, _ in imports(path)} - {name_of(path)} for path in ROOT.rglob("*.py")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    names = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
    return names[max((name for name in names if f"{module}.".startswith(f"{name}.")), key=len)]


def imports(path: Path) -> list[tuple[str, str]]:
    """Module and name of everything that a file imports from the package; no name where it is a module."""
    package = path.relative_to(ROOT.parent).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = ROOT.parent.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.append((f"{module}.{alias.name}", "") if is_module else (module, alias.name))
    return [(module.removeprefix("hf_dskd."), name) for module, name in found if module.startswith("hf_dskd.")]


def offenders() -> set[str]:
    """`importer -> module` that runs upwards, and `importer: name` that is another module's own."""
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    own = {module: set(private_names(tree)) for module, tree in trees.items()}
    ours = set().union(*own.values()) - PUBLIC
    found = set()
    for path in ROOT.rglob("*.py"):
        importer = name_of(path)
        if importer == "__init__":  # lazily everything
            continue
        for module, name in imports(path):
            if layer_of(module) > layer_of(importer):
                found.add(f"{importer} -> {module}")
            if name.startswith("_") and not name.startswith("__"):
                found.add(f"{importer}: {name}")
        for node in ast.walk(trees[importer]):
            if isinstance(node, ast.Attribute) and node.attr in ours - own[importer]:
                # What a class has from its base is its own.
                found |= {f"{importer}: {ast.unparse(node)}"} - {f"{importer}: self.{node.attr}"}
    return found


def private_names(tree: ast.Module) -> list[str]:
    """Names with an underscore that a module defines, as functions, classes or attributes."""
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    defined += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return [name for name in defined if name.startswith("_") and not name.startswith("__")]
