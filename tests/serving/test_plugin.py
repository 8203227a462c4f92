"""The plugin's hooks in this process's vLLM: re-entrant, seen by the parser, and every route in is rewritten."""

from __future__ import annotations

import subprocess
import sys

import pytest
from serving_pair import K, random_adapter

from vllm_ppow import plugin
from vllm_ppow.artifact import ArtifactError
from vllm_ppow.compat import engine_args, seams, worker


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("plugin"), "causal_lm", pair)


@pytest.fixture(scope="module")
def parser():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def engine_config(parser, *argv):
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs.from_cli_args(parser.parse_args(list(argv)))
    return args, args.create_engine_config()


def test_register_twice_wraps_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    first, hooks = EngineArgs.create_speculative_config, seams.installed()
    plugin.register()
    assert EngineArgs.create_speculative_config is first
    assert seams.installed() == hooks
    assert first.__wrapped__.__module__ == "vllm.engine.arg_utils"


def test_a_fresh_process_finds_the_entry_point_and_stays_light():
    code = (
        "import sys, vllm.plugins as p; p.load_general_plugins();"
        "from vllm_ppow.compat import seams; assert len(seams.installed()) == 5, seams.installed();"
        "assert 'vllm_ppow.loader' not in sys.modules; assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("form", ["json", "flags", "flags and json"])
def test_command_line_forms(parser, pair, adapter, form):
    spec = f'{{"method": "ppow", "model": "{adapter.directory}", "num_speculative_tokens": 2}}'
    flags = ["--spec-method", "ppow", "--spec-model", str(adapter.directory), "--spec-tokens", "2"]
    argv = {
        "json": ["--speculative-config", spec],
        "flags": flags,
        "flags and json": ["--speculative-config", '{"ppow": {"allow_target_mismatch": false}}', *flags],
    }[form]
    args, config = engine_config(parser, "--model", str(pair.target), "--max-model-len", "64", *argv)
    speculative = config.speculative_config
    assert (speculative.method, speculative.num_speculative_tokens) == ("draft_model", 2)
    assert speculative.model == str(pair.causal_lm)
    assert engine_args.serves_ppow(speculative)
    again = args.create_engine_config().speculative_config  # vLLM may build its config more than once
    assert again.draft_load_config == speculative.draft_load_config


def test_flags_default_to_the_adapters_k(parser, pair, adapter):
    flags = ["--spec-method", "ppow", "--spec-model", str(adapter.directory)]
    _, config = engine_config(parser, "--model", str(pair.target), "--max-model-len", "64", *flags)
    assert config.speculative_config.num_speculative_tokens == K


def test_a_key_given_both_ways_is_refused(parser, pair, adapter):
    argv = [
        "--spec-method",
        "ppow",
        "--speculative-config",
        f'{{"method": "ppow", "model": "{adapter.directory}"}}',
    ]
    with pytest.raises(ValueError, match="mutually exclusive"):
        engine_config(parser, "--model", str(pair.target), *argv)


def test_other_methods_are_untouched(parser, pair):
    spec = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    _, config = engine_config(
        parser, "--model", str(pair.target), "--max-model-len", "64", "--speculative-config", spec
    )
    assert config.speculative_config.method == "ngram"
    assert not engine_args.serves_ppow(config.speculative_config)
    _, config = engine_config(parser, "--model", str(pair.target), "--max-model-len", "64")
    assert config.speculative_config is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            '{"method": "ppow", "model": "ADAPTER", "typo": 1}',
            r"keys \['typo'\] that this vLLM does not know",
        ),
        (
            '{"method": "ppow", "model": "ADAPTER", "ppow": {"typo": 1}}',
            r'"ppow" has unknown keys \[.typo.\]: known are',
        ),
        ('{"method": "eagle3", "model": "ADAPTER", "ppow": {}}', 'needs "method": "ppow"'),
    ],
)
def test_refusals_reach_the_user_as_they_are(parser, pair, adapter, spec, message):
    spec = spec.replace("ADAPTER", str(adapter.directory))
    with pytest.raises(ArtifactError, match=message):
        engine_config(parser, "--model", str(pair.target), "--speculative-config", spec)


def test_serving_a_drafter_as_the_target_is_refused(parser, pair, adapter):
    """vLLM would serve the head's own target with the bare head, silently."""
    spec = f'{{"method": "ppow", "model": "{adapter.directory}"}}'
    with pytest.raises(ArtifactError, match=r"dropped method ppow .* is a drafter itself"):
        engine_config(
            parser, "--model", str(pair.eagle3), "--max-model-len", "64", "--speculative-config", spec
        )


def test_a_method_that_vllm_changes_is_refused(parser, pair, adapter, monkeypatch):
    from vllm.config import SpeculativeConfig

    original = SpeculativeConfig.__post_init__

    def change(self):
        original(self)
        self.method = "mtp"

    monkeypatch.setattr(SpeculativeConfig, "__post_init__", change)
    spec = f'{{"method": "ppow", "model": "{adapter.directory}"}}'
    with pytest.raises(ArtifactError, match=r"turned method 'draft_model' .* into 'mtp'"):
        engine_config(
            parser, "--model", str(pair.target), "--max-model-len", "64", "--speculative-config", spec
        )


# ---------------------------------------------------------------- missing seams


class Unhooked:
    """A class of "vLLM" that lacks what we need."""

    def changed(self, other):
        """Has other parameters than expected."""


@pytest.mark.parametrize(
    ("module", "owner", "method"),
    [
        ("vllm.no_such_module", "X", "y"),
        (__name__, "NoSuchClass", "y"),
        (__name__, "Unhooked", "y"),
        (__name__, "Unhooked", "changed"),
        (__name__, "Unhooked", "__eq__"),  # inherited is not its own
    ],
)
def test_a_missing_seam_says_what_to_install(module, owner, method):
    with pytest.raises(
        seams.SeamMissingError, match=rf"has no {module}.{owner}.{method} .* pip install '\.\[cpu\]'"
    ):
        seams.wrap(module, owner, method, ("self", "expected"), lambda original: original)
    assert (module, owner, method) not in seams.installed()


def test_a_vllm_without_worker_hooks_refuses_ppow_and_serves_the_rest(parser, pair, adapter, monkeypatch):
    def missing():
        raise seams.SeamMissingError("This vLLM has no hook: install a tested version.")

    monkeypatch.setattr(worker, "install", missing)
    plugin.register()
    engine_config(parser, "--model", str(pair.target), "--max-model-len", "64")
    spec = f'{{"method": "ppow", "model": "{adapter.directory}"}}'
    with pytest.raises(seams.SeamMissingError, match="install a tested version"):
        engine_config(parser, "--model", str(pair.target), "--speculative-config", spec)
