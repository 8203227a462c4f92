"""Records what the hooks of vllm_ppow can see of a vLLM: modules, classes, methods and their parameters.

    python tests/contracts/record_signatures.py WHEEL…

writes signatures/VERSION.json beside this file for each wheel. The wheel is read, never installed or imported, so a
build for GPUs can be recorded on any machine:

    pip download --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 --dest wheels vllm==0.33.0

Recorded is the part of vLLM in RECORDED and what facts.py asks, by parsing the source. Left out: default values (all
read None), annotations, what code does otherwise; names that a module computes while it is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facts import FACTS

SIGNATURES = Path(__file__).parent / "signatures"
FORMAT = 1
# Modules; ".*" adds all that a package holds. A module outside is unknown to the tests, which say so: add it here then.
RECORDED = (
    "vllm",
    "vllm.version",
    "vllm.plugins",
    "vllm.config",
    "vllm.config.load",
    "vllm.config.speculative",
    "vllm.config.utils",
    "vllm.config.vllm",
    "vllm.engine.arg_utils",
    "vllm.engine.protocol",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.model_loader.reload.*",
    "vllm.platforms",
    "vllm.platforms.interface",
    "vllm.v1.outputs",
    "vllm.v1.request",
    "vllm.v1.core.sched.*",
    "vllm.v1.engine.*",
    "vllm.v1.executor.*",
    "vllm.v1.metrics.loggers",
    "vllm.v1.metrics.prometheus",
    "vllm.v1.metrics.reader",
    "vllm.v1.metrics.stats",
    "vllm.v1.sample.*",
    "vllm.v1.spec_decode.*",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.worker_base",
    "vllm.v1.worker.gpu.cudagraph_utils",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.sample.gumbel",
    "vllm.v1.worker.gpu.spec_decode.*",
)


def main(wheels: list[str]) -> int:
    """Record each wheel; exit code 2 without any, 1 for one that is not vLLM's."""
    if not wheels:
        print("Name one wheel of vLLM or more: record_signatures.py WHEEL…", file=sys.stderr)
        return 2
    for name in wheels:
        try:
            recording = record_wheel(Path(name))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            print(f"Error: {name} is not a readable wheel of vLLM ({error}).", file=sys.stderr)
            return 1
        path = SIGNATURES / f"{recording['version']}.json"
        write(recording, path)
        print(f"{path}: {len(recording['modules'])} modules of {recording['wheel']}")
    return 0


def record_wheel(wheel: Path) -> dict[str, Any]:
    """What `main` writes for a wheel.

    Raises:
        ValueError: it holds no vLLM.
    """
    distribution, version = wheel.name.split("-")[:2]
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        recorded = record({name: archive.read(name).decode("utf-8") for name in names if is_needed(name)})
    if "vllm.engine.arg_utils" not in recorded["modules"]:
        raise ValueError("it holds no vllm/engine/arg_utils.py")
    return {
        "format": FORMAT,
        "distribution": distribution.replace("_", "-"),
        "version": version,
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        **recorded,
    }


def record_installed(package: Path) -> dict[str, Any]:
    """The facts and modules of an installed vLLM, given the directory of its package."""
    files = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py")}
    return record({name: path.read_text("utf-8") for name, path in files.items() if is_needed(name)})


def record(sources: Mapping[str, str]) -> dict[str, Any]:
    """The facts and modules of a vLLM, given the source of each file by its path below the site directory."""
    by_module = {module_of(name): source for name, source in sources.items()}
    return {
        "facts": {fact.key: fact.find(by_module.get(fact.module)) for fact in FACTS},
        "modules": {
            module_of(name): _record(source, module_of(name), name.endswith("/__init__.py"))
            for name, source in sorted(sources.items())
            if is_recorded(module_of(name))
        },
    }


def is_needed(file: str) -> bool:
    """Whether a file of a wheel holds something that is recorded."""
    return is_recorded(module_of(file)) or module_of(file) in {fact.module for fact in FACTS}


def module_of(file: str) -> str:
    """The module's name, given a path as it stands in a wheel."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_recorded(module: str) -> bool:
    """Whether RECORDED covers a module: one that is covered and not in a recording is missing from that vLLM."""
    return module in RECORDED or any(
        f"{module}.".startswith(entry.removesuffix("*")) for entry in RECORDED if entry.endswith(".*")
    )


def write(recording: Mapping[str, Any], path: Path) -> None:
    """Write a recording with one line per module, through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in recording.items() if key != "modules"}
    lines = [
        f"{json.dumps(name)}: {json.dumps(module, separators=(',', ':'))}"
        for name, module in recording["modules"].items()
    ]
    text = json.dumps(head, indent=0)[:-2] + ',\n"modules": {\n' + ",\n".join(lines) + "\n}\n}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------- one module


def _record(source: str, module: str, is_package: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"imports": {}, "names": [], "functions": {}, "classes": {}}
    package = module if is_package else module.rpartition(".")[0]
    for node in _top_level(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            record["functions"][node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            record["classes"][node.name] = _class(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            record["imports"].update(_imports(node, package))
        else:
            record["names"] += [name for name in _assigned(node) if name not in record["names"]]
    return {key: value for key, value in record.items() if value}


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those of every branch included; what only type checkers see is left out."""
    for node in body:
        if isinstance(node, ast.If):
            seen_by_all = (
                node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [*node.body, *node.orelse]
            )
            yield from _top_level(seen_by_all)
        elif isinstance(node, ast.Try):
            handlers = [line for handler in node.handlers for line in handler.body]
            yield from _top_level([*handlers, *node.body, *node.orelse, *node.finalbody])
        else:
            yield node


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str]]:
    """(name bound in the module, "module" or "module:name") for what a recorded module gives."""
    if isinstance(node, ast.Import):
        found = [(name.asname, name.name) for name in node.names if name.asname]
    else:
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        found = [(name.asname or name.name, f"{origin}:{name.name}") for name in node.names]
    return ((name, where) for name, where in found if is_recorded(where.partition(":")[0]))


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _class(node: ast.ClassDef) -> dict[str, Any]:
    methods = {
        one.name: signature(one)
        for one in node.body
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    fields = [
        one.target.id
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    ]
    attributes = {
        one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute)
        and isinstance(one.ctx, ast.Store)
        and isinstance(one.value, ast.Name)
        and one.value.id == "self"
    }
    record = {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": methods,
        "fields": fields,
        "attributes": sorted(attributes - set(fields)),
    }
    return {key: value for key, value in record.items() if value}


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """ "static(a, b=None)", "class(cls)", "property(self)" or "(self, *args)": parameters without hints."""
    arguments = node.args
    bare = ast.arguments(
        posonlyargs=[ast.arg(one.arg) for one in arguments.posonlyargs],
        args=[ast.arg(one.arg) for one in arguments.args],
        vararg=ast.arg(arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=[ast.arg(one.arg) for one in arguments.kwonlyargs],
        kw_defaults=[None if one is None else ast.Constant(None) for one in arguments.kw_defaults],
        kwarg=ast.arg(arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=[ast.Constant(None)] * len(arguments.defaults),
    )
    decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    kinds = {
        "staticmethod": "static",
        "classmethod": "class",
        "property": "property",
        "cached_property": "property",
    }
    kind = next((kinds[name] for name in sorted(decorators) if name in kinds), "")
    return f"{kind}({ast.unparse(bare)})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
