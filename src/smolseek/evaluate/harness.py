"""Tasks of lm-eval (the Language Model Evaluation Harness) on smolseek models, with lm-eval's standard settings.

This module needs the extra `eval`. Shapes: B requests, T tokens of the longest request, D hidden_size, C tokens of a
continuation, V vocab_size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from smolseek import console
from smolseek.device import select
from smolseek.errors import SmolseekError, nearest, reason
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.text import TextStream
from smolseek.storage.hf_folder import LoadedModel, load_model
from smolseek.tokenizer import require_known

_Request = tuple[Any, list[int], list[int]]
"""A request: its two texts or None, the tokens of its context, and the tokens of its continuation."""


class NativeLM(TemplateLM):
    """A smolseek model with the interface that lm-eval needs: log-likelihoods and generated text."""

    def __init__(self, loaded: LoadedModel, batch_size: int = 8) -> None:
        """Raise SmolseekError if the model has no tokenizer."""
        super().__init__()
        if loaded.tokenizer is None:
            raise SmolseekError(
                f"{loaded.path} has no tokenizer, which the tasks need: put its tokenizer.json into the folder"
            )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.max_length, self.batch_size = loaded.config.max_position_embeddings, batch_size
        self._eos_ids = [i for i in (loaded.tokenizer.eos_token_id, *loaded.config.eos_ids) if i is not None]

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._eos_ids[0] if self._eos_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that is put in front of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(string, **options)
        require_known(max(ids, default=0), self.tokenizer, self.model.config.vocab_size)
        return ids

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        """Return for each request the log-likelihood of its continuation, and whether greedy decoding generates it."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        head_VD = self.model.lm_head.weight
        with console.progress(len(order), "scoring") as bar:
            for begin in range(0, len(order), self.batch_size):
                numbers = order[begin : begin + self.batch_size]
                sequences = [([*requests[n][1], *requests[n][2]])[-self.max_length - 1 :] for n in numbers]
                # The sequences are padded on the right, where causal attention ignores the padding.
                ids_BT = torch.zeros(len(sequences), max(map(len, sequences)) - 1, dtype=torch.int64)
                for b, ids in enumerate(sequences):
                    ids_BT[b, : len(ids) - 1] = torch.tensor(ids[:-1])
                hidden_BTD = self.model.hidden(ids_BT.to(head_VD.device)).hidden_BTD
                for b, (number, ids) in enumerate(zip(numbers, sequences, strict=True)):
                    C = min(len(requests[number][2]), len(ids) - 1)
                    targets_C = torch.tensor(ids[len(ids) - C :], device=head_VD.device)
                    logits_CV = (hidden_BTD[b, len(ids) - 1 - C : len(ids) - 1] @ head_VD.T).float()
                    logp_C = logits_CV.log_softmax(dim=-1).gather(1, targets_C[:, None])
                    results[number] = float(logp_C.sum()), bool((logits_CV.argmax(dim=-1) == targets_C).all())
                bar.update(begin + len(numbers))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, which is scored in windows as long as the model's context."""
        texts: list[list[_Request]] = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            texts.append([(None, *utils.make_disjoint_window(window)) for window in windows])
        scores = iter(self._loglikelihood_tokens([window for windows in texts for window in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to a stop string; greedy, unless the task samples."""
        texts = []
        with console.progress(len(requests), "generating") as bar:
            for done, (context, options) in enumerate((request.args for request in requests), 1):
                settings: Any = normalize_gen_kwargs(options, 256)
                length = min(settings["max_gen_toks"], self.max_length - 1)
                prompt = self.tok_encode(context)[-(self.max_length - length) :] or [self.prefix_token_id]
                sampling = SamplingParams(temperature=float(settings.get("temperature", 0.0)))
                generator = Generator(self.model, [prompt], sampling, length, stop_ids=self._eos_ids)
                stops = [stop for stop in settings["until"] if stop]
                texts.append(TextStream(generator, self.tokenizer, stops).finish()[0])
                bar.update(done)
        return texts


def evaluate_tasks(
    target: str,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    task_folders: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Return lm-eval's metrics of the model `target` by task, then by metric.

    Args:
        target: name of a model, as for `load_model`.
        tasks: names of lm-eval's tasks, or of tasks in `task_folders`.
        fewshot: number of examples before each question; None is the default of the task.
        limit: largest number of questions of a task; None for all.
        batch_size: requests per forward pass.
        task_folders: folders with the user's own tasks (lm-eval's YAML files).
        dtype: number format of the weights.
        device: name of the device, as for `select`.

    Raises:
        SmolseekError: if the model cannot be opened, the device is missing, a task is unknown, or the data of a task
            cannot be loaded.
    """
    chosen = str(select(device))
    manager = TaskManager(include_path=list(task_folders) or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            suggestion = nearest(name, manager.all_tasks)
            raise SmolseekError(f"lm-eval has no task {name!r}{suggestion}: list the tasks with lm-eval ls tasks")
    for folder in task_folders:
        if not Path(folder).is_dir():
            raise SmolseekError(f"--task-folders {folder} is not a folder: give a folder with lm-eval's YAML files")
    model = NativeLM(load_model(target, dtype=dtype, device=chosen), batch_size)
    try:
        results = simple_evaluate(
            model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    except OSError as error:
        raise SmolseekError(f"the data of {', '.join(tasks)} cannot be loaded ({reason(error)}): try again") from None
    assert results is not None
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results["results"].items()
    }


def report(results: dict[str, dict[str, float]]) -> list[str]:
    """Return the metrics as lines of text, with their standard errors if there are any."""
    width = max(map(len, results))
    lines = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            base, _, filtered = name.partition(",")
            if base.endswith("_stderr") or name == "sample_len":
                continue
            error = metrics.get(f"{base}_stderr{',' + filtered if filtered else ''}")
            lines.append(f"{task:<{width}}  {name:<12} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return lines
