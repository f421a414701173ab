"""Text samples of a run: continuations of five fixed prompts."""

from typing import Any

from smolseek.console import Log
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.text import TextStream
from smolseek.model.transformer import CausalLM
from smolseek.run_folder import RunFolder

PROMPTS = (
    "The quantum mechanics of particles describes how",
    "In computer science, neural networks can learn to",
    "The theory of relativity fundamentally changed our understanding of",
    "Machine learning algorithms have revolutionized",
    "The structure of DNA contains information about",
)


def write_samples(
    run: RunFolder, step: int, model: CausalLM, tokenizer: Any, max_tokens: int, seed: int, log: Log
) -> None:
    """Continue each of the five prompts by up to `max_tokens` tokens, and add the texts to samples.md, metrics and log.

    Sampling has its own random generator, so training is not affected. The generator always gets the same seed, so two
    samples of a prompt differ only because the model has changed.
    """
    sampling = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=seed)
    texts = []
    lines = [f"## Step {step}", "", "Temperature 0.8, top-k 50, top-p 0.95.", ""]
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) >= model.config.max_position_embeddings:
            ids = ids[-(model.config.max_position_embeddings // 2) :]  # so that a long prompt does not end the run
        generator = Generator(model, [ids], sampling, max_tokens, stop_ids=model.config.eos_ids)
        text = TextStream(generator, tokenizer).finish()[0].strip()
        lines += [f"**{prompt}** {text}", ""]
        texts.append((prompt, text))
        log.say(f"> {prompt} ... {' '.join(text.split())}")
    run.append_samples("\n".join(lines) + "\n")
    run.append_metrics({"step": step, "samples": texts})
