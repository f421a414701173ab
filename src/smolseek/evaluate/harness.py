"""Tasks of lm-eval (the Language Model Evaluation Harness) on our models, with its standard settings.

Needs the extra `eval`. Shapes: B requests, T tokens of the longest, D hidden_size, C tokens of a continuation,
V vocab_size.
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
from smolseek.errors import SmolseekError, nearest
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.text import TextStream
from smolseek.storage.hf_folder import LoadedModel, load_model
from smolseek.tokenizer import require_known

_Request = tuple[Any, list[int], list[int]]
"""The texts or None, the tokens of the context, those of the continuation."""


class NativeLM(TemplateLM):
    """Our model as lm-eval wants it: texts in, log-likelihoods or texts out."""

    def __init__(self, loaded: LoadedModel, batch_size: int = 8) -> None:
        """Raise SmolseekError if the model has no tokenizer."""
        super().__init__()
        if loaded.tokenizer is None:
            raise SmolseekError(f"{loaded.path} has no tokenizer to read the tasks with: put its tokenizer.json there")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.max_length, self.batch_size = loaded.config.max_position_embeddings, batch_size
        self._ends = [i for i in (loaded.tokenizer.eos_token_id, *loaded.config.eos_ids) if i is not None]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ends[0] if self._ends else 0

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(string, **given)
        require_known(max(ids, default=0), self.tokenizer, self.model.config.vocab_size)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the model was taught."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        """Return for each request the log-likelihood of its continuation, and whether greedy decoding writes it."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        device, head_VD = self.model.lm_head.weight.device, self.model.lm_head.weight
        with console.progress(len(order), "scoring") as bar:
            for begin in range(0, len(order), self.batch_size):
                numbers = order[begin : begin + self.batch_size]
                rows = [([*requests[n][1], *requests[n][2]])[-self.max_length - 1 :] for n in numbers]
                # Padded on the right: nothing before it sees that.
                ids_BT = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
                for row, ids in enumerate(rows):
                    ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                hidden_BTD = self.model.hidden(ids_BT.to(device)).hidden_BTD
                for row, (number, ids) in enumerate(zip(numbers, rows, strict=True)):
                    C = min(len(requests[number][2]), len(ids) - 1)
                    targets_C = torch.tensor(ids[len(ids) - C :], device=device)
                    logits_CV = (hidden_BTD[row, len(ids) - 1 - C : len(ids) - 1] @ head_VD.T).float()
                    logp_C = logits_CV.log_softmax(dim=-1).gather(1, targets_C[:, None])
                    found[number] = float(logp_C.sum()), bool((logits_CV.argmax(dim=-1) == targets_C).all())
                bar.update(begin + len(numbers))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's context."""
        windows: list[_Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs = [utils.make_disjoint_window(pair) for pair in rolling]
            windows += [(None, *pair) for pair in pairs]
            counts.append(len(pairs))
        scored = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop text, greedily unless the task samples."""
        texts = []
        with console.progress(len(requests), "writing") as bar:
            for done, (context, given) in enumerate((request.args for request in requests), 1):
                texts.append(self._written(context, normalize_gen_kwargs(given, 256)))
                bar.update(done)
        return texts

    def _written(self, context: str, settings: Any) -> str:
        stops = [stop for stop in settings["until"] if stop]
        length = min(settings["max_gen_toks"], self.max_length - 1)
        prompt = self.tok_encode(context)[-(self.max_length - length) :] or [self.prefix_token_id]
        sampling = SamplingParams(temperature=float(settings.get("temperature", 0.0)))
        generator = Generator(self.model, [prompt], sampling, length, stop_ids=self._ends)
        return TextStream(generator, self.tokenizer, stops).finish()[0]


def evaluate_tasks(
    target: str,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    task_folders: Sequence[str] = (),
    dtype: str = "float32",
) -> dict[str, dict[str, float]]:
    """Return lm-eval's metrics of the model `target` by task, then by metric.

    Args:
        target: a model, as `load_model` takes it.
        tasks: names of lm-eval's tasks, or of tasks in `task_folders`.
        fewshot: examples before each question; None leaves them to the task.
        limit: questions of a task, at most; None asks all.
        batch_size: requests that are scored at a time.
        task_folders: folders of tasks of your own (lm-eval's YAML files).
        dtype: number format of the weights.

    Raises:
        SmolseekError: for a model that cannot be opened, an unknown task, or a task's data that are not to be had.
    """
    manager = TaskManager(include_path=list(task_folders) or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            known = nearest(name, manager.all_tasks)
            raise SmolseekError(f"lm-eval knows no task {name!r}{known}: lm-eval ls tasks lists them")
    for folder in task_folders:
        if not Path(folder).is_dir():
            raise SmolseekError(f"--task-folders {folder} is no folder: give one that holds lm-eval's YAML files")
    model = NativeLM(load_model(target, dtype=dtype), batch_size)
    try:
        found = simple_evaluate(
            model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SmolseekError(f"the data of {', '.join(tasks)} are not to be had ({reason[:200]}): try again") from None
    assert found is not None
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


def report(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the metrics as lines of text, each with its standard error where there is one."""
    width = max(map(len, found))
    lines = []
    for task, metrics in found.items():
        for name, value in metrics.items():
            base, _, filtered = name.partition(",")
            if base.endswith("_stderr") or name == "sample_len":
                continue
            error = metrics.get(f"{base}_stderr{',' + filtered if filtered else ''}")
            lines.append(f"{task:<{width}}  {name:<12} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return lines
