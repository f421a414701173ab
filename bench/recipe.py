"""Compares recipes for training small models: optimizers, experts and a dense model, balancing.

    python bench/recipe.py recipe --data TOKENS --val FILE    the default against AdamW and against Muon with one rate
    python bench/recipe.py dense --data TOKENS --val FILE     experts against a Llama of equal active parameters
    python bench/recipe.py balance --data TOKENS --val FILE   loss-free balancing against none
    python bench/recipe.py width --data TOKENS --val FILE     the rates of the default at a model three times as large
    python bench/recipe.py pair --data TOKENS --val FILE      the experiment's two models, scaled down
    python bench/recipe.py speed                              tokens/s of the arms, alternating
    python bench/recipe.py show                               the tables of all plans

An arm is a model with a recipe. Its learning rate is chosen in a sweep with seed 100, of 1,500 steps for the earlier
recipes and of 500 for the default, and then reported with the seeds 1, 2 and 3. A best rate at the edge of its sweep is
not accepted: the program names the rate that must be added to `ARMS`. TOKENS is a folder that `smolseek prepare` wrote,
FILE is validation text. Each run is written to docs/results/recipe.json when it ends, and is not repeated, so that an
interrupted series can continue. With `--jobs 2` two models are trained at a time, with one thread each.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from machine import describe, seconds

from smolseek.config import BalanceConfig, DataConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig, to_dict
from smolseek.model import summary
from smolseek.presets import preset
from smolseek.run_folder import RunFolder

CHOOSING, REPORTED = 100, (1, 2, 3)
"""The seed with which rates are chosen, and the seeds of the reported figures."""
STEPS, BATCH_SIZE = 1500, 4
EVAL_TOKENS = 65_536
LOAD_TOKENS = 262_144
"""Number of tokens for MaxVio. On 65,536 tokens, even perfectly balanced experts have a MaxVio of about 0.05."""


def moe(**options: Any) -> ModelConfig:
    """Return a smaller `deepseek_159m` with the same 16 routed experts (3 used per token) and 1 shared expert."""
    small = replace(preset("tiny"), n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=160)
    return replace(small, **options)


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


def wide() -> ModelConfig:
    """Return `moe` with twice the width and a half more layers: more than three times the parameters."""
    return moe(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=64,
        moe_intermediate_size=256,
    )


SHAPES = {"moe": moe, "seed": seed, "dense": dense, "wide": wide}

ONE_RATE = {"embedding_factor": 1.0, "head_factor": 1.0, "vector_factor": 1.0}
BEFORE = {
    "schedule": {"kind": "cosine", "final_factor": 0.1},
    "balance": {"gamma": 1e-3, "averaging_fraction": 0.0},
    "zero_init": False,
}
"""The defaults before this recipe, besides the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model with a recipe, and the learning rates of its sweep in ascending order."""

    shape: str = "moe"
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of `TrainConfig` that differ from its defaults."""
    rates: tuple[float, ...]
    steps: int = STEPS
    """Steps of the sweep."""


