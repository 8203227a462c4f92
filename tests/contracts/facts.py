"""What our hooks rely on inside vLLM's methods, beyond signatures: which calls they make, and in which order.

Each fact is a pattern searched in the source of one class or method; record_signatures.py stores what it finds in a
wheel, and the tests compare that with what is expected here. Left out: anything that can be asked of a signature.
"""

from __future__ import annotations

import ast
import dataclasses
import re

MISSING = "missing"  # the class or method does not exist in this vLLM


@dataclasses.dataclass(frozen=True)
class Fact:
    """A pattern in vLLM's source, and what it must find.

    Attributes:
        why: what goes wrong when it does not hold.
        module: the module.
        where: class or "class.method" in it; "" for the whole module.
        pattern: regular expression.
        allowed: what `find` may return in a vLLM that we support.
    """

    why: str
    module: str
    where: str
    pattern: str
    allowed: tuple[tuple[str, ...] | str, ...]

    @property
    def key(self) -> str:
        """Under which a recording holds it."""
        return f"{self.module}:{self.where} {self.pattern}"

    def find(self, source: str | None) -> tuple[str, ...] | str:
        """All matches in order, given the module's source (None: no such module); MISSING without the place."""
        text = None if source is None else _source_of(source, self.where)
        return MISSING if text is None else tuple(re.findall(self.pattern, text))


