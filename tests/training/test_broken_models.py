"""Model directories that are broken, given to commands: one sentence with the remedy, exit 1, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_pair import KINDS, TAP_LAYERS, VOCAB

from ppow_train import cli
from ppow_train.drafters import check_drafter, load_drafter
from ppow_train.errors import UserError
from ppow_train.generation import end_tokens, load_tokenizer
from ppow_train.loading import load_causal_lm

Break = Callable[[Path], None]
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


def content(name: str, text: str | bytes) -> Break:
    """A file of the directory that holds this."""
    return lambda path: (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def config(**values: Any) -> Break:
    """A config.json that says something else."""

    def change(path: Path) -> None:
        own = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**own, **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Weights that are others."""

    def write(path: Path) -> None:
        loaded = load_file(path / "model.safetensors")
        change(loaded)
        save_file(loaded, path / "model.safetensors", metadata={"format": "pt"})

    return write


def header(metadata: Any = None, **changes: Any) -> Break:
    """A header in which one tensor is described otherwise, or the metadata are others."""

    def write(path: Path) -> None:
        file = path / "model.safetensors"
        whole = file.read_bytes()
        size = 8 + int.from_bytes(whole[:8], "little")
        described = json.loads(whole[8:size])
        name = next(name for name in described if name != "__metadata__")
        described |= {"__metadata__": metadata or {"format": "pt"}}
        described[name] |= changes
        text = json.dumps(described).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[size:])

    return write