ARMS = {
    "AdamW, one rate": Arm(options={"optim": {"kind": "adamw", **ONE_RATE}, **BEFORE}, rates=(2e-3, 4e-3, 8e-3)),
    "Muon, one rate": Arm(
        options={
            "optim": {"kind": "muon", "update_scale": "rms", "momentum_warmup": 0, "betas": (0.9, 0.95), **ONE_RATE},
            **BEFORE,
        },
        rates=(4e-3, 8e-3, 16e-3),
    ),
    "default": Arm(rates=(15e-3, 30e-3, 60e-3), steps=STEPS // 3),
    "dense": Arm(shape="dense", rates=(15e-3, 30e-3, 60e-3), steps=STEPS // 3),
    "wide": Arm(shape="wide", rates=(15e-3, 30e-3, 60e-3), steps=STEPS // 3),
    "seed": Arm(shape="seed", rates=(15e-3, 30e-3, 60e-3), steps=STEPS // 3),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    arm: str
    lr: float
    seed: int
    steps: int = STEPS
    gamma: float | None = None

    @property
    def name(self) -> str:
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        return f"{self.arm}, rate {self.lr:g}, seed {self.seed}, {self.steps} steps{gamma}"

    def settings(self) -> dict:
        """Return the configuration without its paths, in JSON types."""
        settings = json.loads(json.dumps(to_dict(self.config("", "", ""))))
        return {key: value for key, value in settings.items() if key not in ("run", "data")}

    def config(self, data: str, validation: str, folder: str) -> TrainConfig:
        arm = ARMS[self.arm]
        options = dict(arm.options)
        optim, schedule, balance = (options.pop(part, {}) for part in ("optim", "schedule", "balance"))
        if self.gamma is not None:
            balance = balance | {"gamma": self.gamma}
        return TrainConfig(
            model=SHAPES[arm.shape](),
            run=f"{folder}/run",
            data=DataConfig(sources=(data,), val_sources=(validation,)),
            optim=OptimConfig(**optim, lr=self.lr).resolved(),
            schedule=ScheduleConfig(**{"warmup_steps": 100, **schedule}),
            balance=BalanceConfig(**balance),
            steps=self.steps,
            batch_size=BATCH_SIZE,
            seed=self.seed,
            log_every=50,
            eval_every=250,
            eval_tokens=EVAL_TOKENS,
            save_every=self.steps,
            sample_tokens=0,
            **options,
        )


def execute(run: Run, data: str, validation: str, threads: int) -> dict:
    """Train, and return the results for the tables."""
    import torch

    from smolseek.storage.hf_folder import load_model
    from smolseek.train.device import autocast
    from smolseek.train.evaluate import evaluate
    from smolseek.train.loop import train
    from smolseek.train.setup import open_datasets

    torch.set_num_threads(threads)
    about = describe()  # the commit whose code is imported
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(data, validation, folder)
        model = load_model(str(train(config))).model
        records = RunFolder(Path(config.run)).read_metrics()
    more = {}
    if run.seed in REPORTED:
        datasets = open_datasets(replace(config, eval_tokens=LOAD_TOKENS))
        context = autocast("auto", torch.device("cpu"))
        record = evaluate(model, datasets.val_sequences, datasets.val_bytes, 4, context)
        assert record is not None
        record |= {"tokens": datasets.val_sequences[:, 1:].numel()}
        more["all"] = {key: value for key, value in record.items() if key != "val_load"}
    logged = [r for r in records if "tokens_per_second" in r]
    return {
        **vars(run),
        "validation": [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r],
        "training": [(r["tokens"], r["loss"]) for r in logged],
        **more,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in logged),
        "threads": threads,
        "settings": run.settings(),
        **about,
    }


def speed(grad_accum: int, rounds: int = 7, steps: int = 3) -> dict[str, list[float]]:
    """Return tokens/s of the arms, whose steps of `grad_accum` x 4 x 256 tokens alternate."""
    import torch

    from smolseek.memory import keep_freed_memory
    from smolseek.model.transformer import new_model
    from smolseek.train.device import autocast
    from smolseek.train.loss import losses
    from smolseek.train.optim import make_optimizer

    keep_freed_memory()
    spent: dict[str, list[float]] = {name: [] for name in ("AdamW, one rate", "default", "dense")}
    models = {name: new_model(SHAPES[ARMS[name].shape]()).train() for name in spent}
    optimizers = {
        name: make_optimizer(model, OptimConfig(**ARMS[name].options.get("optim", {})))
        for name, model in models.items()
    }
    for _ in range(rounds + 1):
        for name, model in models.items():

            def some(model=model, optimizer=optimizers[name]):
                for _ in range(steps):
                    for _ in range(grad_accum):
                        sequences = torch.randint(model.config.vocab_size, (BATCH_SIZE, 257))
                        with autocast("auto", torch.device("cpu")):
                            loss = losses(model, sequences, accumulate=True).total
                        (loss / grad_accum).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            spent[name].append(seconds(some))
    tokens = steps * grad_accum * BATCH_SIZE * 256
    return {name: sorted(tokens / one for one in times[1:]) for name, times in spent.items()}


class Series:
    """The runs in the results file. Missing runs are trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"runs": {}}

    def do(self, wanted: Iterable[Run]) -> list[dict]:
        """Train the missing runs, and return all runs.

        A run that fails, because it diverges for example, does not stop the others.
        """
        wanted = list(wanted)
        missing = [run for run in wanted if run.name not in self.results["runs"]]
        for run in wanted:
            stored = self.results["runs"].get(run.name)
            if stored is not None and stored["settings"] != run.settings():
                raise SystemExit(f"{run.name}: was run with other settings; delete it from {self.args.out}")
        if missing and self.args.data is None:
            raise SystemExit(f"{missing[0].name}: has not been run; give --data and --val")
        threads = max(1, (multiprocessing.cpu_count() or 1) // self.args.jobs)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
            running: dict[Future, Run] = {
                pool.submit(execute, run, self.args.data, self.args.val, threads): run for run in missing
            }
            failures = []
            for done in as_completed(running):
                if error := done.exception():
                    failures.append(f"{running[done].name}: {error}")
                    continue
                self.results["runs"][running[done].name] = done.result()
                self.write()
        if failures:
            raise SystemExit("\n".join(failures))
        return [self.results["runs"][run.name] for run in wanted]

    def write(self) -> None:
        """Write the file, one line per run."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(run)}" for key, run in self.results["runs"].items())
        rate = json.dumps(self.results.get("speed"))
        self.args.out.write_text(f'{{"speed": {rate}, "runs": {{\n{lines}\n}}}}\n', encoding="utf-8")

    def time_of_a_step(self, name: str, grad_accum: int) -> float:
        """Return the median time of a step of an arm, in seconds for 1,024 tokens."""
        rates = (self.results.get("speed") or {}).get(f"accumulation {grad_accum}", {})
        if name not in rates:
            raise SystemExit("the speeds have not been measured: run the plan `speed` first")
        return 1024 / statistics.median(rates[name])

    def best(self, name: str) -> float:
        """Return the rate of an arm with the lowest loss in its sweep.

        Raises:
            SystemExit: if this rate is the lowest or the highest of the sweep.
        """
        arm = ARMS[name]
        runs = [Run(arm=name, lr=lr, seed=CHOOSING, steps=arm.steps) for lr in arm.rates]
        return best_rate(name, {run.lr: final(result) for run, result in zip(runs, self.do(runs), strict=True)})

    def report(self, name: str, **options: Any) -> list[dict]:
        """Return the runs of an arm with its best rate and the reported seeds."""
        lr = self.best(name)
        return self.do(Run(arm=name, lr=lr, seed=seed, **options) for seed in REPORTED)


def best_rate(name: str, losses: dict[float, float]) -> float:
    """Return the rate with the lowest loss and print the sweep; refuse a rate at the edge of the sweep."""
    best = min(losses, key=lambda lr: losses[lr])
    swept = ", ".join(f"{lr:g}: {losses[lr]:.4f}" for lr in sorted(losses))
    print(f"\n{name}: sweep with seed {CHOOSING}: {swept}; best {best:g}")
    for edge, beyond in ((min(losses), best / 2), (max(losses), best * 2)):
        if best == edge:
            raise SystemExit(
                f"{name}: the best rate {best:g} lies at the edge of its sweep and may not be the best one: "
                f"add {beyond:g} to the rates of this arm"
            )
    return best


def final(run: dict) -> float:
    """Return the validation loss after the last step."""
    return run["validation"][-1][1]


def tokens_to(curve: list, loss: float) -> float | None:
    """Return after how many tokens a validation curve first reaches `loss`, by linear interpolation, or None."""
    for (t0, l0), (t1, l1) in itertools.pairwise(curve):
        if l1 <= loss:
            return t0 + (t1 - t0) * min(1.0, max(0.0, (l0 - loss) / (l0 - l1))) if l0 > l1 else t1
    return None


def spread(values: list[float], digits: int = 4) -> str:
    """Return the values with their mean and its standard error."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return " ".join(f"{v:.{digits}f}" for v in values) + f"  mean {mean:.{digits}f}, standard error {error:.{digits}f}"


def show(title: str, runs: list[dict]) -> None:
    """Print the reported figures of an arm."""
    model = SHAPES[ARMS[runs[0]["arm"]].shape]()
    size = summary.count(model)
    cached = list(summary.cache_bytes(model).values())[-1]
    print(f"  {title}: rate {runs[0]['lr']:g}, {runs[0]['steps']} steps; {size.total:,} parameters, {size.active:,} ")
    print(f"    active, {cached} cached bytes a token; seeds {' '.join(str(run['seed']) for run in runs)}")
    print(f"    validation loss       {spread([final(run) for run in runs])}")
    many = [run["all"] for run in runs]
    print(f"    over {many[0]['tokens']:,} tokens   {spread([one['val_loss'] for one in many])}")
    if "val_maxvio" in many[0]:
        print(f"    MaxVio (global)       {spread([one['val_maxvio'] for one in many], 3)}")


def difference(title: str, ours: list[dict], theirs: list[dict], key: Any = final) -> None:
    """Print the loss of one arm minus that of another, seed by seed."""
    print(f"  {title}: {spread([key(a) - key(b) for a, b in zip(ours, theirs, strict=True)])}")


def recipe(series: Series) -> None:
    for grad_accum in (1, 4):
        ratio = series.time_of_a_step("default", grad_accum) / series.time_of_a_step("AdamW, one rate", grad_accum)
        print(f"  time of a step of {grad_accum} x 4 x 256 tokens, default over AdamW: {ratio:.3f}")
    arms = {name: series.report(name) for name in ("AdamW, one rate", "Muon, one rate", "default")}
    for title, runs in arms.items():
        show(title, runs)
    for other, ratio in (("AdamW, one rate", 1.7), ("AdamW, one rate", 2.0), ("Muon, one rate", 1.2)):
        ratios = []
        for one, new in zip(arms[other], arms["default"], strict=True):
            tokens, loss = one["validation"][-1]
            reached = tokens_to(new["validation"], loss)
            ratios.append(tokens / reached if reached else 0.0)
        print(f"  tokens to the final loss of {other}, its own over those of the default (0: not reached): ")
        print(f"    {spread(ratios, 2) if all(ratios) else ratios}")
        shorter = series.report("default", steps=round(STEPS / ratio))
        show(f"default, {ratio} times fewer tokens", shorter)
        difference(f"default with {ratio} times fewer tokens minus {other}", shorter, arms[other])


def against_dense(series: Series) -> None:
    # The runs make an optimizer step after each micro-batch.
    ratio = series.time_of_a_step("default", 1) / series.time_of_a_step("dense", 1)
    ours, equal = series.report("default"), series.report("dense")
    longer = series.report("dense", steps=round(STEPS * ratio))
    show("experts", ours)
    show("dense, equal tokens", equal)
    show(f"dense, equal time ({ratio:.2f} times the tokens)", longer)
    difference("experts minus dense at equal tokens", ours, equal)
    difference("experts minus dense at equal time", ours, longer)


def balance(series: Series) -> None:
    ours, none = series.report("default"), series.report("default", gamma=0.0)
    show("loss-free", ours)
    show("gamma 0", none)
    difference("loss over all tokens, loss-free minus gamma 0", ours, none, lambda run: run["all"]["val_loss"])


def width(series: Series) -> None:
    """Compare the loss at the rate of the small model with the best one of a larger model."""
    lr, best = series.best("default"), series.best("wide")
    steps = ARMS["wide"].steps
    ours, theirs = series.do(Run(arm="wide", lr=rate, seed=CHOOSING, steps=steps) for rate in (lr, best))
    size = [summary.count(SHAPES[name]()).total for name in ("moe", "wide")]
    print(f"  {size[1]:,} parameters ({size[1] / size[0]:.1f} times as many), {steps} steps, one seed:")
    difference = final(ours) - final(theirs)
    print(f"  loss at the small model's rate {lr:g} minus loss at the best rate {best:g}: {difference:.4f}")


def pair(series: Series) -> None:
    show("deepseek_159m, scaled down", series.report("default"))
    show("seed_159m, scaled down", series.report("seed"))


PLANS = {"recipe": recipe, "dense": against_dense, "balance": balance, "width": width, "pair": pair}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=(*PLANS, "speed", "show"))
    parser.add_argument("--data", help="training text, as for smolseek train --data")
    parser.add_argument("--val", help="validation text")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/recipe.json"))
    args = parser.parse_args()
    if args.data is not None and args.val is None:
        parser.error("--data needs --val")
    series, failed = Series(args), False
    for name in PLANS if "show" in args.plans else args.plans:
        if name == "speed":
            rates = {f"accumulation {grad_accum}": speed(grad_accum) for grad_accum in (1, 4)}
            series.results["speed"] = rates | {"load": os.getloadavg(), **describe()}
            series.write()
            print(json.dumps(rates))
            continue
        print(f"\n== {name}")
        try:
            PLANS[name](series)
        except SystemExit as error:
            failed = True
            print(error, file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
