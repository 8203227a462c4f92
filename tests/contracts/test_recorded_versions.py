"""Every hook attaches to every vLLM that was recorded from its wheel, installed here or not.

The hooks run as they are, in a process of their own, against the recorded modules (recorded_vllm.py): which seams there
are is what they ask for, not a second list. That recordings are true is checked on the installed vLLM.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from facts import FACTS, MISSING
from packaging.requirements import Requirement
from record_signatures import FORMAT, SIGNATURES, is_recorded, record_installed

from vllm_ppow.compat import decode_graphs, draft_loading, window
from vllm_ppow.config import _PATHS_TAKEN_FOR_ANOTHER_METHOD

ROOT = Path(__file__).parents[2]
RECORDINGS = {path.stem: path for path in sorted(SIGNATURES.glob("*.json"))}
each_version = pytest.mark.parametrize("version", RECORDINGS)

ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
WORKER = "vllm.v1.worker.worker_base:WorkerWrapperBase"
# Without these no adapter is served: the config could not be rewritten, or the merge could not be proved.
REWRITE = f"{ENGINE_ARGS}.create_speculative_config"
PROOFS = [f"{ENGINE_ARGS}.create_engine_config", f"{WORKER}.init_device", f"{WORKER}.initialize_from_config"]


def name_of(seam: tuple[str, str, str]) -> str:
    module, owner, method = seam
    return f"{module}:{owner}.{method}"


# Without these the draft window stays fixed, and all else works.
WINDOW = [f"vllm.v1.core.sched.scheduler:Scheduler.{method}" for method, _ in window.SCHEDULER_SEAMS]
LEFT_OUT = [REWRITE, *PROOFS, *WINDOW, name_of(draft_loading.V1_DRAFT_MODEL)]


@functools.cache
def recording(version: str) -> dict:
    return json.loads(RECORDINGS[version].read_text("utf-8"))


@functools.cache
def attached_to_all() -> dict[tuple[str, str], dict]:
    """(version, method left out or "") -> what recorded_vllm.py saw when it attached every hook."""
    command = [sys.executable, Path(__file__).with_name("recorded_vllm.py"), *RECORDINGS.values()]
    lacking = [part for name in LEFT_OUT for part in ("--without", name)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'train'}:{ROOT}"}
    done = subprocess.run([*command, *lacking], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["recording"], "".join(line["without"])): line for line in lines}


def attached(version: str, without: str = "") -> dict:
    return attached_to_all()[version, without]


# ---------------------------------------------------------------- the hooks, on every version


@each_version
def test_every_hook_attaches(version):
    seen = attached(version)
    assert (seen["logged"], seen["failed"], seen["refused"]) == ([], {}, "")
    assert seen["adaptive"]
    assert set(seen["installed"]) >= {REWRITE, *PROOFS, f"{ENGINE_ARGS}.add_cli_args"}


@each_version
def test_the_load_shims_that_this_version_needs(version):
    """The table in compat/draft_loading.py: which drafters of the V2 runner there are is asked of the code."""
    v2_draft_model = {
        "0.26.0": set(),
        "0.31.0": {name_of(draft_loading.V2_PLAIN_DRAFT_MODEL)},
    }.get(version, {name_of(draft_loading.V2_DRAFT_MODEL)})
    expected = {name_of(draft_loading.V1_DRAFT_MODEL), name_of(draft_loading.V2_EAGLE), *v2_draft_model}
    assert {
        name
        for name in attached(version)["installed"]
        if ".load_draft_model" in name or "_create_draft" in name
    } == expected


@each_version
def test_which_v2_runners_draft_as_the_scheduler_says(version):
    """`v2_runner.drafts_as_scheduled` asks for this field; before 0.32 the window is fixed on the V2 runner."""
    kept = recording(version)["modules"]["vllm.v1.worker.gpu.model_runner"]["classes"]["ExecuteModelState"]
    old = tuple(map(int, version.split(".")[:2])) < (0, 32)
    assert ("num_spec_tokens_to_schedule" in kept["fields"]) is not old


@each_version
def test_where_draft_lengths_change_graphs_are_listed_as_we_expect(version):
    """`decode_graphs` adds to that list; before 0.32 the window is fixed on the V2 runner, and it is let be."""
    if tuple(map(int, version.split(".")[:2])) < (0, 32):
        return
    module, name, method = decode_graphs._CANDIDATES
    manager = recording(version)["modules"][module]["classes"][name]
    assert manager["methods"][method] == "(self)"
    assert {"_candidates", "_capture_descs"} <= set(manager["attributes"])
    descriptor = recording(version)["modules"][module]["classes"]["BatchExecutionDescriptor"]
    assert {"num_tokens", "num_reqs", "uniform_token_count", "num_active_loras"} <= set(descriptor["fields"])


@each_version
def test_which_v2_runners_draw_drafts_independently(version):
    """`v2_runner.draws_independently` asks for this parameter; before 0.31 sampled drafts are served by V1 alone."""
    sampler = recording(version)["modules"]["vllm.v1.worker.gpu.sample.gumbel"]["functions"]["gumbel_sample"]
    old = tuple(map(int, version.split(".")[:2])) < (0, 31)
    assert ("is_drafting" in str(sampler)) is not old


@each_version
def test_no_drafter_of_the_v2_runner_is_overlooked(version):
    """A class that loads a drafter with the target's load config, and that method ppow can reach, needs a shim."""
    loads = {
        f"{module}:{name}.load_draft_model"
        for module, record in recording(version)["modules"].items()
        for name, one in record.get("classes", {}).items()
        if "load_draft_model" in one.get("methods", {})
    }
    other_methods = {
        *(
            "dflash",
            "dspark",
            "mtp",
            "multi_module_mtp",
            "gemma4",
            "lilicorr",
            "xpress",
            "extract_hidden_states",
        )
    }
    reached = {
        one for one in loads if re.split("[.:]", one.split(".spec_decode.")[1])[0] not in other_methods
    }
    abstract = {"vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_draft_model"}
    assert reached - abstract <= set(attached(version)["installed"])


