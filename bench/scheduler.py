"""Measures the tokens per second of a scheduler with 1, 8 and 32 sequences, and what a second turn of a chat reads.

    OMP_NUM_THREADS=2 python bench/scheduler.py smollm2 deepseek_159m                about two minutes on two cores
    OMP_NUM_THREADS=1 python bench/scheduler.py smollm2 deepseek_159m --cpu-time     for a machine with other work

A model is a name that `smolseek.load` takes, or a preset with random weights in bfloat16. Each sequence has a prompt of
128 tokens and writes greedily. Reading the prompts is not counted. The batch sizes alternate within each round, and the
table shows the median and the range of the rounds.
"""

import argparse
import statistics
import time

import torch
from machine import describe

from smolseek.api import load
from smolseek.generate.request import Finished, Request
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.scheduler import Scheduler
from smolseek.model.transformer import new_model
from smolseek.presets import preset


def request(prompt: list[int], tokens: int, temperature: float) -> Request:
    sampling = SamplingParams(temperature=temperature)
    return Request(prompt=tuple(prompt), sampling=sampling, max_tokens=tokens, stop_ids=frozenset())


def tokens_per_second(model, batch: int, tokens: int, temperature: float, clock) -> float:
    """Return the speed while all sequences write."""
    scheduler = Scheduler(model, max_sequences=batch, cache_tokens=batch * 512, fill_cache=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(batch):
        ids = torch.randint(1000, (128,), generator=generator).tolist()
        scheduler.submit(request(ids, tokens + 2 * batch, temperature))
    while scheduler.stats.completion_tokens < 1 or scheduler.stats.waiting or scheduler.stats.running < batch:
        scheduler.step()
    for _ in range(2):  # the last prompt
        scheduler.step()
    begun, before = clock(), scheduler.stats.completion_tokens
    for _ in range(tokens):
        scheduler.step()
    return (scheduler.stats.completion_tokens - before) / (clock() - begun)


def turns(model, history: int, clock) -> tuple[float, float]:
    """Return the seconds to the first token of a chat's first turn, and of its second turn with 20 new tokens."""
    scheduler = Scheduler(model, max_sequences=1, cache_tokens=history + 256, fill_cache=False)
    prompt, seconds = torch.randint(1000, (history,), generator=torch.Generator().manual_seed(1)).tolist(), []
    for _ in range(2):
        scheduler.submit(request(prompt, 80, 0.0))
        begun, first = clock(), None
        while not scheduler.idle:
            for event in scheduler.step():
                first = first or clock() - begun
                prompt += [] if isinstance(event, Finished) else [event.id]
        seconds.append(first)
        prompt += list(range(5, 25))
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--history", type=int, default=1500)
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU time of the process, with one thread")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(describe(), f"threads {torch.get_num_threads()}")
    for name in args.models:
        try:
            model = new_model(preset(name)).bfloat16()
        except ValueError:
            model = load(name, dtype="bfloat16").model
        speeds = {batch: [] for batch in args.batch}
        for _ in range(args.rounds):
            for batch, values in speeds.items():
                values.append(tokens_per_second(model, batch, args.tokens, args.temperature, clock))
        for batch, values in speeds.items():
            print(f"{name} {batch:3} sequences {statistics.median(values):7.1f} tokens/s", end=" ")
            print(f"({min(values):.1f}-{max(values):.1f})", flush=True)
        first, second = turns(model, args.history, clock)
        print(
            f"{name} first token after {args.history} tokens {first:.3f} s, in the next turn {second:.3f} s", flush=True
        )


if __name__ == "__main__":
    main()
