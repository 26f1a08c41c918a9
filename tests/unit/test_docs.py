"""What the documentation names exists: files, functions, links, flags, environment variables, metrics."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalSettings
from engine.api.settings import Settings
from engine.config import EngineSettings
from engine.messages import LinkStats, Stats
from engine.observe.metrics import EngineMetrics
from proxy.config import ProxySettings
from proxy.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("proxy", "engine", "kvtransfer", "kernels", "deploy")
COMMANDS: tuple[type[Settings], ...] = (ProxySettings, EngineSettings, LocalSettings)
FOREIGN_FLAGS = {"--help", "--version", "--no-deps", "--x", "--no-x", "--x-y", "--X", "--engine-X", "--proxy-X"}

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"([\w./-]+\.py)(?::([\w.]+))?")
METHOD = re.compile(r"([A-Z]\w+)\.([a-z_]\w*)")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
VARIABLE = re.compile(r"\bTANDEM_[A-Z0-9_]+")
METRIC = re.compile(r"\btandem_(?:proxy|engine)_\w+")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def pages() -> list[object]:
    return [pytest.param(page, id=page.name) for page in PAGES]


def spoken(page: Path) -> Iterator[str]:
    """What stands in backticks, and every word of a fenced block: its pictures name functions too."""
    text = page.read_text(encoding="utf-8")
    yield from CODE.findall(FENCE.sub("", text))
    for block in FENCE.findall(text):
        yield from re.split(r"[\s(),]+", block)


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines: `name`, `Class`, `Class.member`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= _names(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in ast.walk(node) for name in _names(inner)}
    return frozenset(found)


def _names(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case _:
            return set()


@functools.cache
def everything() -> frozenset[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return frozenset().union(*map(names_in, files))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_named_files_and_their_functions_exist(page: Path) -> None:
    wrong = []
    for code in spoken(page):
        named = PATH.fullmatch(code)
        if named is None:
            continue
        path = ROOT / named[1]
        if not path.is_file() or (named[2] is not None and named[2] not in names_in(path)):
            wrong.append(code)
    assert not wrong


@pytest.mark.parametrize("page", pages())
def test_named_methods_exist(page: Path) -> None:
    methods = {code for code in spoken(page) if METHOD.fullmatch(code)}
    assert methods <= everything()


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong


@functools.cache
def flags() -> frozenset[str]:
    """Every flag of our commands and benches, as it may be written."""
    options = {option for command in COMMANDS for flag in command.flags().values() for option in flag.options}
    negations = {"--no-" + option[2:] for option in options}
    handed_on = {f"--{program}-{option[2:]}" for program in ("engine", "proxy") for option in options}
    benches = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "bench").glob("*.py"))
    return frozenset(options | negations | handed_on | set(FLAG.findall(benches)) | FOREIGN_FLAGS)


@pytest.mark.parametrize("page", pages())
def test_named_flags_exist(page: Path) -> None:
    assert set(FLAG.findall(page.read_text(encoding="utf-8"))) <= flags()


@pytest.mark.parametrize("page", pages())
def test_named_environment_variables_exist(page: Path) -> None:
    known = {flag.env for command in COMMANDS for flag in command.flags().values()}
    known |= {"TANDEM_ENGINE_X_Y", "TANDEM_PROXY_X_Y", "TANDEM_PROXY_", "TANDEM_LOCAL_"}  # patterns
    sources = [path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(TANDEM_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    assert set(VARIABLE.findall(page.read_text(encoding="utf-8"))) <= known | read | {"TANDEM_ISA"}


def exported() -> set[str]:
    """Metric names as both programs write them; a histogram's series are one name."""
    counts = dict.fromkeys((name for name in Stats.__struct_fields__ if name != "links"), 0)
    link = LinkStats(peer="p", transport="shm", gigabytes_per_s=1.0, connected=True)
    engine = EngineMetrics(lambda: Stats(**counts, links=[link])).exposition()
    proxy = Metrics()
    text = (engine + proxy.text([], proxy.handoffs)).decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    return set(kinds)


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    tables = {name for name in METRIC.findall(page) if f"| `{name}` |" in page}
    assert tables == exported()


@pytest.mark.parametrize("page", pages())
def test_named_metrics_exist(page: Path) -> None:
    assert set(METRIC.findall(page.read_text(encoding="utf-8"))) <= exported()


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in readme for page in PAGES if page.parent.name == "docs")
