"""Windows per second of ppow's update with packed windows, against one row per window as TRL would run them.

Both paths draft, verify and differentiate the same windows, in one process and in turns. Packed: windows of a
trajectory share its prefix (rollout.py). Unpacked: every window is a row with a prefix of its own, all rows in one
batch; the update of a causal LM is then TRL's plain forward over prefix and window; an EAGLE head, which TRL cannot
run, is chained over rows. Nothing else is made slower: where TRL would run the target again for the KL anchor, the
unpacked path takes what verification computed. In every round loss and gradient of both paths on the same drafted
windows must agree. Left out: the optimizer, generation of trajectories, criticality.

    OMP_NUM_THREADS=1 python examples/benchmarks/packed_speed.py --output packed-speed.json
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, inject_adapter_in_model

from ppow_train.generation import Round
from ppow_train.pair import Pair, load_pair
from ppow_train.progress import make_progress
from ppow_train.report import write_json
from ppow_train.rollout import WindowRunner
from ppow_train.training import get_trajectories
from ppow_train.types import Rollout, Trajectories

TINY = Path(__file__).parents[1] / "tiny"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2  # relative; gradient: of the difference's norm, float32
PENALTY = 0.05  # β of the KL penalty
CLOCKS = ("wall", "cpu")  # what passed, and what this process computed: the fairer one where other jobs run


@dataclasses.dataclass
class WindowPath:
    """One way to run windows: two calls that are timed, and what leaves the target as the first of them did."""

    roll_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Rollout]
    recall: Callable[[torch.Tensor, torch.Tensor], None]
    draft_logps: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def packed(runner: WindowRunner) -> WindowPath:
    """What training does."""
    return WindowPath(runner.roll_out, runner.read_target, lambda *rows: runner.draft_logps(*rows)[0])


def unpacked(runner: WindowRunner) -> WindowPath:
    """One row per window: trajectories that are cut after their window and never shared."""

    def alone(trajectory: torch.Tensor, start: torch.Tensor) -> tuple[WindowRunner, torch.Tensor]:
        rows = runner.trajectories.select(trajectory)
        end = start + runner.num_speculative_tokens
        ids = rows.input_ids[:, : int(end.max())]
        own = Trajectories(ids, rows.prompt_lengths, end)
        every = torch.arange(len(start), device=start.device)
        return (
            WindowRunner(
                runner.target,
                runner.drafter,
                own,
                runner.num_speculative_tokens,
                runner.temperature,
                plain=True,
            ),
            every,
        )

    def roll_out(trajectory: torch.Tensor, start: torch.Tensor, noise: torch.Tensor) -> Rollout:
        single, every = alone(trajectory, start)
        return single.roll_out(every, start, noise)

    def recall(trajectory: torch.Tensor, start: torch.Tensor) -> None:
        single, every = alone(trajectory, start)
        single.read_target(every, start)

    def draft_logps(trajectory: torch.Tensor, start: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if runner.drafter.drafter_type == "causal_lm":
            return _plain_logps(runner, trajectory, start, tokens)
        single, every = alone(trajectory, start)
        return single.draft_logps(every, start, tokens)[0]

    return WindowPath(roll_out, recall, draft_logps)


def _plain_logps(
    runner: WindowRunner, trajectory: torch.Tensor, start: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """TRL's forward: left-padded prefix and window, the head on the window alone; its entropies too."""
    length = tokens.shape[1]
    width = int(start.max()) + length
    ids = torch.zeros(len(start), width, dtype=torch.long, device=start.device)
    mask = torch.zeros_like(ids)
    for row, (index, first) in enumerate(zip(trajectory.tolist(), start.tolist(), strict=True)):
        ids[row, width - length - first :] = torch.cat(
            [runner.trajectories.input_ids[index, :first], tokens[row]]
        )
        mask[row, width - length - first :] = 1
    output = runner.drafter.model(
        input_ids=ids, attention_mask=mask, logits_to_keep=length + 1, use_cache=False
    )
    logp = (output.logits[:, :-1].float() / runner.temperature).log_softmax(-1)
    _ = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(-1, tokens[..., None]).squeeze(-1)


def ppow_loss(logps: torch.Tensor, rollout: Rollout, advantages: torch.Tensor) -> torch.Tensor:
    """TRL's loss for one update per batch: the surrogate's ratio is 1, the penalty is k3 towards the target."""
    ratio = (logps - logps.detach()).exp()
    gap = rollout.target_logps - logps
    return (-ratio * advantages[:, None] + PENALTY * (gap.exp() - gap - 1)).mean()


