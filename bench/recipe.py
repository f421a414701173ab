"""Compares training recipes for small models at equal tokens: Muon and AdamW, experts and a dense model, balancing.

    python bench/recipe.py muon --data FILES       three learning rates of each, two more seeds of the best
    python bench/recipe.py dense --data FILES      experts against a Llama of equal active parameters, three seeds
    python bench/recipe.py pair --data FILES       the experiment's two models, scaled down, 1,500 steps each
    python bench/recipe.py balance --data FILES    loss-free, none, and an auxiliary loss, 1,500 steps each
    python bench/recipe.py speed                   tokens/s of the experts and of the dense model
    python bench/recipe.py show                    the tables of all results

With loss-free balancing, 1,500 more steps with frozen weights calibrate the router biases. Speeds do not include the
calibration steps. Each run is written to docs/results/recipe.json when it ends. A run with results is not repeated, so
that an interrupted series can continue. `--jobs 2` trains two models at a time with one thread each, which changes
speeds, but not losses.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from machine import describe, seconds

from smolseek.config import BalanceConfig, DataConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from smolseek.model import summary
from smolseek.presets import preset
from smolseek.run_folder import RunFolder

SEEDS = (0, 1, 2)
RATES = {"adamw": (2e-3, 4e-3, 8e-3), "muon": (2e-3, 4e-3, 8e-3)}
GAMMA = 3e-3  # 200 steps are too few for the published 1e-3
SHORT, LONG, SETTLING = 200, 1500, 1500
FINAL_TOKENS = 65_536
LOAD_TOKENS = 262_144
"""Number of tokens for MaxVio. Samples of 4,096 tokens would be too small: their expert loads vary by 10%."""


def moe() -> ModelConfig:
    """Return a smaller `deepseek_159m` with the same 16 routed experts (3 used per token) and 1 shared expert."""
    return replace(preset("tiny"), n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=160)


def seed() -> ModelConfig:
    """Return a smaller `seed_159m` with two key-value heads, four experts with biases, and an untied head."""
    small = replace(preset("seed_159m"), hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    return replace(small, moe_intermediate_size=512, max_position_embeddings=1024)


def dense() -> ModelConfig:
    """Return SmolLM2's architecture with as many active neurons as `moe`, whose tokens use 4 experts of 160 neurons."""
    return replace(
        preset("smollm2_135m"),
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=640,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.02,
    )


