"""The shape of the project: who imports whom, which names are public, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import circuits
import graphs
import replacement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "graphs": set(),
    "replacement": set(),
    "circuits": {"graphs", "replacement"},
}
"""Package -> the packages of this project that it may import."""

PUBLIC = {
    circuits: ["Direction", "Feature", "Intervention", "attribute", "intervene"],
    replacement: ["Dictionary", "DictionarySet", "InputError", "LocalModel", "ReplacementModel"],
    graphs: [
        "AttributionGraph", "InputError", "NodeKind", "NodeTable", "Path", "completeness_score", "components",
        "cumulative_influence", "edge_influence", "node_influence", "paths", "prune", "prune_masks", "read_neuronpedia",
        "render", "replacement_score", "row_residual", "to_dot", "to_networkx", "to_neuronpedia", "upload_problems",
        "write_graphml", "write_neuronpedia",
    ],
}  # fmt: skip


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


ALL_SOURCES = [path for package in PACKAGES for path in _sources(package)]


def _imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_downwards(package: str):
    """`circuits` stands on `replacement` and `graphs`, which know nothing of each other."""
    for path in _sources(package):
        strangers = _imported(path) & (PACKAGES.keys() - {package} - PACKAGES[package])
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_graphs_imports_no_model_library():
    for path in _sources("graphs"):
        assert not _imported(path) & {"torch", "transformers", "transformer_lens"}, path


def _modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys; print('\\n'.join(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_graph_loads_prunes_and_renders_without_torch(tmp_path: Path):
    code = f"""
import numpy as np
from scipy.sparse import csr_array
from graphs import AttributionGraph, NodeTable, prune, render, paths, to_neuronpedia, write_graphml
nodes = NodeTable(
    kind=[0, 2, 3], layer=[0, -1, 1], position=[0, 0, 0], feature=[5, 7, 9], activation=[1, 0, 0],
    probability=[0, 0, 1], label=("f", "a", "b"),
)
zeros = np.zeros(3)
weights = csr_array(np.array([[0, 2.0, 0], [0, 0, 0], [3.0, 1.0, 0]]))
graph = AttributionGraph(
    nodes=nodes, adjacency=weights, bias=zeros, bos=zeros, untraced=zeros, pre_activation=zeros, prompt="a",
    tokens=("a",), token_ids=[7], n_layers=1, model="m", dictionaries="d", n_active_features=1,
)
graph.save({str(tmp_path / "g.safetensors")!r})
small = prune(AttributionGraph.load({str(tmp_path / "g.safetensors")!r}))
render(small, {str(tmp_path / "g.dot")!r})
write_graphml(small, {str(tmp_path / "g.graphml")!r})
to_neuronpedia(small)
assert paths(small)
"""
    assert not _modules_after(code) & {"torch", "transformers", "transformer_lens", "replacement", "circuits"}


def test_help_loads_nothing_heavy():
    """`circuits --help` answers at once because nothing that takes long is imported for it."""
    code = "from circuits.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    heavy = {"torch", "transformers", "transformer_lens", "numpy", "scipy", "networkx", "rich", "huggingface_hub"}
    assert not _modules_after(code) & heavy


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_public_names_are_pinned(package):
    """Others build on these names; a change here is a change for them and belongs into CHANGELOG.md."""
    assert package.__all__ == PUBLIC[package]
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_files_and_functions_stay_short():
    """A file of more than 400 lines, or a function of more than 60, does two things."""
    long = []
    for path in ALL_SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                long.append(f"{path}: {node.name} has {lines} lines")
    assert not long


def test_every_module_says_what_it_is():
    assert not [path for path in ALL_SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_the_readme_maps_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {path.parent for path in ALL_SOURCES if path.parent.name != "facts"}
    for folder in sorted(folders):
        assert f"`{folder.relative_to(ROOT)}/`" in readme
    missing = [path for path in ALL_SOURCES if path.name != "__init__.py" and f"`{path.name}`" not in readme]
    assert not missing, "one line each under 'Where things are'"


def test_what_ships_stays_small():
    """The model and its dictionaries go into the wheel: 25 MB together, and no training state among them."""
    shipped = [path for path in (ROOT / "replacement/pretrained/atlas").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 25e6
    assert {path.suffix for path in shipped} <= {".safetensors", ".json", ".md"}


def test_nothing_is_pickled():
    """Weights and graphs are safetensors and JSON, so that loading them runs no code."""
    assert not [path for path in ALL_SOURCES if _imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}]
