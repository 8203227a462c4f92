"""Who may import whom, read from the source, and what starting `ppow` loads.

The checker is itself tested on planted violations, one per rule, so that a rule that can never fail is noticed.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

import vllm_ppow

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = (ROOT, ROOT / "train")
PACKAGES = ("vllm_ppow", "ppow_train")
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "speculators",
    "matplotlib",
)

TRAINING_PARTS = ("rollout", "windowing", "sampler", "verification", "rewards", "objectives", "drafters")


# ---------------------------------------------------------------- the checker


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement: what it names, where, and whether it runs only when a function is called."""

    name: str
    line: int
    lazy: bool


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which files may import a module.

    Attributes:
        imported: the module; its submodules are meant too.
        importers: files the rule is about, as patterns.
        allowed: of these, the files that may import it.
        lazily: of these, the files that may import it inside functions only.
        harmless: names below `imported` that every importer may use.
    """

    imported: str
    importers: tuple[str, ...] = ("*",)
    allowed: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()

    def forbids(self, file: str, found: Import) -> bool:
        if not matches(file, self.importers) or not is_within(found.name, self.imported):
            return False
        if any(is_within(found.name, name) for name in self.harmless) or matches(file, self.allowed):
            return False
        return not (found.lazy and matches(file, self.lazily))


RULES = (
    Rule("ppow_train", importers=("vllm_ppow/*",)),
    Rule(
        "vllm_ppow",
        importers=("ppow_train/*",),
        lazily=(
            "ppow_train/profiling.py",
            "ppow_train/profile_engine.py",
        ),  # they measure the plugin's vLLM, inside it
        # Serving's facts that commands tell the user before a server starts: what a config becomes (`config`), and what
        # the installed vLLM can do (`compat.capabilities`, which imports vLLM only when it is asked).
        harmless=tuple(
            f"vllm_ppow.{name}"
            for name in (
                "other_lengths",
                "speedup",
                "artifact",
                "resolve",
                "merge",
                "metrics",
                "cost_profile",
                "config",
                "compat.capabilities",
                "__version__",
            )
        ),
    ),
    Rule(
        "vllm",
        allowed=(
            *(
                f"vllm_ppow/{name}.py"
                for name in ("plugin", "loader", "scheduler", "metrics", "metrics_logger")
            ),
            "vllm_ppow/compat/*",
        ),
        lazily=tuple(f"ppow_train/{name}.py" for name in ("data", "serving_eval", "generation", "profiling")),
    ),
    Rule("trl", allowed=tuple(f"ppow_train/{name}.py" for name in ("trainer", "config", "compat"))),
    # What heals a broken torch or vLLM cannot begin by importing it.
    *(Rule(name, importers=("vllm_ppow/compat/cpu_install.py", "vllm_ppow/__init__.py")) for name in HEAVY),
    # `ppow COMMAND --help` must not wait for torch.
    *(
        Rule(
            name,
            importers=("ppow_train/cli.py", "ppow_train/errors.py", "ppow_train/commands/*"),
            lazily=("*",),
        )
        for name in HEAVY
    ),
    # cli -> trainer -> parts -> types; nothing looks back.
    Rule("ppow_train", importers=("ppow_train/types.py",)),
    *(
        Rule(
            f"ppow_train.{above}",
            importers=tuple(f"ppow_train/{part}*" for part in (*TRAINING_PARTS, "trainer")),
        )
        for above in ("cli", "commands")
    ),
    Rule("ppow_train.trainer", importers=tuple(f"ppow_train/{part}*" for part in TRAINING_PARTS)),
)


def matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Every import in a source text; `from a import b` counts as `a.b`, a relative one is resolved."""
    package = Path(file).with_suffix("").parts[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        lazy = (
            lazy
            or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or is_type_checking(node)
        )
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := name_imported_by(node)):
            yield Import(name, node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy)

    yield from walk(ast.parse(source, filename=file), lazy=False)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def name_imported_by(node: ast.Call) -> str | None:
    """The module that `importlib.import_module("…")` or `__import__("…")` names."""
    called = ast.unparse(node.func).rpartition(".")[2]
    first = node.args[0] if node.args else None
    if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
        return str(first.value)
    return None


def violations(source: str, file: str) -> list[str]:
    return [
        f"{file}:{found.line} imports {found.name}"
        for found in imports_of(source, file)
        if any(rule.forbids(file, found) for rule in RULES)
    ]


