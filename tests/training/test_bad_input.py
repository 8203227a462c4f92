"""What users get wrong in training, and the sentence they get: the constraint, their value, the remedy."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_pair import KINDS, VOCAB, K, load, qwen3

from ppow_train.config import PPOWConfig
from ppow_train.data import (
    collate,
    keep_long_enough,
    load_trajectories,
    read_prompts,
    save_trajectories,
)
from ppow_train.drafters import detect_drafter_type, load_drafter
from ppow_train.errors import UserError
from ppow_train.generation import generate, load_tokenizer
from ppow_train.pair import load_pair
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.trainer import PPOWTrainer
from ppow_train.training import check_trainable
from ppow_train.types import Trajectories


def refused(*parts: str) -> Any:
    """The block raises a UserError of one sentence that holds every part."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(UserError, match=rf"(?s)^{pattern}[^\n]*\.?$")


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty", "at least one line"]),
        ("\n  \n", ["is empty"]),
        ('{"prompt": "a"}\n{"prompt": \n', ["line 2", "JSON object"]),
        ('{"prompt": "a"}\n\n["prompt"]\n', ["line 3", "JSON object"]),
        ('{"text": "a"}\n', ["line 1", "text"]),
        ('"prompt"\n', ["line 1", "JSON object"]),
        ('{"prompt": 3}\n', ["line 1", "non-empty text", "got 3"]),
        ('{"messages": []}\n', ["line 1", "non-empty text", "messages"]),
        ('{"prompt": "a", "messages": [CHAT]}\n', ["line 1", "got both"]),
        ('{"prompt": ""}\n', ["line 1", "non-empty text"]),
        ('{"prompt": "a", "chat_template_kwargs": "abc"}\n', ["line 1", "must be an object", "got 'abc'"]),
        (
            '{"messages": [CHAT], "chat_template_kwargs": [1]}\n',
            ["line 1", "must be an object", r"got \[1\]"],
        ),
        (
            '{"messages": [CHAT], "chat_template_kwargs": {"tokenize": true}}\n',
            ["line 1", "without .*tokenize"],
        ),
        ('{"messages": [CHAT], "chat_template_kwargs": {"chat_template": ""}}\n', ["without chat_template"]),
        (
            '{"messages": [CHAT], "chat_template_kwargs": {"tools": 5}}\n',
            ["line 1", "tools must be a list", "got 5"],
        ),
        (
            '{"messages": [CHAT]}\n{"messages": [CHAT], "tools": [1]}\n',
            ["line 2", "list of objects", r"got \[1\]"],
        ),
        (
            '{"messages": [CHAT], "tools": "abc"}\n',
            ["line 1", "tools must be a list of objects", "got 'abc'"],
        ),
        ('{"prompt": "a", "tools": 5}\n', ["line 1", "tools must be a list of objects", "got 5"]),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": 5}]}\n',
            ["line 1", "tool_calls", "got 5"],
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": ["b"]}]}\n',
            ["tool_calls must be a list"],
        ),
        (
            '{"messages": [CHAT, {"role": "user"}]}\n',
            ["line 1", "role and, unless it has tool_calls, a content"],
        ),
        ('{"messages": [{"role": "user", "content": null, "tool_calls": []}]}\n', ["line 1", "a content"]),
    ],
)
def test_prompts(content, parts, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content.replace("CHAT", '{"role": "user", "content": "b"}'), encoding="utf-8")
    with refused("prompts.jsonl", *parts):
        read_prompts(path, None)


def test_prompts_that_cannot_be_read(tmp_path):
    with refused("cannot be read", "UTF-8"):
        read_prompts(tmp_path / "absent.jsonl", None)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ä"}'.encode("latin-1"))
    with refused("cannot be read", "UTF-8"):
        read_prompts(tmp_path / "latin.jsonl", None)


def test_prompts_may_hold_any_sign(tmp_path):
    texts = ["a\nb", "line\u2028separator", "next\u0085line", "form\x0cfeed", "ünï"]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "file": "x"}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(lines).encode())
    assert read_prompts(path, None) == texts


# ---------------------------------------------------------------- trajectories


def test_trajectories_too_short_for_a_window():
    long = collate([[1, 2], [1]], [[3] * (K + 1), [3] * K])
    kept = keep_long_enough(long, K)
    assert kept.lengths.tolist() == [K + 3]
    with refused(f"window of {K + 2} tokens", "--max-new-tokens", "--num-speculative-tokens"):
        keep_long_enough(long, K + 2)


def test_a_continuation_longer_than_the_target_takes(directories):
    pair = load(directories, "causal_lm")
    with refused("128", "--max-new-tokens"):
        generate(
            pair.target.model,
            load_tokenizer(directories.target),
            ["windows"],
            max_new_tokens=128,
            temperature=1.0,
            seed=0,
        )


