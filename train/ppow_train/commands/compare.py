"""`ppow compare`: several objectives trained alike, counted by vLLM alike. Left out: training and measuring.

    DIR/compare.json    what all adapters and results depend on; a comparison with other facts is refused
    DIR/results.jsonl   one line per (objective, seed): an interrupted comparison goes on where it stopped

Objectives, seeds and temperatures may be added later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.options import SEED, ObjectiveName, device_option, parse_rates
from ppow_train.ranges import MOST_UPDATES

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig
    from ppow_train.serving_eval import EngineOptions
    from vllm_ppow.artifact import Adapter

OBJECTIVES = ("ppow", "exact", "overlap", "cst:tv", "cst:kl")
BASE = "base drafter"
FACTS = "compare.json"


@click.command()
@click.option("--target", required=True, help="directory or Hub repo id of the target")
@click.option("--drafter", required=True, help="directory or Hub repo id of the drafter")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help="JSONL of training prompts")
@click.option(
    "--held-out", required=True, type=click.Path(path_type=Path), help="JSONL of prompts to serve and count"
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="directory for adapters and results"
)
@click.option(
    "--objective", "objectives", type=ObjectiveName(), multiple=True, default=OBJECTIVES, show_default=True,
    help="to train with; may be given several times",
)  # fmt: skip
@click.option(
    "--learning-rate",
    "rates",
    multiple=True,
    callback=parse_rates,
    metavar="OBJECTIVE=RATE",
    help="instead of the default, for one",
)
@click.option(
    "--seed", "seeds", multiple=True, type=SEED, default=(0, 1, 2), show_default=True,
    help="one adapter each per objective; may be given several times",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(1, MOST_UPDATES), default=100, show_default=True,
    help="updates, the same for every objective",
)  # fmt: skip
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True,
    help="tokens of each trajectory at most",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(2), default=64, show_default=True,
    help="output tokens per served prompt; the first of them is never drafted",
)  # fmt: skip
@click.option(
    "--serving-temperature", type=click.FloatRange(0), default=1.0, show_default=True,
    help="temperature that is trained for",
)  # fmt: skip
@click.option(
    "--temperature", "temperatures", multiple=True, type=click.FloatRange(0), default=(1.0, 0.0), show_default=True,
    help="to serve and count at; may be given several times",
)  # fmt: skip
@device_option("of training: ")
def compare(
    target: str,
    drafter: str,
    prompts: Path,
    held_out: Path,
    output: Path,
    objectives: Sequence[str],
    rates: dict[str, float],
    seeds: Sequence[int],
    steps: int,
    max_new_tokens: int,
    max_tokens: int,
    serving_temperature: float,
    temperatures: Sequence[float],
    device: str | None,
) -> None:
    """Train one adapter per objective and seed at equal windows and count accepted tokens per draft in vLLM."""
    from ppow_train.preflight import check_writable

    check_writable(output)
    from ppow_train.machine import choose_device
    from ppow_train.prompts import check_apart
    from ppow_train.trajectory_store import only_writer

    names = list(dict.fromkeys(objectives))
    check_apart(prompts, held_out)
    where = choose_device(device)
    trainer = _Trainer(
        target,
        drafter,
        prompts,
        output,
        steps,
        max_new_tokens,
        serving_temperature,
        rates,
        where,
    )
    trainer.check(names, seeds)
    facts = {**trainer.facts(), "held_out": _digest(held_out), "max_tokens": max_tokens, **_versions()}
    with only_writer(output):
        _begin(output, facts)
        results = _Results(output / "results.jsonl")
        _finish(results, trainer, names, seeds, temperatures, held_out, max_tokens)
        table = results.table([BASE, *names], seeds, temperatures)
        (output / "table.md").write_text(table, encoding="utf-8")
    click.echo(table)


def _finish(
    results: _Results,
    trainer: _Trainer,
    names: Sequence[str],
    seeds: Sequence[int],
    temperatures: Sequence[float],
    held_out: Path,
    max_tokens: int,
) -> None:
    """Train and serve what is not known yet."""
    from ppow_train.generation import load_tokenizer
    from ppow_train.prompts import read_prompts, text_ids
    from ppow_train.serving_eval import EngineOptions

    tokenizer = load_tokenizer(trainer.target_directory)
    prompts = text_ids(read_prompts(held_out, tokenizer), tokenizer)
    longest = trainer.model_length(prompts, max_tokens)  # before anything is trained
    for seed in seeds:
        for name in (BASE, *names):
            missing = results.missing(name, seed, temperatures)
            if not missing:
                continue
            adapter = trainer.adapter(names[0] if name == BASE else name, seed)
            click.echo(f"seed {seed}: serving {name}", err=True)
            options = EngineOptions(str(trainer.target_directory), longest, max_num_seqs=16, seed=seed)
            with trainer.out_of_the_way():
                served = _serve(adapter, name, trainer, prompts, options, missing, max_tokens)
            results.add(name, seed, served)


def _versions() -> dict[str, str]:
    """Of what trains and serves: figures of two versions are not one comparison."""
    installed = {}
    for name in ("vllm", "torch", "transformers", "trl", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[f"version of {name}"] = importlib.metadata.version(name)
    return installed


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _begin(output: Path, facts: dict[str, Any]) -> None:
    """Write down what results depend on, or find it unchanged: what is there is used again, whatever the options."""
    from ppow_train.errors import UserError
    from ppow_train.trajectory_store import describe_changes, write_whole

    if not (output / FACTS).exists():
        if (output / "results.jsonl").exists() or (output / "adapters").exists():
            raise UserError(f"{output} holds results, but no {FACTS} to say of what: name another --output.")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output, FACTS, json.dumps(facts, indent=1).encode())
        return
    try:
        found = json.loads((output / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{output / FACTS} is damaged: name another --output.") from error
    if changes := describe_changes(found, facts):
        raise UserError(
            f"{output} holds a comparison with {changes}: give the same options, or name another --output."
        )


@dataclasses.dataclass
class _Trainer:
    """Trains what is not there yet; the pair is loaded once."""

    target: str
    drafter: str
    prompts: Path
    output: Path
    steps: int
    max_new_tokens: int
    serving_temperature: float
    rates: dict[str, float]
    device: str

    def __post_init__(self) -> None:
        from ppow_train.pair import load_pair

        self.pair = load_pair(self.target, self.drafter, self.device)

    def check(self, objectives: Sequence[str], seeds: Sequence[int]) -> None:
        """Refuse before anything is trained what some run would be refused for."""
        from ppow_train.training import check_trainable

        for objective in objectives:
            for seed in seeds:
                check_trainable(self.pair, self._config(objective, seed))

    def model_length(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """max_model_len of the engines that serve these prompts.

        Raises:
            UserError: prompts and outputs do not fit the target.
        """
        from ppow_train.generation import check_length
        from ppow_train.options import PPOWOptions
        from ppow_train.serving_eval import model_length

        config = self.pair.target.model.config
        check_length(max(map(len, prompts)) + max_tokens, config)
        return model_length(prompts, max_tokens, PPOWOptions.num_speculative_tokens, config)

    @contextlib.contextmanager
    def out_of_the_way(self) -> Iterator[None]:
        """The pair in main memory while vLLM serves: it wants a GPU's memory to itself."""
        from ppow_train.parity import move_pairs

        move_pairs([self.pair], "cpu")
        try:
            yield
        finally:
            move_pairs([self.pair], self.device)

    @property
    def target_directory(self) -> Path:
        return self.pair.target.directory

    def facts(self) -> dict[str, Any]:
        """What adapters depend on beside objective and seed, as JSON values."""
        return {
            "target": self.pair.target_ref.fingerprint,
            "drafter": self.pair.drafter_ref.fingerprint,
            "prompts": _digest(self.prompts),
            "steps": self.steps,
            "max_new_tokens": self.max_new_tokens,
            "serving_temperature": self.serving_temperature,
            # Results from before this option were all trained on the CPU, and must stay comparable.
            **({} if self.device == "cpu" else {"device": self.device}),
            **{f"learning_rate of {objective}": rate for objective, rate in self.rates.items()},
        }

    def adapter(self, objective: str, seed: int) -> Adapter:
        """The adapter of an objective and seed, trained now if need be."""
        from ppow_train.progress import make_progress
        from ppow_train.training import get_trajectories, train_adapter
        from vllm_ppow.artifact import PPOW_CONFIG, read_adapter

        directory = self.output / "adapters" / f"{re.sub(r'[^a-z0-9_.]+', '-', objective)}-{seed}"
        if (directory / PPOW_CONFIG).is_file():
            return read_adapter(directory)
        with make_progress() as progress:
            trajectories = get_trajectories(
                self.pair,
                self.prompts,
                cache=self.output / "trajectories",
                max_new_tokens=self.max_new_tokens,
                rounds=self._config(objective, seed).continuation_rounds(),
                progress=progress,
            )
            return train_adapter(
                self.pair, trajectories, self._config(objective, seed), directory, progress=progress
            ).adapter

    def _config(self, objective: str, seed: int) -> PPOWConfig:
        from ppow_train.config import PPOWConfig

        values: dict[str, Any] = {"objective": objective, "max_steps": self.steps, "seed": seed}
        if objective in self.rates:
            values["learning_rate"] = self.rates[objective]
        return PPOWConfig(
            output_dir=str(self.output / "state"),
            serving_temperature=self.serving_temperature,
            use_cpu=self.device == "cpu",
            save_strategy="no",
            **values,
        )


