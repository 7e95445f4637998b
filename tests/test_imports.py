"""Imports point downwards in this order, so there are no cycles between files or folders."""

import ast
import sys

from conftest import ROOT

# Each file may import only files of later groups, and files of its own folder (which must not form a cycle either).
ORDER = [["tools"], ["train", "prepare", "sample"], ["storygpt"], ["modern"], ["model"]]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
NO_MODEL = ("storygpt.corpus", "storygpt.system")  # they know of no model: of storygpt, they import only each other
FILES = [path for pattern in ("*.py", "tools/**/*.py", "storygpt/**/*.py") for path in sorted(ROOT.glob(pattern))]


def module_of(path):
    """The dotted name of a file: storygpt/system/files.py is storygpt.system.files."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & MODULES or {node.module}
    return found


MODULES = {module_of(path) for path in FILES}
ALL_IMPORTS = {module_of(path): imports_of(path) for path in FILES}
IMPORTS = {module: imports & MODULES for module, imports in ALL_IMPORTS.items()}


def test_a_file_imports_only_what_is_below_it():
    for module, imported in [(importer, imported) for importer in MODULES for imported in IMPORTS[importer]]:
        folder, other = module.split(".")[0], imported.split(".")[0]
        assert other == folder or RANK[other] > RANK[folder], f"{module} imports {imported}"
        if module.startswith(NO_MODEL):
            assert imported == "storygpt" or imported.startswith(NO_MODEL), f"{module} imports {imported}"


def test_the_model_imports_torch_only():
    for module, allowed in (("model", {"torch"}), ("modern", {"torch", "model"})):
        assert {name.split(".")[0] for name in ALL_IMPORTS[module]} - sys.stdlib_module_names == allowed


def test_only_preparing_needs_datasets_and_tokenizers():
    for module in ("train", "sample"):
        files, left = set(), {module}  # the modules that it needs
        while left:
            files |= left
            left = set().union(*(ALL_IMPORTS.get(each, set()) for each in left)) - files
        users = {each for each in files if {"datasets", "tokenizers"} & ALL_IMPORTS.get(each, set())}
        assert users == {"storygpt.corpus.tokenizer"}  # in `trained`, which only prepare.py calls


def test_there_is_no_cycle_between_files():
    done = set()
    while ready := {module for module in MODULES - done if IMPORTS[module] <= done}:
        done |= ready
    assert done == MODULES, f"a cycle among {sorted(MODULES - done)}"