def group_advantages(rollout: Rollout, group: int) -> torch.Tensor:
    """Accepted tokens standardised within each group, [N]."""
    k = rollout.num_accepted_tokens.float().view(-1, group)
    return ((k - k.mean(-1, keepdim=True)) / (k.std(-1, keepdim=True) + 1e-4)).flatten()


class Benchmark:
    """One pair with LoRA off its starting point, and the windows of every round."""

    def __init__(
        self, pair: Pair, trajectories: Trajectories, per_step: int, group: int, length: int, seed: int
    ) -> None:
        self.per_step, self.group, self.length = per_step, group, length
        drafter = pair.drafter
        self.device = pair.target.model.device
        inject_adapter_in_model(
            LoraConfig(r=32, lora_alpha=64, target_modules=drafter.lora_targets), drafter.model
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = []
        for name, parameter in drafter.model.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=self.generator) * 0.01
                parameter.data = noise.to(self.device)
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                self.weights.append(parameter)
        runner = WindowRunner(pair.target, drafter, trajectories.to(self.device), length, temperature=1.0)
        self.runner, self.paths = runner, {"packed": packed(runner), "unpacked": unpacked(runner)}

    def round(self, windows: int, packed_first: bool) -> dict[str, Any]:
        """Seconds of both paths for the same windows, and how far they agree."""
        trajectories = self.runner.trajectories
        chosen = torch.randperm(len(trajectories), generator=self.generator)[: self.per_step].sort().values
        starts_each = windows // (self.per_step * self.group)
        room = trajectories.num_starts(self.length).cpu()[chosen][:, None]
        offset = (torch.rand(len(chosen), starts_each, generator=self.generator) * room).long()
        first = trajectories.first_starts().cpu()[chosen][:, None]
        start = (first + offset).flatten().repeat_interleave(self.group).to(self.device)
        trajectory = chosen.repeat_interleave(starts_each * self.group).to(self.device)
        noise = self.runner.draw_noise(len(start), self.generator)
        seconds, rollouts, results = {}, {}, {}
        order = ("packed", "unpacked") if packed_first else ("unpacked", "packed")
        for name in order:
            self.runner.target.forget()
            begin = clocks(self.device)
            rollouts[name] = self.paths[name].roll_out(trajectory, start, noise)
            seconds[name] = clocks(self.device) - begin
        shared = rollouts["packed"]  # the update of both is on the same drafted windows
        advantages = group_advantages(shared, self.group)
        for name in order:
            self.paths[name].recall(trajectory, start)  # in an update it follows its own rollout
            begin = clocks(self.device)
            logps = self.paths[name].draft_logps(trajectory, start, shared.tokens)
            loss = ppow_loss(logps, shared, advantages)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights)])
            seconds[name] += clocks(self.device) - begin
            results[name] = loss.item(), gradient
        same = (rollouts["packed"].tokens == rollouts["unpacked"].tokens).all(-1)
        spent = {
            f"{clock}_{name}": both[i].item()
            for name, both in seconds.items()
            for i, clock in enumerate(CLOCKS)
        }
        return {**spent, **_agreement(results), "same_rollouts": same.float().mean().item()}


def _agreement(results: dict[str, tuple[float, torch.Tensor]]) -> dict[str, float]:
    """Relative differences of loss and gradient.

    Raises:
        click.ClickException: beyond the tolerances.
    """
    (loss, gradient), (wanted_loss, wanted) = results["packed"], results["unpacked"]
    loss_difference = abs(loss - wanted_loss) / abs(wanted_loss)
    gradient_difference = ((gradient - wanted).norm() / wanted.norm()).item()
    if not (loss_difference < LOSS_TOLERANCE and gradient_difference < GRADIENT_TOLERANCE):
        raise click.ClickException(
            f"the paths disagree: loss by {loss_difference:.1e}, gradient by {gradient_difference:.1e} (relative)."
        )
    return {"loss_difference": loss_difference, "gradient_difference": gradient_difference}