@each_version
def test_what_we_subclass_has_the_methods_that_we_override(version):
    overrides = attached(version)["overrides"]
    assert any(".get_all_weights overrides vllm." in line for line in overrides)
    assert any("._update_after_schedule overrides vllm." in line for line in overrides)


@each_version
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.where or fact.module}-{FACTS.index(fact)}")
def test_what_vllm_does_inside(version, fact):
    assert fact.key in recording(version)["facts"], (
        "facts.py changed: run record_signatures.py on the wheels again"
    )
    found = recording(version)["facts"][fact.key]
    assert (found if found == MISSING else tuple(found)) in fact.allowed, fact.why


def test_the_paths_that_vllm_takes_for_another_method_are_those_that_we_refuse():
    (fact,) = [one for one in FACTS if "draft_model_config" in one.pattern]
    assert set(fact.allowed[0]) == set(_PATHS_TAKEN_FOR_ANOTHER_METHOD)


# ---------------------------------------------------------------- a version that lacks a hook


@each_version
@pytest.mark.parametrize("seam", PROOFS)
def test_without_a_proof_of_the_merge_ppow_is_refused(version, seam):
    seen = attached(version, seam)
    assert seam.replace(":", ".") in seen["refused"]
    assert "install a tested version" in seen["refused"]
    assert len([line for line in seen["logged"] if seam.replace(":", ".") in line]) == 1


@each_version
def test_without_the_hook_of_the_config_vllm_itself_sees_method_ppow(version):
    """It then refuses the name: its Literal of methods does not hold it (test_vllm_seams.py)."""
    seen = attached(version, REWRITE)
    assert len([line for line in seen["logged"] if "create_speculative_config" in line]) == 1
    assert REWRITE not in seen["installed"]


@each_version
@pytest.mark.parametrize("seam", WINDOW)
def test_without_a_hook_of_the_window_serving_goes_on_with_a_fixed_one_and_one_warning(version, seam):
    seen = attached(version, seam)
    assert (seen["refused"], seen["adaptive"]) == ("", False)
    (warning,) = seen["logged"]
    assert warning.startswith("The draft window stays fixed at its maximum: ")
    assert seam.replace(":", ".") in warning
    assert set(seen["installed"]) == set(attached(version)["installed"])


@each_version
def test_a_load_shim_that_is_missing_is_said_and_the_rest_attaches(version):
    """Whether it mattered is proved after loading: tests/e2e/test_in_process.py."""
    seam = name_of(draft_loading.V1_DRAFT_MODEL)
    seen = attached(version, seam)
    assert len([line for line in seen["logged"] if seam.replace(":", ".") in line]) == 1
    assert set(seen["installed"]) >= {REWRITE, *PROOFS, f"{ENGINE_ARGS}.add_cli_args"}


# ---------------------------------------------------------------- what a version is called decides nothing


def decides_by_version(source: str) -> list[str]:
    """Comparisons and conditions that ask for vLLM's version."""
    asked = re.compile(r"__version(_tuple)?__|\bVersion\(|metadata\.version\(|version\.parse")
    nodes = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare | ast.If | ast.IfExp)
    ]
    tests = [node if isinstance(node, ast.Compare) else node.test for node in nodes]
    return [text for text in map(ast.unparse, tests) if asked.search(text)]