def _source_of(source: str, where: str) -> str | None:
    node: ast.AST = ast.parse(source)
    for name in where.split(".") if where else []:
        found = [
            one
            for one in ast.iter_child_nodes(node)
            if isinstance(one, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and one.name == name
        ]
        if not found:
            return None
        node = found[-1]
    return ast.unparse(node)  # without comments; strings in single quotes


_ARGS = "vllm.engine.arg_utils"
_V1, _V2 = "vllm.v1.spec_decode", "vllm.v1.worker.gpu.spec_decode"

FACTS = (
    Fact(
        "the speculative config is built in one place, which is wrapped (compat/engine_args.py)",
        _ARGS,
        "",
        r"SpeculativeConfig\(\*\*|self\.create_speculative_config\(",
        (("SpeculativeConfig(**", "self.create_speculative_config("),),
    ),
    Fact(
        "plugins are loaded before the parser is built (compat/engine_args.py)",
        _ARGS,
        "AsyncEngineArgs.add_cli_args",
        r"load_general_plugins\(\)|EngineArgs\.add_cli_args\(",
        (("load_general_plugins()", "EngineArgs.add_cli_args("),),
    ),
    Fact(
        "plugins are loaded before an engine's config is built (plugin.py)",
        _ARGS,
        "EngineArgs.__post_init__",
        r"load_general_plugins\(\)",
        (("load_general_plugins()",),),
    ),
    Fact(
        "vLLM takes these paths of a draft_model for another method; config.py refuses them",
        "vllm.config.speculative",
        "SpeculativeConfig.__post_init__",
        r"'([\w-]+)' in self\.draft_model_config\.model\.lower\(\)",
        (("eagle-", "eagle3", "dflash", "dspark"),),
    ),
    Fact(
        "the parameter that v2_runner.draws_independently asks for moves the draft's noise (the V2 runner, 0.31)",
        "vllm.v1.worker.gpu.sample.gumbel",
        "",
        r"if IS_DRAFTING|pos = pos \+ _DRAFT_NOISE_SALT",
        ((), ("if IS_DRAFTING", "pos = pos + _DRAFT_NOISE_SALT")),
    ),
    Fact(
        "vLLM gives up full graphs for draft lengths that change on the V1 runner alone (compat/engine_choice.py)",
        "vllm.config.vllm",
        "VllmConfig._maybe_override_dynamic_sd_cudagraph_mode",
        r"or self\.use_v2_model_runner|cudagraph_mode = CUDAGraphMode\.PIECEWISE",
        (("or self.use_v2_model_runner", "cudagraph_mode = CUDAGraphMode.PIECEWISE"),),
    ),
    Fact(
        "in process, the worker's device is initialised before its models are loaded (compat/worker.py)",
        "vllm.v1.executor.uniproc_executor",
        "UniProcExecutor",
        r"WorkerWrapperBase\(|\.init_device\(\)|\.load_model\(\)",
        (("WorkerWrapperBase(", ".init_device()", ".load_model()"),),
    ),
    Fact(
        "in processes of their own, workers do the same (compat/worker.py)",
        "vllm.v1.executor.multiproc_executor",
        "WorkerProc",
        r"WorkerWrapperBase\(|\.init_device\(\)|\.load_model\(\)",
        (("WorkerWrapperBase(", ".init_device()", ".load_model()"),),
    ),
    Fact(
        "the KV cache is initialised through every worker, where the merge is proved (compat/worker.py)",
        "vllm.v1.executor.abstract",
        "Executor.initialize_from_config",
        r"collective_rpc\('initialize_from_config'",
        (("collective_rpc('initialize_from_config'",),),
    ),
    Fact(
        "V1 draft_model loads with the config it creates (compat/draft_loading.py)",
        f"{_V1}.draft_model",
        "DraftModelProposer._get_model",
        r"self\._create_draft_vllm_config\(\)|\bget_model\(",
        (("self._create_draft_vllm_config()", "get_model("),),
    ),
    Fact(
        "V1 draft_model ignores draft_load_config; when it no longer does, the shim can go (compat/draft_loading.py)",
        f"{_V1}.draft_model",
        "DraftModelProposer",
        r"\w*load_config",
        ((),),
    ),
    Fact(
        "V1 eagle3 honours draft_load_config, so that it needs no shim (compat/draft_loading.py)",
        f"{_V1}.llm_base_proposer",
        "SpecDecodeBaseProposer._get_model",
        r"load_config=(self\.speculative_config\.draft_load_config|get_draft_load_config\(draft_vllm_config\))",
        (("self.speculative_config.draft_load_config",), ("get_draft_load_config(draft_vllm_config)",)),
    ),
    Fact(
        "what V1 and V2 call for an EAGLE drafter honours draft_load_config (compat/draft_loading.py)",
        "vllm.model_executor.model_loader.utils",
        "get_draft_load_config",
        r"speculative_config\.draft_load_config",
        (("speculative_config.draft_load_config",), ("speculative_config.draft_load_config",) * 2, MISSING),
    ),
    Fact(
        "V2 draft_model loads with self.vllm_config (compat/draft_loading.py)",
        f"{_V2}.standalone_ar.speculator",
        "StandaloneARSpeculator.load_draft_model",
        r"replace\(self\.vllm_config, model_config|vllm_config=draft_vllm_config",
        (("replace(self.vllm_config, model_config", "vllm_config=draft_vllm_config"), MISSING),
    ),
    Fact(
        "V2 draft_model of 0.31 loads with self.vllm_config (compat/draft_loading.py)",
        f"{_V2}.draft_model.speculator",
        "PlainDraftModelSpeculator.load_draft_model",
        r"replace\(self\.vllm_config, model_config|vllm_config=draft_vllm_config",
        (("replace(self.vllm_config, model_config", "vllm_config=draft_vllm_config"), MISSING),
    ),
    Fact(
        "V2 eagle3 loads with self.vllm_config (compat/draft_loading.py)",
        f"{_V2}.eagle.speculator",
        "EagleSpeculator.load_draft_model",
        r"self\.vllm_config\b",
        (("self.vllm_config",),),
    ),
    Fact(
        "the default loader streams what get_all_weights gives (loader.py)",
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader.load_weights",
        r"self\.get_all_weights\(",
        (("self.get_all_weights(",),),
    ),
    Fact(
        "what V1 samples drafts from is the model's compute_logits (finite_logits.py)",
        f"{_V1}.llm_base_proposer",
        "SpecDecodeBaseProposer._sample_draft_tokens",
        r"self\.model\.\w*logits\(|lm_head\w*\(",
        (("self.model.compute_logits(",),),
    ),
    Fact(
        "what V2 samples drafts from is the model's compute_logits (finite_logits.py)",
        f"{_V2}.speculator",
        "DraftModelSpeculator",
        r"self\.model\.\w*logits\(|lm_head\w*\(",
        (("self.model.compute_logits(",), ("self.model.compute_logits(",) * 2),
    ),
)