SHAPES = {"moe": moe, "seed": seed, "dense": dense}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, whose name contains all settings of the run."""

    shape: str = "moe"
    kind: str = "adamw"
    lr: float
    gamma: float = GAMMA
    alpha: float = 0.0
    seed: int = 0
    steps: int = SHORT
    settle: int = 0
    """Number of additional steps that calibrate only the router biases."""

    @property
    def name(self) -> str:
        name = f"{self.shape} {self.kind} {self.lr:g} gamma {self.gamma:g} alpha {self.alpha:g} seed {self.seed}"
        return f"{name} steps {self.steps}" + (f" settle {self.settle}" if self.settle else "")

    def config(self, data: list[str], folder: str) -> TrainConfig:
        return TrainConfig(
            model=SHAPES[self.shape](),
            run=f"{folder}/run",
            data=DataConfig(sources=tuple(data), val_fraction=0.03),
            optim=OptimConfig(kind=self.kind, lr=self.lr),  # type: ignore[arg-type]
            schedule=ScheduleConfig(warmup_steps=self.steps // 10),
            balance=BalanceConfig(gamma=self.gamma, alpha=self.alpha, calibration_steps=self.settle),
            steps=self.steps + self.settle,
            batch_size=4 if self.steps == SHORT else 2,
            seed=self.seed,
            log_every=20,
            eval_every=self.steps // 8,
            eval_tokens=8_192,
            save_every=self.steps + self.settle,
            sample_tokens=0,
        )


def execute(run: Run, data: list[str], threads: int) -> dict:
    """Train, and return the results for the tables. Losses use fewer validation tokens than final results."""
    import torch

    from smolseek.data.datasets import open_dataset
    from smolseek.data.sequences import build_sequences
    from smolseek.storage.hf_folder import load_model
    from smolseek.tokenizer import encoder, load_tokenizer, token_bytes
    from smolseek.train.device import autocast
    from smolseek.train.evaluate import evaluate
    from smolseek.train.loop import train

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(data, folder)
        model = load_model(str(train(config))).model
        records = RunFolder(Path(config.run)).read_metrics()
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = open_dataset(config.data, LOAD_TOKENS, tokenizer)
    eos_id, sizes = config.model.eos_ids[0], token_bytes(tokenizer)

    def judged(tokens: int) -> dict:
        sequences = build_sequences(corpus.validation, encoder(tokenizer), eos_id, config.seq_len, tokens)
        size = int(sizes[sequences[:, 1:].numpy()].sum())
        evaluation = evaluate(model, sequences, size, 4, autocast("auto", torch.device("cpu")))
        assert evaluation is not None
        return {key: value for key, value in evaluation.items() if key != "val_load"} | {
            "tokens": sequences[:, 1:].numel()
        }

    final = judged(FINAL_TOKENS)
    if run.steps == LONG:
        final["of_load"] = judged(LOAD_TOKENS)
    evaluated = [r for r in records if "val_loss" in r]
    logged = [r for r in records if "tokens_per_second" in r and "settling" not in r]
    return {
        **vars(run),
        "validation": [(r["tokens"], r["val_loss"]) for r in evaluated],
        "training": [(r["tokens"], r["loss"]) for r in logged],
        "final": final,
        "tokens_per_second": sorted(r["tokens_per_second"] for r in logged)[len(logged) // 2],
        "threads": threads,
        "audits": [r["audit"] for r in records if "audit" in r],
        **describe(),
    }


def speed(rounds: int = 5, steps: int = 6) -> dict:
    """Return tokens/s of the model with experts and of the dense model, alternately with batches of 4 x 256 tokens."""
    import torch

    from smolseek.memory import keep_freed_memory
    from smolseek.model.transformer import new_model
    from smolseek.train.device import autocast
    from smolseek.train.loss import losses
    from smolseek.train.optim import make_optimizer

    keep_freed_memory()
    spent: dict[str, list[float]] = {"moe": [], "dense": []}
    models = {name: new_model(SHAPES[name]()).train() for name in spent}
    optimizers = {name: make_optimizer(model, OptimConfig()) for name, model in models.items()}
    for _ in range(rounds + 1):
        for name, model in models.items():

            def some(model=model, optimizer=optimizers[name]):
                for _ in range(steps):
                    sequences = torch.randint(model.config.vocab_size, (4, 257))
                    with autocast("auto", torch.device("cpu")):
                        loss = losses(model, sequences, accumulate=True).total
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            spent[name].append(seconds(some))
    rates = {name: sorted(steps * 1024 / one for one in times[1:]) for name, times in spent.items()}
    for name, values in rates.items():
        print(f"{name}: {values[len(values) // 2]:,.0f} tokens/s ({values[0]:,.0f}-{values[-1]:,.0f})")
    return {"tokens_per_second": rates, "threads": torch.get_num_threads(), "load": os.getloadavg(), **describe()}


class Series:
    """The runs in the results file. Missing runs are trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"runs": {}}

    def do(self, wanted: list[Run]) -> list[dict]:
        """Train the missing runs, and return all runs."""
        missing = [run for run in wanted if run.name not in self.results["runs"]]
        threads = max(1, (multiprocessing.cpu_count() or 1) // self.args.jobs)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
            running = {pool.submit(execute, run, self.args.data, threads): run for run in missing}
            for done in as_completed(running):
                self.results["runs"][running[done].name] = done.result()
                self.write()
        return [self.results["runs"][run.name] for run in wanted]

    def write(self) -> None:
        """Write the file, one line per run."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(run)}" for key, run in self.results["runs"].items())
        rate = json.dumps(self.results.get("speed"))
        self.args.out.write_text(f'{{"speed": {rate}, "runs": {{\n{lines}\n}}}}\n', encoding="utf-8")

    def best(self, kind: str) -> Run:
        """Return the run of `kind` with the lowest validation loss among its rates at seed 0."""
        runs = [Run(kind=kind, lr=lr) for lr in RATES[kind]]
        return min(zip(runs, self.do(runs), strict=True), key=lambda pair: pair[1]["final"]["val_loss"])[0]

    def plan(self, name: str) -> dict[str, list[Run]]:
        """Return the columns of a plan's table, with three seeds in each column."""
        adamw = self.best("adamw")
        if name == "muon":
            columns = {"AdamW": adamw, "Muon": self.best("muon")}
        elif name == "dense":
            columns = {"experts": adamw, "dense": replace(adamw, shape="dense", gamma=0.0)}
        else:
            balanced = Run(lr=1e-3, gamma=2e-3, steps=LONG, settle=SETTLING)
            if name == "pair":
                # Four experts are balanced without bias calibration.
                few = replace(balanced, shape="seed", settle=0)
                return {"deepseek, scaled down": [balanced], "seed, scaled down": [few]}
            unbalanced = replace(balanced, gamma=0.0, settle=0)
            alpha = replace(unbalanced, alpha=0.01)
            columns = {"gamma 0.002": balanced, "gamma 0": unbalanced, "alpha 0.01": alpha}
        return {title: [replace(run, seed=seed) for seed in SEEDS] for title, run in columns.items()}


def tokens_to(curve: list, loss: float) -> float | None:
    """Return after how many tokens a validation curve first reaches `loss`, by linear interpolation, or None."""
    for (t0, l0), (t1, l1) in itertools.pairwise(curve):
        if l1 <= loss:
            return t0 + (t1 - t0) * min(1.0, max(0.0, (l0 - loss) / (l0 - l1))) if l0 > l1 else t1
    return None


def numbers(values: list[float], digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values) + f" (mean {sum(values) / len(values):.{digits}f})"


def show(name: str, columns: dict[str, list[dict]]) -> None:
    """Print one plan's table."""
    print(f"\n{name}: up to {max(map(len, columns.values()))} seeds")
    for title, runs in columns.items():
        first = runs[0]
        size = summary.count(SHAPES[first["shape"]]())
        print(f"  {title} ({first['kind']}, rate {first['lr']:g}, {first['steps']} steps; {size.total:,} parameters, ")
        print(f"    {size.active:,} active; {cached(SHAPES[first['shape']]())} cached bytes a token)")
        print(f"    validation loss  {numbers([run['final']['val_loss'] for run in runs], 4)}")
        many = [run["final"]["of_load"] for run in runs if "of_load" in run["final"]]
        if many:
            print(f"      over {many[0]['tokens']:,} tokens  {numbers([load['val_loss'] for load in many], 4)}")
        print(f"    tokens/s         {numbers([run['tokens_per_second'] for run in runs], 0)}")
        if "val_maxvio" in first["final"]:
            print(f"    MaxVio (global)  {numbers([run['final']['val_maxvio'] for run in runs])}")
            if many:
                print(f"      over {many[0]['tokens']:,} tokens  {numbers([load['val_maxvio'] for load in many])}")
    if name == "balance":
        (title, ours), *others = columns.items()
        for other, runs in others:
            losses = [[run["final"]["of_load"]["val_loss"] for run in pair] for pair in zip(ours, runs, strict=True)]
            differences = [ours - theirs for ours, theirs in losses]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(f"  loss over the many tokens, {title} minus {other}: {numbers(differences, 4)}, error {error:.4f}")
    if name == "muon":
        ratios = []
        for one, other in zip(*columns.values(), strict=True):
            tokens, loss = one["validation"][-1]
            reached = tokens_to(other["validation"], loss)
            ratios.append(tokens / reached if reached else 0.0)
        print(f"  tokens to AdamW's final loss, AdamW's over Muon's (0: not reached): {numbers(ratios, 2)}")


def cached(model: ModelConfig) -> int:
    """Return the size of the cache for one token, in bytes, in bfloat16."""
    return list(summary.cache_bytes(model).values())[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=("muon", "dense", "balance", "pair", "speed", "show"))
    parser.add_argument("--data", nargs="+", default=["builtin"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/recipe.json"))
    args = parser.parse_args()
    series = Series(args)
    if "show" in args.plans:
        if len(args.plans) > 1:
            parser.error("show takes no other plan")
        series.do = lambda wanted: [series.results["runs"][run.name] for run in wanted]  # type: ignore[method-assign]
        args.plans = ["muon", "dense", "balance", "pair"]
    for name in args.plans:
        if name == "speed":
            series.results["speed"] = speed()
            series.write()
            continue
        try:
            plan = series.plan(name)
            flat = series.do([run for runs in plan.values() for run in runs])
        except KeyError as absent:
            print(f"\n{name}: {absent} has not been run", file=sys.stderr)
            continue
        results = iter(flat)
        show(name, {title: [next(results) for _ in runs] for title, runs in plan.items()})


if __name__ == "__main__":
    main()