def _serve(
    adapter: Adapter,
    name: str,
    trainer: _Trainer,
    prompts: Sequence[Sequence[int]],
    options: EngineOptions,
    temperatures: Sequence[float],
    max_tokens: int,
) -> dict[str, Any]:
    """Counters of one drafter at every temperature."""
    from ppow_train.serving_eval import Engine, native_spec, ppow_spec
    from vllm_ppow.resolve import resolve_directory

    base = resolve_directory(trainer.drafter)[0]
    make_spec = native_spec if name == BASE else ppow_spec
    served = {}
    # The base drafter's are sampled as well, so that both arms run on the same model runner.
    sampled = adapter.config.draft_sample_method == "probabilistic"
    options = dataclasses.replace(options, sampled_drafts=sampled)
    with Engine(name, options, make_spec(adapter, base, adapter.config.num_speculative_tokens)) as engine:
        engine.wait_until_ready()
        for temperature in temperatures:
            run = engine.run(prompts, max_tokens=max_tokens, temperature=temperature)
            if run.counts is None:
                raise RuntimeError(f"vLLM counted no drafts for {name}")
            served[f"{temperature:g}"] = dataclasses.asdict(run.counts)
    return served


class _Results:
    """results.jsonl: a line per arm and seed as soon as it is known, and one more for temperatures added later."""

    def __init__(self, file: Path) -> None:
        from ppow_train.trajectory_store import write_whole

        self.file = file
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while it wrote: the next line must not continue this one
            write_whole(file.parent, file.name, whole)
        for row in map(json.loads, whole.splitlines()):
            self._take(row["arm"], row["seed"], row["counts"])

    def _take(self, arm: str, seed: int, counts: dict[str, Any]) -> None:
        self.rows[arm, seed] = {**self.rows.get((arm, seed), {}), **counts}

    def missing(self, arm: str, seed: int, temperatures: Sequence[float]) -> list[float]:
        """Temperatures that the arm has not been served at."""
        return [t for t in temperatures if f"{t:g}" not in self.rows.get((arm, seed), {})]

    def add(self, arm: str, seed: int, counts: dict[str, Any]) -> None:
        self._take(arm, seed, counts)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"arm": arm, "seed": seed, "counts": counts}) + "\n")

    def table(self, arms: Sequence[str], seeds: Sequence[int], temperatures: Sequence[float]) -> str:
        """Markdown: mean accepted tokens per draft over seeds, and the gain over the base drafter, seed by seed."""
        head = "".join(f" | T = {t:g}: accepted per draft | gain over base" for t in temperatures)
        lines = [f"| arm{head} |", "|---" * (1 + 2 * len(temperatures)) + "|"]
        for arm in arms:
            cells = [arm]
            for temperature in temperatures:
                values = [self._accepted(arm, seed, temperature) for seed in seeds]
                bases = [self._accepted(BASE, seed, temperature) for seed in seeds]
                gains = [100 * (_over(value, base) - 1) for value, base in zip(values, bases, strict=True)]
                cells.append(_cell(values, "{:.3f} ({:.3f}–{:.3f})"))
                cells.append("–" if arm == BASE else _cell(gains, "{:+.1f} % ({:+.1f} … {:+.1f})"))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def _accepted(self, arm: str, seed: int, temperature: float) -> float:
        counts = self.rows[arm, seed][f"{temperature:g}"]
        return _over(counts["num_accepted_tokens"], counts["num_drafts"])


def _over(value: float, base: float) -> float:
    """A ratio; nan where there is nothing to divide by."""
    return value / base if base else math.nan


def _cell(values: Sequence[float], form: str) -> str:
    """Mean, least and most; "–" where a seed has no value: a mean over fewer seeds would not compare with others."""
    if any(map(math.isnan, values)):
        return "–"
    return form.format(statistics.mean(values), min(values), max(values))
