"""The house's rules, read from the source: which module may import which, and what every module owes its reader."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"errors", "files"}
TEXT = {"stdlib_corpus", "text_folder", "shards", "shard_writer", "download", "dataset", "tokenizer_files",
        "tokenizer", "tokens"}

# module or package -> the modules and packages of nanochat it may import (a package may always import itself)
MAY_IMPORT = {
    "errors": set(), "files": {"errors"},
    "common": {"errors"}, "runlog": LEAVES, "csv_ledger": LEAVES,
    "schedule": {"errors"}, "console": {"errors"}, "attention": {"errors"}, "kernels": {"errors"},
    **dict.fromkeys(TEXT, LEAVES | {"common"} | TEXT),
    "gpt": {"errors", "attention", "kernels"},
    "optim": {"errors", "common", "kernels"},
    "dataloader": {"errors", "common", "tokens"},
    "engine": {"errors"},
    "loss_eval": {"errors", "common"},
    "checkpoint": LEAVES | {"common", "gpt"},
    "core_bundle": LEAVES | {"common"},
    "core_eval": LEAVES | {"common", "core_bundle"},
    "train": {"errors", "common", "runlog", "schedule", "experiments.target"},
    "pretrain": {"errors", "common", "schedule", "gpt", "kernels", "optim", "dataloader", "engine", "loss_eval",
                 "checkpoint", "core_bundle", "core_eval", "experiments.target", "console", "runlog"} | TEXT,
    "lane_b": LEAVES | {"runlog", "csv_ledger"},
    "experiments": LEAVES | {"common", "runlog", "csv_ledger"},
}
LANE_B_LIBRARIES = {"numpy", "scipy", "tqdm", "matplotlib"}
STARTS_WITHOUT_TORCH = [
    *sorted(LEAVES | TEXT), "common", "runlog", "csv_ledger", "schedule", "console", "core_bundle", "lane_b",
    "experiments"]
SCRIPTS_WITHOUT_TORCH = ["tok_train", "tok_eval", "lane_b_stats", "lane_b_infer_ratio", "lane_b_log_run", "experiment",
                         "verdict", "report"]
COMMAND_LINES = {"nanochat.dataset", "nanochat.core_eval"}  # python -m nanochat.dataset, ...; all others are scripts'
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


def is_within(name, rooms):
    """Whether a module is one of `rooms` or in one of them."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


# --- arrows ----------------------------------------------------------------------------------------------------------

def test_imports_follow_the_arrows():
    faults = []
    for name, tree in library().items():
        own = name.removeprefix("nanochat").removeprefix(".")
        room = own.split(".")[0]
        if own and room not in MAY_IMPORT:
            faults.append(f"{name} is new: say in MAY_IMPORT what it may import")
            continue
        package = {room} if own else set()
        for imported in sorted(set(imports(tree))):
            top, _, below = imported.partition(".")
            if top == "nanochat" and below and not is_within(below, MAY_IMPORT.get(room, set()) | package):
                faults.append(f"{name} imports {imported}")
    assert not faults


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


def test_every_rule_is_about_a_module_that_exists():
    rooms = {name.split(".")[1] for name in library() if "." in name}
    named = set(MAY_IMPORT) | {room.split(".")[0] for allowed in MAY_IMPORT.values() for room in allowed}
    assert named <= rooms
    assert {f"scripts.{name}" for name in SCRIPTS_WITHOUT_TORCH} <= set(scripts())
    assert set(modules()) >= COMMAND_LINES


def test_lane_b_takes_arrays_alone():
    """No torch, no model: only the libraries of numbers, and a progress bar."""
    faults = [f"{name} imports {imported}" for name, tree in library().items() if name.startswith("nanochat.lane_b")
              for imported in imports(tree)
              if imported.split(".")[0] not in LANE_B_LIBRARIES | {"nanochat"} | sys.stdlib_module_names]
    assert not faults


def test_leaves_need_the_standard_library_alone():
    for leaf in sorted(LEAVES | {"runlog", "csv_ledger", "schedule"}):
        tops = {imported.split(".")[0] for imported in imports(modules()[f"nanochat.{leaf}"])}
        assert tops <= sys.stdlib_module_names | {"nanochat"}, leaf


def test_tools_without_a_model_start_without_torch():
    """In a fresh process, and with all that they import in turn."""
    wanted = [name for name in library() if is_within(name.removeprefix("nanochat."), STARTS_WITHOUT_TORCH)]
    wanted += [f"scripts.{name}" for name in SCRIPTS_WITHOUT_TORCH]
    code = ("import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
            "    assert 'torch' not in sys.modules, f'{name} imports torch'\n")
    done = subprocess.run([sys.executable, "-c", code, *wanted], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- library and scripts ---------------------------------------------------------------------------------------------

def test_library_reads_no_command_line():
    found = {name for name, tree in library().items() for imported in imports(tree) if imported == "argparse"}
    assert found <= COMMAND_LINES


def test_library_with_a_command_line_says_so():
    guarded = {name for name, tree in library().items() if any(is_main_guard(node) for node in tree.body)}
    assert guarded == COMMAND_LINES
    texts = [node.value for tree in library().values() for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for name in COMMAND_LINES:
        assert any(f"python -m {name}" in text for text in texts), f"nothing tells of {name}'s command line"


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