def source_files() -> dict[str, Path]:
    """Path below its source root -> file, of every module of both packages."""
    return {
        path.relative_to(root).as_posix(): path
        for root in SOURCE_ROOTS
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


# ---------------------------------------------------------------- import rules


def test_every_module_keeps_the_import_rules():
    files = source_files()
    assert {"vllm_ppow/artifact.py", "ppow_train/cli.py"} <= set(files), "the packages were not found"
    broken = [line for name, path in files.items() for line in violations(path.read_text("utf-8"), name)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vllm_ppow/merge.py", "def f():\n    import ppow_train.types"),
        ("vllm_ppow/merge.py", "if TYPE_CHECKING:\n    from ppow_train import types"),
        ("vllm_ppow/artifact.py", "def f():\n    from vllm.config import VllmConfig"),
        ("vllm_ppow/config.py", "import importlib\nimportlib.import_module('vllm.config')"),
        ("vllm_ppow/compat/cpu_install.py", "import torch"),
        ("vllm_ppow/compat/cpu_install.py", "def f():\n    import vllm"),
        ("ppow_train/data.py", "import vllm"),
        ("ppow_train/trainer.py", "def f():\n    import vllm"),
        ("ppow_train/trainer.py", "from vllm_ppow import loader"),
        ("ppow_train/trainer.py", "from vllm_ppow.compat.worker import x"),
        ("ppow_train/rewards.py", "from trl import GRPOTrainer"),
        ("ppow_train/commands/train.py", "import torch"),
        ("ppow_train/commands/train.py", "def f():\n    import trl"),
        ("ppow_train/types.py", "from .rewards import reward"),
        ("ppow_train/drafters/eagle3.py", "from ..trainer import PPOWTrainer"),
        ("ppow_train/rewards.py", "from ppow_train.trainer import PPOWTrainer"),
        ("ppow_train/trainer.py", "def f():\n    from ppow_train.commands.train import train"),
    ],
)
def test_a_planted_violation_is_found(file, source):
    assert violations(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vllm_ppow/loader.py", "from vllm.model_executor import model_loader"),
        ("vllm_ppow/compat/seams.py", "import vllm"),
        ("vllm_ppow/artifact.py", "import vllm_ppow.speedup"),
        ("ppow_train/data.py", "def f():\n    import vllm"),
        ("ppow_train/trainer.py", "import trl\nfrom vllm_ppow.speedup import speedup_reward"),
        ("ppow_train/commands/train.py", "def f():\n    from ppow_train.trainer import PPOWTrainer"),
        ("ppow_train/drafters/eagle3.py", "from ..types import Window"),
    ],
)
def test_what_is_allowed_passes(file, source):
    assert not violations(source, file)


# ---------------------------------------------------------------- starting up


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement, in a fresh interpreter."""
    code = (
        f"{statement}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import vllm_ppow",
        "import vllm_ppow.artifact",
        "import vllm_ppow.compat.cpu_install",
        "import ppow_train",
        "from ppow_train.cli import run; run(['--help'])",
    ],
)
def test_starting_loads_nothing_heavy(statement):
    assert not loaded_by(statement) & set(HEAVY)


def test_loaded_by_notices_a_heavy_module():
    assert "click" in loaded_by("import click")


def test_the_version_is_said_once():
    assert metadata.version("vllm-ppow") == vllm_ppow.__version__


# ---------------------------------------------------------------- no package index is named


# In two parts, so that this file does not name them.
REGISTRY_HOSTS = tuple(
    f"{name}.{end}"
    for name, end in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pypi", "nvidia.com"),
        ("download.pytorch", "org"),
        ("wheels.vllm", "ai"),
        ("conda.anaconda", "org"),
        ("registry.npmjs", "org"),
        ("crates", "io"),
        ("proxy.golang", "org"),
        ("deb.debian", "org"),
    )
)
INDEX_OPTIONS = ("--index" + "-url", "--extra-index" + "-url", "--find" + "-links")
SCRIPTS = ("Makefile", ".ci/*", ".ci/requirements/*")


def named_registries(file: str, text: str) -> list[str]:
    """Registry hosts that a file names; in the files that install things, options that choose an index too."""
    wanted = (*REGISTRY_HOSTS, *INDEX_OPTIONS) if matches(file, SCRIPTS) else REGISTRY_HOSTS
    return [word for word in wanted if word in text]


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_package_registry():
    found = {
        name: named_registries(name, (ROOT / name).read_text("utf-8", "ignore")) for name in tracked_files()
    }
    assert "pyproject.toml" in found
    assert not {name: words for name, words in found.items() if words}


def test_a_named_registry_is_found():
    assert named_registries("README.md", f"see {REGISTRY_HOSTS[0]}/simple")
    assert named_registries(".ci/setup.sh", f"pip install {INDEX_OPTIONS[0]} somewhere")
    assert not named_registries("README.md", "pip install vllm-ppow")
