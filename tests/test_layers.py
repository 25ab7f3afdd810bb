"""Imports go down only, and the heavy libraries stay where they belong."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "emoe_med"
LEVELS = {
    "errors": 0,
    "storage": 1,
    "moe": 1,
    "models": 2,
    "data": 2,
    "model_config": 3,
    "config": 4,
    "training": 5,
    "brainage": 6,
    "vision": 6,
    "pipeline": 7,
}
OWNERS = {
    "mlflow": {"training/mlflow_store.py"},
    "nibabel": {"data/volume.py", "data/nifti.py", "data/mgh.py"},
}
TORCH_ONLY = "moe"


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_go_down_only():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        here = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for name, line in imports(file):
            if name.startswith("emoe_med."):
                there = part_of(name)
                if there != here and LEVELS[there] >= LEVELS[here]:
                    wrong.append(f"{file}:{line} {here} imports {there}")
    assert not wrong


def test_heavy_libraries_have_one_owner():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE).as_posix()
        for name, line in imports(file):
            top = name.split(".")[0]
            if top in OWNERS and relative not in OWNERS[top]:
                wrong.append(f"{relative}:{line} imports {top}")
            if top == "monai" and not relative.startswith(("data/", "models/")):
                wrong.append(f"{relative}:{line} imports monai")
            if relative.startswith("moe/") and top not in {"torch", "emoe_med", *sys.stdlib_module_names}:
                wrong.append(f"{relative}:{line} imports {top}")
    assert not wrong


def test_nothing_unpickles_or_evaluates():
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    wrong = [
        f"{file}:{line} {name}"
        for file in PACKAGE.rglob("*.py")
        for name, line in imports(file)
        if name.split(".")[0] in banned and file.name != "pickled.py"
    ]
    assert not wrong


def test_the_one_reader_of_pickles_looks_names_up_in_its_own_list():
    tree = ast.parse((PACKAGE / "data" / "pickled.py").read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "pickle"}
    assert used == {"Unpickler", "UnpicklingError"}
    (reader,) = (n for n in tree.body if isinstance(n, ast.ClassDef))
    assert [n.name for n in reader.body if isinstance(n, ast.FunctionDef)] == ["find_class"]
    assert not any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "super" for n in ast.walk(reader))
