"""Runs a study: tunes learning rates on prompts set apart, then trains every arm with every seed and measures it.

What is measured is the expected serving walk (walk.py) on held-out prompts, the same for all arms. A study goes on
where it stopped, and several processes may work at one (results.py). Left out: statistics and tables.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ppow_train.config import PPOWConfig, check_keys
from ppow_train.data import keep_long_enough, read_prompts
from ppow_train.errors import UserError
from ppow_train.generation import Round, load_or_generate, load_tokenizer
from ppow_train.microbatches import choose_windows_per_forward, divide_step
from ppow_train.options import PPOWOptions
from ppow_train.pair import Pair, load_pair
from ppow_train.progress import make_progress
from ppow_train.prompts import Text, check_apart, text_ids
from ppow_train.rollout import WindowRunner
from ppow_train.selection import Judge
from ppow_train.study.costs import Costs, read_costs, write_costs
from ppow_train.study.facts import model_facts, plan_facts, record_facts
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.results import Measured, Results, RunKey
from ppow_train.study.schedule import runs
from ppow_train.study.timing import cost_ratios
from ppow_train.target_cache import TargetCache, open_cache, resolve_kind
from ppow_train.trainer import PPOWTrainer
from ppow_train.training import check_lengths, check_trainable, quiet_trainer, restored
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk

_HELD_OUT_SEED = 1_000_000  # of their continuations: apart from every run's
_POLL_S = 5.0


class CellBench:
    """A cell made ready: the pair, trajectories by seed, and the prompts that judge.

    Args:
        plan, cell: what is compared, and where.
        cache: directory for generated trajectories.
        device: where models run.
    """

    def __init__(self, plan: Plan, cell: Cell, cache: Path, device: str = "cpu") -> None:
        self.plan, self.cell, self.cache = plan, cell, cache
        dtype = str(plan.options.get("target_dtype", PPOWConfig.target_dtype))
        self.pair: Pair = load_pair(plan.target, cell.drafter, device, dtype)
        configs = [self.config(arm, cache) for arm in plan.arms]
        for config in configs:  # before anything is generated
            check_trainable(self.pair, config)
        self.tokenizer = load_tokenizer(self.pair.target.directory)
        self.length = int(plan.options.get("num_speculative_tokens", PPOWConfig.num_speculative_tokens))
        self._check_lengths(configs)
        self.training = functools.lru_cache(maxsize=1)(self._training)
        self.target_cache = functools.lru_cache(maxsize=1)(self._target_cache)
        self.judge = functools.lru_cache(maxsize=2)(self._judge)  # each keeps a tenth of the memory at most

    def _prompts(self, file: str) -> list[Text]:
        return read_prompts(Path(file), self.tokenizer)

    def _check_lengths(self, configs: Sequence[PPOWConfig]) -> None:
        """Refuse prompts that an arm could not train on once they are continued."""
        longest = max(map(len, text_ids(self._prompts(self.cell.prompts), self.tokenizer)))
        for config in configs:
            check_lengths(self.pair, config, longest + self.plan.max_new_tokens)

    def _trajectories(self, file: str, drawn: Round, new_tokens: int) -> Trajectories:
        return load_or_generate(
            self.cache,
            self.pair.target.model,
            self.tokenizer,
            self._prompts(file),
            target_fingerprint=self.pair.target_ref.fingerprint,
            max_new_tokens=new_tokens,
            temperature=drawn.temperature,
            seed=drawn.seed,
        ).to(self.pair.target.model.device)

    def _training(self, rounds: Sequence[Round]) -> Trajectories:
        """Trajectories of the prompts that are trained on."""
        parts = []
        for drawn in rounds:
            whole = self._trajectories(self.cell.prompts, drawn, self.plan.max_new_tokens)
            if len(whole) <= self.plan.tuning_prompts:
                raise UserError(
                    f"The plan sets {self.plan.tuning_prompts} prompts apart for tuning, {self.cell.prompts} has "
                    f"{len(whole)}: lower tuning_prompts."
                )
            parts.append(whole.select(torch.arange(len(whole) - self.plan.tuning_prompts)))
        return keep_long_enough(Trajectories.join(parts), self.length)

    def _target_cache(self, rounds: Sequence[Round], kind: Literal["memory", "disk"]) -> TargetCache | None:
        """The target's states along them, kept where the options say."""
        trajectories = self.training(rounds)
        options = PPOWOptions(target_cache=kind)
        fingerprint = self.pair.target_ref.fingerprint
        with make_progress(is_shown=False) as progress:
            return open_cache(self.pair.target, trajectories, options, self.cache, fingerprint, progress)

    def _judge(self, phase: str) -> Judge:
        """The prompts that are reported, or those that are set apart for tuning."""
        # K tokens longer: the last draft of a walk must fit.
        tokens = self.plan.max_tokens + self.length
        drawn = Round(_HELD_OUT_SEED, self.cell.temperature)
        if phase == "report":
            judges = self._trajectories(self.cell.held_out, drawn, tokens)
        else:
            # Of all prompts, though the last ones judge: what is drawn for them depends on all before them, and a study
            # that goes on must find the same.
            whole = self._trajectories(self.cell.prompts, drawn, tokens)
            judges = whole.select(torch.arange(len(whole) - self.plan.tuning_prompts, len(whole)))
        runner = WindowRunner(
            self.pair.target, self.pair.drafter, judges, self.length, self.cell.temperature or 1.0
        )
        return Judge(runner, self.greedy_drafts)

    def config(self, arm: str, scratch: Path, **values: Any) -> PPOWConfig:
        """The configuration of one run."""
        device = self.pair.target.model.device
        return _configuration(self.plan.options_of(arm), self.cell.temperature, scratch, device, **values)

    def trainer(self, config: PPOWConfig, judges: Sequence[Judge] = ()) -> PPOWTrainer:
        """A trainer whose LoRA is in the drafter from now on: use it within `restored`.

        Args:
            judges: that keep memory while it trains.
        """
        rounds = config.continuation_rounds()
        trajectories = self.training(rounds)
        kind = resolve_kind(self.pair.target, trajectories, config)
        runner = WindowRunner(
            self.pair.target,
            self.pair.drafter,
            trajectories,
            self.length,
            config.training_temperature,
            greedy=self.cell.temperature == 0,
            sampled_paths=config.needs_argmax,
            drafts=config.is_rollout,
        )
        config.windows_per_forward = choose_windows_per_forward(runner, config, judges)
        divide_step(config, config.windows_per_forward)
        runner.cache = None if kind == "none" else self.target_cache(rounds, kind)
        trainer = PPOWTrainer(runner, config, self.tokenizer)
        quiet_trainer(trainer)
        return trainer

    @property
    def greedy_drafts(self) -> bool:
        """Whether the cell serves greedy drafts: its start and all arms, or gains would mean nothing."""
        method = self.plan.options.get("draft_sample_method", PPOWConfig.draft_sample_method)
        return self.cell.temperature == 0 or method == "greedy"

    def measure(self, key: RunKey) -> Measured:
        """Do one run: train an arm and walk, or walk with the untrained drafter."""
        judge = self.judge(key.phase)
        if key.arm is None:
            return _measured(judge(), 0.0)
        with tempfile.TemporaryDirectory() as scratch, restored(self.pair.drafter.model):
            config = self.config(
                key.arm, Path(scratch), seed=key.seed, max_steps=key.steps, learning_rate=key.learning_rate
            )
            trainer = self.trainer(config, [judge])
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
            return _measured(judge(), seconds)