def clocks(device: torch.device) -> torch.Tensor:
    """Seconds on both clocks, [2], when the device has done all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def summarise(rounds: list[dict[str, Any]], windows: int) -> dict[str, Any]:
    """Windows per second and their ratio, medians with their spread over the rounds, on either clock."""
    summary: dict[str, Any] = {}
    for clock in CLOCKS:
        rates = {name: [windows / r[f"{clock}_{name}"] for r in rounds] for name in ("packed", "unpacked")}
        rates["ratio"] = [p / u for p, u in zip(rates["packed"], rates["unpacked"], strict=True)]
        summary[clock] = {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in rates.items()
        }
    for name in ("loss_difference", "gradient_difference"):
        summary[f"largest_{name}"] = max(r[name] for r in rounds)
    summary["same_rollouts"] = min(r["same_rollouts"] for r in rounds)
    return summary


def _card(device: str) -> str:
    return platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)


def facts(device: str, **options: Any) -> dict[str, Any]:
    """What is needed to repeat the measurement."""
    packages = ("torch", "transformers", "trl", "peft", "speculators")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": f"{_card(device)}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "clocks": "seconds of wall and of this process's CPU time, alternating rounds, other jobs on the machine",
        **options,
    }


def _line(clock: str, rates: dict[str, Any]) -> str:
    packed, unpacked, ratio = (rates[name] for name in ("packed", "unpacked", "ratio"))
    return (
        f"{clock}: packed {packed['median']:.1f}/s, unpacked {unpacked['median']:.1f}/s, "
        f"ratio {ratio['median']:.1f} ({ratio['min']:.1f}–{ratio['max']:.1f})"
    )


@click.command()
@click.option("--target", default=str(TINY / "target"), show_default=True)
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    default=(str(TINY / "eagle3"), str(TINY / "causal_lm")),
    show_default=True,
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=TINY / "prompts" / "tests_held_out.jsonl",
    show_default=True,
)
@click.option("--max-new-tokens", default=128, show_default=True, help="tokens of each trajectory at most")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("runs/trajectories"), show_default=True
)
@click.option("--rounds", default=5, show_default=True, help="timed rounds, after one that is not")
@click.option("--trajectories-per-step", default=16, show_default=True)
@click.option("--windows-per-step", multiple=True, type=int, default=(128, 256), show_default=True)
@click.option("--num-generations", default=8, show_default=True, help="G, windows of one start")
@click.option("--num-speculative-tokens", default=8, show_default=True, help="K")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON to write")
def main(
    target: str,
    drafters: tuple[str, ...],
    prompts: Path,
    max_new_tokens: int,
    cache: Path,
    rounds: int,
    trajectories_per_step: int,
    windows_per_step: tuple[int, ...],
    num_generations: int,
    num_speculative_tokens: int,
    seed: int,
    device: str,
    output: Path,
) -> None:
    """Packed against unpacked windows: rollout, verification and gradient of ppow's update."""
    if any(windows % (trajectories_per_step * num_generations) for windows in windows_per_step):
        raise click.UsageError("windows per step must be a multiple of trajectories per step × generations.")
    options = {k: v for k, v in click.get_current_context().params.items() if isinstance(v, int)}
    results = []
    for name in drafters:
        pair = load_pair(target, name, device, "float32")  # the paths must agree
        with make_progress() as progress:
            trajectories = get_trajectories(
                pair,
                prompts,
                cache=cache,
                max_new_tokens=max_new_tokens,
                rounds=(Round(seed, 1.0),),
                progress=progress,
            )
        long = trajectories.select((trajectories.num_starts(num_speculative_tokens) > 0).nonzero()[:, 0])
        benchmark = Benchmark(
            pair, long, trajectories_per_step, num_generations, num_speculative_tokens, seed
        )
        benchmark.round(windows_per_step[0], packed_first=True)
        kind = pair.drafter.drafter_type
        for windows in windows_per_step:
            timed = [benchmark.round(windows, packed_first=bool(i % 2)) for i in range(rounds)]
            summary = summarise(timed, windows)
            shape = {
                "drafter": kind,
                "windows_per_step": windows,
                "mean_tokens": long.lengths.float().mean().item(),
            }
            results.append({**shape, **summary, "rounds": timed})
            write_json(
                output, {**facts(device, **options), "results": results}
            )  # each as soon as it is known
            click.echo(
                f"{kind}, {windows} windows, " + "; ".join(_line(clock, summary[clock]) for clock in CLOCKS)
            )


if __name__ == "__main__":
    main()