def shortened(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lengthened(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(64))


UNREADABLE = "is not a readable safetensors file: copy or download it again."
# What is broken in a causal LM, and what every command that loads it says.
BROKEN: dict[str, tuple[Break, str]] = {
    "config cut off": (content("config.json", "{"), "config.json is not readable"),
    "config that is no object": (content("config.json", "[]"), "config.json must hold a JSON object"),
    "config of no text": (content("config.json", b"\xff"), "config.json is not readable"),
    "a size that is text": (config(hidden_size="64"), "(Validation error for field 'hidden_size': TypeError: "),
    "no heads": (config(num_attention_heads=0, num_key_value_heads=0), "ZeroDivisionError: "),
    "layers that are none": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "a negative vocabulary": (config(vocab_size=-5), "RuntimeError: Trying to create tensor with negative"),
    "other sizes": (config(intermediate_size=97), "down_proj.weight [64, 96] instead of [64, 97], "),
    "tensors that are missing": (config(attention_bias=True), "it has no model.layers.0.self_attn.k_proj.bias, "),
    "another shape": (tensors(lambda t: t.update({Q: torch.zeros(3)})), f"it has {Q} [3] instead of [64, 64]: "),
    "a tensor less": (tensors(lambda t: t.pop(Q)), f"it has no {Q}: copy the model again, or give another."),
    "weights that are no numbers": (
        tensors(lambda t: t[Q][3].fill_(torch.nan)),
        f"broken has weights that are no numbers in {Q}: copy it again, or give another.",
    ),
    "weights whose sums are no numbers": (
        tensors(lambda t: t[DOWN].fill_(3e38)),
        "computes logits that are no numbers, in float32",
    ),
    "weights cut off": (shortened, "model.safetensors is truncated: copy or download it again."),
    "weights with more at the end": (lengthened, UNREADABLE),
    "a tensor of another size": (header(dtype="F64"), UNREADABLE),
    "a tensor in another's place": (header(data_offsets=[8, 16]), UNREADABLE),
    "offsets that are fractions": (header(data_offsets=[0.5, 4.5]), UNREADABLE),
    "metadata that are no texts": (header(metadata={"format": 5}), UNREADABLE),
    "a dtype that nobody knows": (header(dtype="F0"), "unknown variant `F0`"),
    "an index that is no object": (content("model.safetensors.index.json", "[]"), "must map tensors to files"),
    "an index of numbers": (
        content("model.safetensors.index.json", '{"weight_map": {"a": {}}}'),
        "must map tensors to files in weight_map: copy the model again.",
    ),
    "generation options cut off": (content("generation_config.json", "{"), "is not readable JSON"),
}  # fmt: skip


def broken(source: Path, tmp_path: Path, change: Break) -> Path:
    copied = shutil.copytree(source, tmp_path / "broken")
    change(copied)
    return copied


def refusal(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> str:
    """What a command says that must fail in one sentence, its last line."""
    for name, text in (("prompts", "windows of draft"), ("held_out", "tokens")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": text}))
    capsys.readouterr()
    call = [*command, "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.run([*call, "--device", "cpu", "--max-new-tokens", "8"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert told[-1].startswith("Error: ")
    assert not any("Error" in line or "REPORT" in line for line in told[:-1])
    return told[-1]


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("command", ["train", "data"])
def test_a_broken_target(command, what, directories, tmp_path, capsys):
    change, says = BROKEN[what]
    call = [command, "--target", str(broken(directories.target, tmp_path, change))]
    if command == "train":
        call += ["--drafter", str(directories.drafter["causal_lm"])]
    assert says in refusal(call, tmp_path, capsys)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_drafter(what, directories, tmp_path, capsys):
    change, says = BROKEN[what]
    drafter = broken(directories.drafter["causal_lm"], tmp_path, change)
    call = ["train", "--target", str(directories.target), "--drafter", str(drafter)]
    assert says in refusal(call, tmp_path, capsys)


def test_compare_says_the_same(directories, tmp_path, capsys):
    drafter = broken(directories.drafter["causal_lm"], tmp_path, config(intermediate_size=97))
    call = ["compare", "--target", str(directories.target), "--drafter", str(drafter)]
    told = refusal([*call, "--held-out", str(tmp_path / "held_out.jsonl")], tmp_path, capsys)
    assert "does not fit its own config.json" in told


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("eagle3", config(architectures=5, speculators_model_type=None), "neither a causal LM nor"),
        ("eagle3", config(transformer_layer_config="x"), "holds no EAGLE-3 head that speculators "),
        ("eagle3", config(draft_vocab_size="x"), "holds no EAGLE-3 head that speculators "),
        ("eagle3", config(eagle_aux_hidden_state_layer_ids="x"), "holds no EAGLE-3 head that speculators "),
        ("eagle3", header(dtype="F0"), "holds no EAGLE-3 head that safetensors "),
        ("eagle3", shortened, "is truncated: copy or download it again."),
        (
            "eagle3",
            tensors(lambda t: t["fc.weight"].fill_(torch.inf)),
            "weights that are no numbers in fc.weight",
        ),
        ("original", config(hidden_size="x"), "holds no EAGLE-3 head that speculators "),
        ("original", config(num_attention_heads=0), "ZeroDivisionError: "),
        ("original", config(vocab_size=-5), "RuntimeError: "),
        ("original", config(hidden_act="none"), "KeyError: 'none'"),
        ("original", config(eagle_config="x"), "eagle_config x: only Llama layers"),
        ("original", config(intermediate_size=10**13), "does not fit its own config.json"),
    ],
)
def test_a_broken_head(kind, change, says, directories, tmp_path, capsys):
    """Also one whose config.json gives sizes that no memory would hold."""
    head = broken(directories.drafter[kind], tmp_path, change)
    call = ["train", "--target", str(directories.target), "--drafter", str(head)]
    assert says in refusal(call, tmp_path, capsys)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size"])
def test_a_target_that_does_not_tell_a_head_its_sizes(name, directories, tmp_path):
    head = broken(directories.drafter["original"], tmp_path, config(eagle_aux_hidden_state_layer_ids=None))
    target = shutil.copytree(directories.target, tmp_path / "target")
    config(**{name: None})(target)
    with pytest.raises(
        UserError, match=rf"config.json gives None as {name}, which an EAGLE-3 head must know"
    ):
        load_drafter(head, target=target)


def test_a_head_whose_target_is_broken(directories, tmp_path):
    """It has no embeddings of its own, and takes the target's."""
    target = broken(directories.target, tmp_path, header(dtype="F0"))
    with pytest.raises(UserError, match="holds no model that safetensors"):
        load_drafter(directories.drafter["original"], target=target)


def test_end_tokens_that_are_none(directories, tmp_path):
    target = broken(directories.target, tmp_path, content("generation_config.json", '{"eos_token_id": "x"}'))
    with pytest.raises(UserError, match=r"'x' as its end tokens, .* mend eos_token_id"):
        end_tokens(target, load_tokenizer(target))


def test_tensors_that_are_not_read_are_told(directories, tmp_path, caplog):
    """As of heads for other tasks, which a target may bring along; in a line instead of a table."""
    target = broken(directories.target, tmp_path, tensors(lambda t: t.update(more=torch.zeros(2))))
    model = load_causal_lm(target, torch.float32, "cpu")
    assert model.get_output_embeddings().weight.shape[0] == VOCAB
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == f"{target} has tensors that its model does not, which are not read: more."


def test_what_is_whole_is_loaded(directories):
    for kind, directory in directories.drafter.items():
        drafter = load_drafter(directory, target=directories.target)
        assert drafter.tap_layers == (() if kind == "causal_lm" else TAP_LAYERS)
        assert not any(parameter.is_meta for parameter in drafter.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_headers_are_enough_to_tell_what_does_not_fit(kind, directories, tmp_path):
    """In the words of loading; weights that are no numbers, which no header tells, are not read."""
    sizes = json.loads((directories.drafter[kind] / "config.json").read_text())
    sizes.get("transformer_layer_config", sizes)["intermediate_size"] = 97
    name = "fc.weight" if kind != "causal_lm" else Q
    head = broken(directories.drafter[kind], tmp_path, tensors(lambda t: t[name].fill_(torch.nan)))
    check_drafter(head, directories.target)
    with pytest.raises(UserError, match=f"no numbers in {name}"):
        load_drafter(head, target=directories.target)
    (head / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(UserError) as told:
        check_drafter(head, directories.target)
    assert "does not fit its own config.json" in str(told.value)
    with pytest.raises(UserError) as loaded:
        load_drafter(head, target=directories.target)
    assert str(loaded.value) == str(told.value)
