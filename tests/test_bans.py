"""What runs code out of data is nowhere in the product, and its tests replace nothing in what they test."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen"}
ROOMS = (
    "engine",
    "keypast",
    "service",
    "benchmarks",
    "examples",
    "deploy",
    "tools",
)  # tests make pickles, to send them
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def banned(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
            for keyword in node.keywords:
                if (keyword.arg, ast.unparse(keyword.value)) in (("allow_pickle", "True"), ("shell", "True")):
                    yield f"{called}({keyword.arg}=True)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert list(banned(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import yaml.loader",
        "from pickle import loads",
        "torch.load(path)",
        "eval('1')",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_each_is_found(source: str) -> None:
    assert list(banned(source))


@pytest.mark.parametrize("source", ["model.eval()", "re.compile('a')", "subprocess.run([line])", "json.loads('1')"])
def test_what_only_sounds_like_it_is_not(source: str) -> None:
    assert not list(banned(source))


def test_fakes_are_handed_to_constructors() -> None:
    """What is patched proves nothing of what users call."""
    for path in (ROOT / "tests").rglob("*.py"):
        names = {getattr(node, "id", getattr(node, "arg", None)) for node in ast.walk(ast.parse(path.read_text()))}
        assert not names & {"monkeypatch", "mocker", "patch"}, path