def test_nothing_is_decided_by_vllms_version():
    files = [*(ROOT / "vllm_ppow").rglob("*.py")]
    assert {path.name for path in files} >= {"seams.py", "window.py", "worker.py"}
    assert {
        str(path): found for path in files if (found := decides_by_version(path.read_text("utf-8")))
    } == {}


@pytest.mark.parametrize(
    "planted",
    [
        "from vllm.version import __version__\nif __version__ >= '0.33': x = 1",
        "x = 1 if Version(vllm.__version__) < Version('0.27') else 2",
        "x = vllm.__version_tuple__[:2] > (0, 26)",
    ],
)
def test_a_decision_by_version_is_noticed(planted):
    assert decides_by_version(planted)


# ---------------------------------------------------------------- the recordings themselves


def test_a_module_outside_the_recording_is_an_error_not_an_absence(tmp_path):
    version = next(iter(RECORDINGS))
    code = (
        "from recorded_vllm import attach; import sys, pathlib; attach(pathlib.Path(sys.argv[1]))\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('vllm.v1.spec_decode.no_such_module') is None\n"
        "importlib.util.find_spec('vllm.lora')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, RECORDINGS[version]],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert not is_recorded("vllm.lora")
    assert "NotRecordedError: vllm.lora is not recorded: add it to RECORDED" in done.stderr


def test_the_versions_that_the_project_names_are_recorded():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for (line,) in (extras["cpu"], extras["gpu"]):
        wanted = Requirement(line)
        distribution = {v for v in RECORDINGS if recording(v)["distribution"] == wanted.name}
        assert distribution, f"no recording of {wanted.name}"
        assert all(wanted.specifier.contains(version) for version in distribution)
    lowest = [one.version for one in Requirement(extras["gpu"][0]).specifier if one.operator == ">="]
    assert lowest[0] in RECORDINGS


@each_version
def test_a_recording_says_where_it_comes_from(version):
    recorded = recording(version)
    assert (recorded["format"], recorded["version"]) == (FORMAT, version)
    assert recorded["wheel"].startswith(f"{recorded['distribution'].replace('-', '_')}-{version}-")
    assert len(recorded["sha256"]) == 64


@pytest.fixture(scope="module")
def installed():
    """The recording of the installed vLLM's version."""
    import vllm

    version = metadata.version("vllm").partition("+")[0]
    assert version in RECORDINGS, f"vLLM {version} is not recorded: run record_signatures.py on its wheel"
    return recording(version), Path(vllm.__file__).parent


def test_recording_the_installed_vllm_gives_its_recording(installed):
    recorded, package = installed
    again = json.loads(json.dumps(record_installed(package)))
    assert again["facts"] == recorded["facts"]
    # A module that the build writes may differ from the wheel's; what vLLM wrote may not.
    assert again["modules"].keys() == recorded["modules"].keys()
    assert [name for name in again["modules"] if again["modules"][name] != recorded["modules"][name]] == []


def stated(signature: str) -> tuple[str, list[str]]:
    """Kind and parameters of a recorded method."""
    kind, _, parameters = signature.removesuffix(")").partition("(")
    names = [part.partition("=")[0].strip() for part in parameters.split(",")]
    return kind, [name for name in names if name not in ("", "*", "/")]


def shown(own: object) -> tuple[str, list[str]]:
    """The same, asked of the method itself."""
    kind = {staticmethod: "static", classmethod: "class"}.get(type(own), "")
    function = inspect.unwrap(own.__func__ if kind else own)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return kind, [
        stars.get(one.kind, "") + one.name for one in inspect.signature(function).parameters.values()
    ]


def test_a_recording_agrees_with_what_python_says_of_the_imported_code(installed):
    """Parsing against `inspect`, for every module that our hooks touch and that this machine can import."""
    recorded, _ = installed
    version = recorded["version"]
    modules = {name.partition(":")[0] for name in attached(version)["installed"]}
    modules |= {line.split(" overrides ")[1].rsplit(".", 2)[0] for line in attached(version)["overrides"]}
    compared = 0
    for module in sorted(modules):
        loaded = importlib.import_module(module)
        for name, record in recorded["modules"][module]["classes"].items():
            for method, signature in record.get("methods", {}).items():
                own = vars(getattr(loaded, name)).get(method)
                if own is not None and not signature.startswith("property"):
                    assert stated(signature) == shown(own), f"{module}.{name}.{method}"
                    compared += 1
    assert compared > 50