def test_trajectories_come_back_from_disk_as_they_were(tmp_path):
    prompts, continuations = [[1, 2, 3], [4]], [[5], [6, 7, 8]]
    save_trajectories(tmp_path / "set", prompts, continuations, {"a": 1})
    save_trajectories(
        tmp_path / "set", prompts, continuations, {"a": 2}
    )  # the first may be being read: it stays
    loaded, wanted = load_trajectories(tmp_path / "set"), collate(prompts, continuations)
    assert loaded.input_ids.equal(wanted.input_ids)
    assert loaded.input_ids.tolist() == [[1, 2, 3, 5], [4, 6, 7, 8]]
    assert loaded.prompt_lengths.tolist() == [3, 1]
    assert json.loads((tmp_path / "set" / "facts.json").read_text())["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# ---------------------------------------------------------------- layers to adapt


@pytest.mark.parametrize("kind", KINDS)
def test_lora_targets_that_the_drafter_lacks(kind, directories, trajectories, tmp_path):
    """Also one of several: PEFT itself would pass over it."""
    pair = load(directories, kind)
    config = PPOWConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_speculative_tokens=K,
        max_steps=1,
        lora_targets=["q_proj", "kv_proj"],
    )
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, 1.0)
    with refused("lora_targets", "o_proj", "got 'kv_proj'"):
        PPOWTrainer(runner, config, load_tokenizer(directories.target))


def test_a_causal_lms_head_is_not_adapted_nor_offered(directories, tmp_path):
    """It is mostly its embeddings."""
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, lora_targets=["q_proj", "lm_head"])
    with pytest.raises(UserError) as caught:
        check_trainable(pair, config)
    offered, _, got = str(caught.value).partition("), got ")
    assert got == "'lm_head'."
    assert "lm_head" not in offered
    assert "o_proj" in offered


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal_lm"])
def test_an_eagle_heads_own_is_offered(kind, directories, tmp_path):
    pair = load_pair(str(directories.target), str(directories.drafter[kind]))
    for targets in (["lm_head"], ["q_proj", "lm_head"]):
        check_trainable(pair, PPOWConfig(output_dir=str(tmp_path), use_cpu=True, lora_targets=targets))
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, lora_targets=["verifier_lm_head"])
    with refused("lora_targets", "lm_head", "got 'verifier_lm_head'"):
        check_trainable(pair, config)


# ---------------------------------------------------------------- models


def test_a_drafter_with_another_vocabulary(directories, tmp_path):
    from transformers import Qwen3ForCausalLM

    Qwen3ForCausalLM(qwen3(1, vocab_size=VOCAB + 8)).save_pretrained(tmp_path)
    with refused(f"{VOCAB + 8} tokens", f"has {VOCAB}", "one tokenizer"):
        load_pair(str(directories.target), str(tmp_path))


def copied_head(directories, tmp_path, change):
    out = tmp_path / "head"
    shutil.copytree(directories.drafter["eagle3"], out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda tensors: tensors.pop("fc.weight"), ["lacks the tensors", "fc.weight", "copy the head again"]),
        (
            lambda tensors: tensors.update(midlayer=torch.zeros(2)),
            ["has the tensors", "midlayer", "check the key names"],
        ),
        (
            lambda tensors: tensors.update({"fc.weight": torch.zeros(2, 2)}),
            ["does not fit its own config.json"],
        ),
    ],
)
def test_a_head_with_other_tensors(change, parts, directories, tmp_path):
    directory = copied_head(directories, tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_drafter(directory)
    assert all(part in str(caught.value) for part in parts)


def edit_config(directory: Any, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def test_a_head_that_does_not_say_what_it_reads(directories, tmp_path):
    directory = copied_head(directories, tmp_path, lambda tensors: None)
    edit_config(directory, eagle_aux_hidden_state_layer_ids=None)
    with refused("which target layers", "eagle_aux_hidden_state_layer_ids"):
        load_drafter(directory)


@pytest.mark.parametrize("taps", [(2, 4, 9), (2, 4, 8), (-1, 2, 4)])
def test_a_head_that_reads_layers_beyond_the_target(taps, directories):
    """Layer 8 of 8 too: what transformers returns there has passed the final norm, what vLLM serves has not."""
    with refused(str(taps[2]), "below the 8", "made for"):
        Target(directories.target, taps)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (None, ["config.json is not readable", "drafter's own directory"]),
        ("{", ["config.json is not readable"]),
        (
            '{"architectures": ["LlamaModel"]}',
            ["neither a causal LM nor an EAGLE-3 head", "LlamaModel", "convert"],
        ),
        ("{}", ["neither a causal LM"]),
        (
            '{"architectures": ["GPT2LMHeadModel"]}',
            ["GPT2LMHeadModel", "that is not trained", "ForCausalLM"],
        ),
    ],
)
def test_directories_that_hold_no_drafter(config, parts, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with refused(*parts):
        detect_drafter_type(tmp_path)


# ---------------------------------------------------------------- attention that windows cannot share


def test_layers_without_attention(directories, tmp_path):
    pair = load(directories, "causal_lm")
    pair.target.model.config.layer_types = ["linear_attention", "full_attention"] * 4
    with refused("linear_attention", "attention in every layer"):
        check_trainable(
            pair, PPOWConfig(output_dir=str(tmp_path), use_cpu=True)
        )  # before anything is generated
    with refused("linear_attention", "attention in every layer"):
        pair.target.encode(
            Trajectories(torch.ones(1, 8, dtype=torch.long), torch.tensor([1]), torch.tensor([8]))
        )
