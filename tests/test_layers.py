"""Who may import whom. The layers of the architecture are promises; this reads every import and holds us to them."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proxy", "engine", "kvtransfer", "kernels", "deploy")

# What a module of the package on the left may import of ours, beside its own package.
MAY_IMPORT = {
    "proxy": ("engine.api", "engine.observe", "kvtransfer.protocol"),
    "engine": ("kvtransfer", "kernels"),
    "kvtransfer": (),
    "kernels": (),
    "deploy": ("engine.api", "engine.models.resolve"),
}

# These run where torch must not be: its import takes seconds, and its threads disturb. Reached through our own modules
# counts too, unless the import stands inside a function and so runs later.
WITHOUT_TORCH = (
    "engine.__main__",
    "engine.core",
    "engine.messages",
    "engine.config",
    "engine.client",
    "engine.process",
    "engine.scheduler",
    "engine.cache",
    "engine.migrate",
    "engine.server",
    "engine.text",
    "engine.api",
    "engine.observe",
    "engine.models.resolve",
    "kvtransfer",
    "proxy",
    "deploy",
)


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in files()}


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@functools.cache
def imports(module: str, top_level_only: bool) -> frozenset[str]:
    """Dotted names that the module imports. `from a import b` gives a.b where that is a module of ours, else a."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in _at_import_time(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write whole names"
            origin = node.module or ""
            found |= {f"{origin}.{alias.name}" if _ours(f"{origin}.{alias.name}") else origin for alias in node.names}
    return frozenset(found)


def _ours(name: str) -> bool:
    return name in modules()


def _at_import_time(tree: ast.AST) -> list[ast.AST]:
    """Every node that runs when the module is imported: not inside functions, not under `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            found += [inner for branch in node.orelse for inner in (branch, *_at_import_time(branch))]
            continue
        found += [node, *_at_import_time(node)]
    return found


def test_the_packages_are_found() -> None:
    assert {name.split(".")[0] for name in modules()} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        f"{module} imports {target}"
        for module in modules()
        if is_under(module, package)
        for target in imports(module, top_level_only=False)
        if target.split(".")[0] in PACKAGES and not any(is_under(target, prefix) for prefix in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("root", WITHOUT_TORCH)
def test_torch_is_not_imported(root: str) -> None:
    for module in [name for name in modules() if is_under(name, root)]:
        path = way_to_torch(module)
        assert not path, " imports ".join(path)


def way_to_torch(start: str) -> list[str]:
    """The chain of top-level imports from a module to torch; empty when there is none."""
    ways = {start: [start]}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        for target in imports(module, top_level_only=True):
            if target.split(".")[0] == "torch":
                return [*ways[module], target]
            if target in modules() and target not in ways:
                ways[target] = [*ways[module], target]
                waiting.append(target)
    return []


def test_no_two_modules_import_each_other() -> None:
    graph = {name: {target for target in imports(name, top_level_only=True) if _ours(target)} for name in modules()}
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"a cycle: {' -> '.join([*path, module])}"
        if module not in finished:
            for target in sorted(graph[module] - {module}):
                visit(target, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", [path for path in files() if path.name == "__init__.py"], ids=name_of)
def test_package_files_are_empty(path: Path) -> None:
    assert path.read_text(encoding="utf-8").strip() == ""


SAMPLE = """
import a
if TYPE_CHECKING:
    import b
def f():
    import c
try:
    import d
except E:
    pass
class K:
    import e
"""


def test_what_runs_at_import_time_is_told_from_what_runs_later() -> None:
    nodes = _at_import_time(ast.parse(SAMPLE))
    assert {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} == {"a", "d", "e"}


def test_the_api_process_does_not_load_torch() -> None:
    """The same promise, kept at run time: a library of ours might bring torch along."""
    names = [name for name in modules() if any(is_under(name, root) for root in WITHOUT_TORCH)]
    program = f"import sys; [__import__(name) for name in {names!r}]; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("roots", ["engine.command, engine.server.doors", "proxy.__main__", "deploy.local"])
def test_what_listens_starts_without_heavy_libraries(roots: str) -> None:
    """Each would take longer to import than all the rest."""
    program = f"import sys, {roots}; print(sorted({{'torch', 'transformers', 'numpy', 'gguf'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60, capture_output=True)
    assert found.stdout == b"[]\n"
