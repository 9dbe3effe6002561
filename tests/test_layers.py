"""Who may import whom, held by walking every import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module belongs to the longest prefix that fits. It may import its own layer and the ones listed.
LAYERS: dict[str, tuple[str, ...]] = {
    "engine.errors engine.config engine.specs engine.stats engine.trail engine.clock": ("L0", ""),
    "engine.blocks engine.session engine.batch engine.results engine.admission engine.past engine.generation"
    " engine.expiry engine.shares engine.eviction engine.turns engine.events engine.prefix engine.tally": (
        "L1",
        "L0",
    ),
    "engine.store engine.scheduler engine.gather engine.serving engine.tenants engine.replay": ("L2", "L0 L1"),
    "engine.kv_pool engine.attention engine.layers engine.models engine.checkpoints engine.kernels engine.text"
    " engine.chat engine.sampling engine.compat engine.parallel engine.graphs engine.gpu engine.packing"
    " engine.upload": (
        "L3",
        "L0 L1",
    ),
    "engine.runner": ("L4", "L0 L1 L3"),
    "engine.books engine.engine": ("L5", "L0 L1 L2"),
    "engine.loading": ("L6", "L0 L1 L3 L4"),
    "engine.team": ("L7", "L0 L1 L3 L4 L6"),
    "keypast.schemas keypast.openai_schemas keypast.wire keypast.oip keypast.past keypast.batch keypast.keys": (
        "S0",
        "",
    ),
    "keypast": ("C", "S0"),
    "service.settings service.errors service.limits service.worker service.logs service.watching service.once"
    " service.bodies service.traffic service.host": (
        "S1",
        "S0 L0 L1 L5 L3",
    ),
    "service": ("S2", "S0 S1 L0 L1 L3 L5 L6 L7 C"),
}
TORCH_FREE = {"L0", "L1", "L2", "L5", "S0", "C", "S1"}
HEAVY = {"torch", "transformers"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("engine", "keypast", "service"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def layer_of(module: str) -> tuple[str, set[str]] | None:
    found: tuple[int, tuple[str, str]] | None = None
    for names, layer in LAYERS.items():
        for name in names.split():
            if (module == name or module.startswith(f"{name}.")) and (found is None or len(name) > found[0]):
                found = (len(name), (layer[0], layer[1]))
    return None if found is None else (found[1][0], {found[1][0], *found[1][1].split()})


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) of every import in the file."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in at_top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in at_top


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    own = layer_of(module)
    if module in ("engine", "service"):
        return  # the package's own front
    assert own is not None, f"{module} has no layer: add it to LAYERS"
    layer, allowed = own
    for imported, at_top in imports(path):
        if not at_top:
            continue  # an import at call time is how a light module starts a heavy one
        top = imported.partition(".")[0]
        if layer in TORCH_FREE:
            assert top not in HEAVY, f"{module} ({layer}) imports {imported}"
        if layer.startswith(("L", "C")) or layer == "S0":
            assert top not in ("fastapi", "starlette", "uvicorn"), f"{module} ({layer}) imports {imported}"
        if layer.startswith("L"):
            assert top != "asyncio", f"{module} ({layer}) imports {imported}"
        if top in ("engine", "service", "keypast"):
            other = layer_of(imported)
            assert other is not None, imported
            assert other[0] in allowed, f"{module} ({layer}) imports {imported} ({other[0]})"


def test_one_module_knows_how_spans_are_made() -> None:
    for module, path in modules():
        tops = {imported.partition(".")[0] for imported, _ in imports(path)}
        assert ("opentelemetry" in tops) == (module == "service.tracing"), module


def test_the_engine_never_reads_the_environment() -> None:
    for module, path in modules():
        if module.startswith("engine"):
            text = path.read_text()
            assert "os.environ" not in text, module
            assert "getenv" not in text, module


def test_a_model_kind_is_named_only_where_kinds_live() -> None:
    for module, path in modules():
        if module.startswith(("engine.models", "keypast.schemas")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = [node.left, *node.comparators]
                named = [value.value for value in values if isinstance(value, ast.Constant)]
                assert not {"attention", "decoder"} & set(map(str, named)), f"{module}:{node.lineno} asks for a kind"
