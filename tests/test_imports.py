"""Imports point down only: scripts -> training -> inference -> decoding -> modules -> ops."""

import ast
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "common": set(),
    "ops": set(),
    "text": {"common"},
    "corpora": {"common"},
    "modules": {"ops", "common"},
    "decoding": {"modules", "text", "ops", "common"},
    "inference": {"decoding", "modules", "text", "corpora", "ops", "common"},
    "librispeech_prepare": {"corpora", "common"},
}
MAY_IMPORT["training"] = MAY_IMPORT["inference"] | {"inference", "librispeech_prepare"}
MAY_IMPORT["export"] = MAY_IMPORT["serving"] = MAY_IMPORT["inference"] | {"inference"}
MAY_IMPORT |= dict.fromkeys(("transcribe", "evaluate"), MAY_IMPORT["serving"])
MAY_IMPORT |= dict.fromkeys(
    ("train_CTC", "train_S2S", "train_LM", "train_RNNT"), MAY_IMPORT["training"] | {"training"}
)
UPPERMOST = {"tests", "benchmarks", "tools"}
"""These may import everything, and nothing imports them."""

OPTIONAL_IN_OPS = {"triton", "mamba_ssm", "causal_conv1d", "selective_scan_cuda"}
NO_MODEL_CODE = {"torch", "speechbrain", "torchaudio", "sentencepiece"}
NO_TORCH = {"torch", "speechbrain", "torchaudio"}


def top_level_names() -> dict[str, list[Path]]:
    """Every package and script of the repository with its source files."""
    units = {path.stem: [path] for path in REPOSITORY.glob("*.py")}
    for folder in REPOSITORY.iterdir():
        if not folder.name.startswith(".") and any(folder.glob("*.py")):
            units[folder.name] = sorted(folder.rglob("*.py"))
    return units


UNITS = top_level_names()


def imports_of(source: Path) -> set[str]:
    """First components of all names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = source.relative_to(REPOSITORY).parts[0]
            names.add(node.module.split(".")[0] if node.level == 0 else package)
    return names


def sources(*units: str) -> list[Path]:
    return [source for unit in units for source in UNITS.get(unit, [])]


def name_of(source: Path) -> str:
    return str(source.relative_to(REPOSITORY))


def test_every_part_has_its_place_in_the_rule():
    assert UNITS.keys() <= MAY_IMPORT.keys() | UPPERMOST
    assert {"common", "ops", "text", "modules", "decoding", "training", "corpora"} <= UNITS.keys()


@pytest.mark.parametrize("source", sources(*(MAY_IMPORT.keys() & UNITS.keys())), ids=name_of)
def test_imports_point_down(source):
    unit = source.relative_to(REPOSITORY).parts[0].removesuffix(".py")
    own = imports_of(source) & (UNITS.keys() | UPPERMOST)
    assert own <= MAY_IMPORT[unit] | {unit}


@pytest.mark.parametrize("source", sources("ops"), ids=name_of)
def test_ops_imports_torch_alone(source):
    allowed = {"torch", "ops"} | OPTIONAL_IN_OPS | sys.stdlib_module_names
    assert imports_of(source) <= allowed


@pytest.mark.parametrize("source", sources("corpora", "librispeech_prepare"), ids=name_of)
def test_preparing_a_corpus_needs_no_model_code(source):
    assert not imports_of(source) & NO_MODEL_CODE


@pytest.mark.parametrize("source", sources("common", "text", "serving"), ids=name_of)
def test_text_errors_and_serving_need_no_torch(source):
    assert not imports_of(source) & NO_TORCH


@pytest.mark.parametrize(
    "source",
    [path for unit in UNITS.values() for path in unit if path.parent == REPOSITORY],
    ids=name_of,
)
def test_importing_a_script_runs_nothing(source):
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        assert not isinstance(node, ast.For | ast.While | ast.With)
        assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant)


def test_the_figure_of_the_imports_is_the_rule():
    figure = ElementTree.parse(REPOSITORY / "docs/architecture-imports.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    parts, box, arrows = {}, None, []
    for shape in figure:
        if shape.tag == f"{svg}rect":
            box = [float(shape.get(name, 0)) for name in ("x", "y", "width", "height")]
            box = None if shape.get("class") in (None, "side") else box
        elif shape.get("class") == "t" and box:
            for name in shape.text.split():
                parts[name.removesuffix(".py")] = box
        elif shape.tag == f"{svg}polyline":
            arrows.append([tuple(map(float, p.split(","))) for p in shape.get("points").split()])

    def on_the_edge(x: float, y: float) -> set[str]:
        def holds(left, top, width, height):
            inside = left <= x <= left + width and top <= y <= top + height
            return inside and (x in (left, left + width) or y in (top, top + height))

        return {part for part, box in parts.items() if holds(*box)}

    leads_to = {part: set() for part in parts}
    for points in arrows:
        assert len(on_the_edge(*points[-1])) == 1, points
        for part in on_the_edge(*points[0]):
            leads_to[part] |= on_the_edge(*points[-1])
    for _ in parts:  # to what can be reached
        leads_to = {p: q.union(*(leads_to[r] for r in q)) for p, q in leads_to.items()}
    assert leads_to == {part: MAY_IMPORT[part] for part in UNITS if part in MAY_IMPORT}
