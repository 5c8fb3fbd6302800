"""The house's rules, read from the source: which module may import which, and what every module owes its reader."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"dataset": {"data"}, "core_eval": {"evaluation"}}  # python -m nanochat.dataset, ...: upstream's commands
# package -> the packages it may import, besides itself and the core (the modules beside the packages)
PACKAGES = {
    "data": set(), "kernels": set(), "lane_b": set(), "experiments": set(),
    "model": {"kernels"}, "evaluation": {"data", "model"}, "training": {"data", "kernels", "model", "evaluation"},
    "export": {"data", "model", "training"},
    "planning": {"kernels", "model", "training"},
    **COMMANDS,
}
LANE_B_LIBRARIES = {"numpy", "scipy", "tqdm", "matplotlib"}
# all else starts without it
WITH_TORCH = {"kernels", "model", "training.build", "training.checkpoint", "training.loop", "training.plan",
              "training.record", "training.saving", "training.trained", "evaluation.core", "evaluation.hf_model",
              "evaluation.loss", "evaluation.validation", "data.dataloader", "export", "planning"}
SCRIPTS_WITH_TORCH = {"base_train", "base_eval", "sample", "export", "plan"}
LONGEST_DOCSTRING = 8
SPEAKS_FOR_ITSELF = 5  # lines of a function or class that needs no docstring


@cache
def modules():
    """Dotted name -> syntax tree of every module of the library, the scripts and the benchmarks."""
    trees = {}
    for path in sorted(path for top in ("nanochat", "scripts", "dev") for path in (ROOT / top).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), path, feature_version=(3, 10))
    return trees


def library():
    return {name: tree for name, tree in modules().items() if name.split(".")[0] == "nanochat"}


def scripts():
    return {name: tree for name, tree in modules().items() if name.startswith("scripts.")}


def imports(tree):
    """Every module the tree imports, at its top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else node.module


def is_within(name, packages):
    """Whether a module is one of `packages` or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# --- arrows ----------------------------------------------------------------------------------------------------------

def package_of(name):
    """The package of a module of ours: data, model, ..., or "" in the core."""
    package = name.split(".")[1] if "." in name else ""
    return package if package in PACKAGES else ""


def test_imports_follow_the_arrows():
    faults = [f"{name} imports {imported}" for name, tree in library().items() for imported in imports(tree)
              if is_within(imported, {"nanochat"})
              and package_of(imported) not in {"", package_of(name)} | PACKAGES.get(package_of(name), set())]
    assert not faults
    assert {package_of(name) for name in library()} == {"", *PACKAGES}


def test_nobody_imports_scripts_or_dev():
    """But a benchmark may share code with another."""
    faults = [f"{name} imports {imported}" for name, tree in modules().items() for imported in imports(tree)
              if is_within(imported, {"scripts"} if is_within(name, {"dev"}) else {"scripts", "dev"})]
    assert not faults


def test_no_module_imports_itself_by_a_detour():
    graph = {name: set(imports(tree)) & set(library()) for name, tree in library().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_lane_b_takes_arrays_alone():
    """No torch, no model: only the libraries of numbers, and a progress bar."""
    faults = [f"{name} imports {imported}" for name, tree in library().items() if package_of(name) == "lane_b"
              for imported in imports(tree)
              if imported.split(".")[0] not in LANE_B_LIBRARIES | {"nanochat"} | sys.stdlib_module_names]
    assert not faults


def test_tools_without_a_model_start_without_torch():
    """In a fresh process, and with all that they import in turn."""
    wanted = [name for name in library() if not is_within(name.removeprefix("nanochat."), WITH_TORCH)
              and name != "nanochat.core_eval"]
    wanted += [name for name in scripts() if not is_within(name.removeprefix("scripts."), SCRIPTS_WITH_TORCH)]
    code = ("import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
            "    assert 'torch' not in sys.modules, f'{name} imports torch'\n")
    done = subprocess.run([sys.executable, "-c", code, *wanted], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- library and scripts ---------------------------------------------------------------------------------------------

def test_every_flag_says_what_it_is_for():
    calls = [(name, node) for name, tree in modules().items() if not is_within(name, {"dev"})
             for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    assert len(calls) > 60
    assert [f"{name}, line {call.lineno}" for name, call in calls
            if "help" not in {keyword.arg for keyword in call.keywords}] == []


def test_library_reads_no_command_line():
    found = {name for name, tree in library().items() for imported in imports(tree) if imported == "argparse"}
    assert found == {f"nanochat.{command}" for command in COMMANDS}


def test_json_has_one_reader():
    """files.parse_json, which says in words what no JSON is; json.loads raises five kinds of errors."""
    assert {name for name, tree in {**library(), **scripts()}.items()
            if {"json.loads", "json.load"} & {ast.unparse(node.func) for node in ast.walk(tree)
                                              if isinstance(node, ast.Call)}} == {"nanochat.common"}


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def test_importing_a_module_does_no_work():
    """At the top of a module: imports, definitions, constants; for torch's custom ops, their registration."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)

    def is_quiet(node):
        if isinstance(node, ast.Try):  # a package that may be missing
            return all(is_quiet(inner) for inner in node.body + [n for h in node.handlers for n in h.body])
        if isinstance(node, ast.For):
            return all(is_quiet(inner) for inner in node.body)
        if isinstance(node, ast.Expr):
            is_registration = isinstance(node.value, ast.Call) and ".register_" in ast.unparse(node.value.func)
            return is_registration or isinstance(node.value, ast.Constant)
        return isinstance(node, definitions) or is_main_guard(node)

    faults = [f"{name}, line {node.lineno}" for name, tree in {**library(), **scripts()}.items() for node in tree.body
              if not is_quiet(node)]
    assert not faults


def test_scripts_are_parse_args_and_main_of_argv():
    for name, tree in scripts().items():
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"parse_args", "main"} <= set(functions), name
        for function in ("parse_args", "main"):
            assert ast.unparse(functions[function].args) in ("argv=None", "argv"), f"{name}.{function}"
        assert [ast.unparse(decorator) for decorator in functions["main"].decorator_list] == ["command"], name


# --- docstrings ------------------------------------------------------------------------------------------------------

def public(body, prefix):
    """(dotted name, node) of the public functions, classes and methods of a body."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}.{node.name}")


def documented():
    return [item for name, tree in {**library(), **scripts()}.items() for item in public(tree.body, name)]


def test_every_module_says_what_it_holds():
    silent = [name for name, tree in {**library(), **scripts()}.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_public_functions_and_classes_say_what_they_do():
    """Except where the code is as short as the sentence, and parse_args and main, for which the module's speaks."""
    silent = {name for name, node in documented()
              if ast.get_docstring(node) is None and node.end_lineno - node.lineno >= SPEAKS_FOR_ITSELF
              and node.name not in ("parse_args", "main")}
    assert not silent


def test_docstrings_are_short():
    long = {name: len(text.splitlines()) for name, node in documented()
            if (text := ast.get_docstring(node)) and len(text.splitlines()) > LONGEST_DOCSTRING}
    assert not long


# --- pages -----------------------------------------------------------------------------------------------------------

def test_prose_is_at_most_120_characters_wide():
    """Code blocks, tables, and headings that a verdict makes may be wider."""
    wide = []
    for page in (ROOT / "README.md", *(ROOT / "ideas").glob("*.md"), *(ROOT / "dev").glob("*.md")):
        is_code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            is_code ^= line.startswith("```")
            if len(line) > 120 and not is_code and not line.startswith(("|", "#", "    ")):
                wide.append(f"{page.name}, line {number}")
    assert not wide