def _configuration(
    options: dict[str, Any], temperature: float, scratch: Path, device: torch.device, **values: Any
) -> PPOWConfig:
    """The configuration of a run with an arm's options in a cell of that temperature."""
    fixed = {
        "output_dir": str(scratch),
        "use_cpu": device.type == "cpu",
        "serving_temperature": temperature,
        "save_strategy": "no",
    }
    return PPOWConfig(**{**fixed, **options, **values})


def _measured(walk: ExpectedWalk, seconds: float) -> Measured:
    return Measured(walk.num_drafts.tolist(), walk.num_accepted_tokens.tolist(), seconds)


@dataclasses.dataclass
class Study:
    """A study under way in one of the processes that work at it.

    Attributes:
        plan: what is compared.
        results: what is known.
        device: where models run.
        only_cells, only_arms: names; the rest is left for later, but for the tuning that these rely on.
        say: told of every finished run.
    """

    plan: Plan
    results: Results
    device: str = "cpu"
    only_cells: Collection[str] = ()
    only_arms: Collection[str] = ()
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._bench: CellBench | None = None
        self._models: dict[str, dict[str, Any]] = {}
        self._check_options()
        for cell in self.plan.cells:
            check_apart(Path(cell.prompts), Path(cell.held_out))
        self.check_facts()

    def _check_options(self) -> None:
        """Refuse options that are unknown or cannot be, before anything is loaded."""
        temperatures = dict.fromkeys(cell.temperature for cell in self.plan.cells)
        device = torch.device(self.device)
        for arm in self.plan.arms:
            options = self.plan.options_of(arm)
            check_keys(options, f"arm {arm!r} of the plan")
            for temperature in temperatures:
                try:
                    _configuration(options, temperature, self.results.directory, device)
                except UserError as error:
                    raise UserError(
                        f"Arm {arm!r} of the plan, at temperature {temperature:g}: {error}"
                    ) from error

    def check_facts(self) -> None:
        """Refuse a plan under which the results that are there would not have come out; write down what it says."""
        facts = plan_facts(self.plan)
        for cell in self.plan.cells:
            if not self.only_cells or cell.name in self.only_cells:
                facts["cells"][cell.name] |= self._model_facts(cell.drafter)
        record_facts(self.results, facts, self.say)

    def _model_facts(self, drafter: str) -> dict[str, Any]:
        if drafter not in self._models:
            self._models[drafter] = model_facts(self.plan.target, drafter, self.device)
        return self._models[drafter]

    def bench(self, name: str) -> CellBench:
        """The bench of a cell; the last one is kept."""
        if self._bench is None or self._bench.cell.name != name:
            cell = next(cell for cell in self.plan.cells if cell.name == name)
            self._bench = None  # before the next is loaded
            self._bench = CellBench(self.plan, cell, self.results.directory / "trajectories", self.device)
        return self._bench

    def finish(self) -> Results:
        """Do what is not done yet; returns when all is done, by this process or by others."""
        while True:
            costs = read_costs(self.results.directory)
            done = self.results.read()
            wanted = list(runs(self.plan, done, costs, self.only_cells, self.only_arms))
            timings = list(self._timings(costs))
            if not timings and all(key in done for key in wanted):
                return self.results
            one_done = any(self._run(key, wanted) for key in wanted if key is not None and key not in done)
            # Last, so that it delays nothing that a table can show.
            if not one_done and not any(self._time(*timing) for timing in timings):
                # What is left is being done elsewhere, or waits for learning rates that are.
                time.sleep(_POLL_S)

    def _run(self, key: RunKey, wanted: Collection[RunKey | None]) -> bool:
        """Do a run unless another process does; whether it was done here."""
        with self.results.claim(key) as mine:
            done = self.results.read()  # another process may have finished it just now
            if not mine or key in done:
                return False
            measured = self.bench(key.cell).measure(key)
            self.results.add(key, measured)
        self.say(_line(key, measured, f"{1 + sum(one in done for one in wanted)} of {len(wanted)}"))
        return True

    def _timings(self, costs: Costs) -> Iterator[tuple[Cell, str]]:
        """Arms whose cost is not known, each with the first cell of its drafter."""
        drafters: set[str] = set()
        for cell in self.plan.cells:
            if cell.drafter in drafters or (self.only_cells and cell.name not in self.only_cells):
                continue
            drafters.add(cell.drafter)
            for arm in self.plan.arms:
                wanted = arm != self.plan.reference and (not self.only_arms or arm in self.only_arms)
                if wanted and arm not in costs.get(cell.drafter, {}):
                    yield cell, arm

    def _time(self, cell: Cell, arm: str) -> bool:
        """Time an arm unless another process times one: side by side means one at a time."""
        with self.results.claim(RunKey("time", cell.name, None, 0, 0, 0.0)) as mine:
            costs = read_costs(self.results.directory)
            of_drafter = costs.setdefault(cell.drafter, {})
            if not mine or arm in of_drafter:
                return False
            of_drafter[arm] = cost_ratios(self.bench(cell.name), arm, self.plan.reference)
            write_costs(self.results.directory, costs)
        self.say(f"{arm}: an update takes {of_drafter[arm]} times the reference's ({cell.drafter})")
        return True


def _line(key: RunKey, measured: Measured, progress: str) -> str:
    accepted = sum(measured.accepted) / sum(measured.drafts)
    what = "supervised start" if key.arm is None else f"{key.arm}, seed {key.seed}, lr {key.learning_rate:g}"
    return f"[{progress}] {key.phase} {key.cell}: {what}: {accepted:.3f} accepted per draft ({measured.seconds:.0f} s)"
