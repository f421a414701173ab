"""What a scheduler takes and reports: requests, new tokens, and the ends of sequences."""

from dataclasses import dataclass
from typing import NamedTuple

from smolseek.errors import SmolseekError
from smolseek.generate.engine import StopReason
from smolseek.generate.paged_decoder import Experts
from smolseek.generate.sampling import SamplingParams

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens with their log-probabilities in nats, the likeliest first."""

SAMPLING_FAILED = "sampling has failed with an unexpected error: the log has the reason"


class QueueFull(SmolseekError):
    """As many requests wait as the scheduler allows."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids."""
    sampling: SamplingParams
    """How tokens are sampled."""
    max_tokens: int | None
    """Largest number of new tokens; None continues to the end of the context."""
    stop_ids: frozenset[int]
    """Tokens that end the sequence; they are not reported."""
    top_logprobs: int = 0
    """Number of the likeliest tokens that are reported with each token."""
    prompt_logprobs: bool = False
    """Report the log-probabilities of the prompt's tokens with the first new token. The complete prompt is read."""
    routing: bool = False
    """Report the experts of each token."""
    deadline: float | None = None
    """Value of `time.monotonic()` at which the sequence ends with the stop reason "time"."""


class NewToken(NamedTuple):
    """A new token of a sequence."""

    sequence: int
    """The number that `submit` returned."""
    id: int
    logprob: float
    """Log-probability in nats, before penalties, temperature and filters."""
    top: Top = ()
    """The `Request.top_logprobs` likeliest tokens."""
    experts: Experts | None = None
    """With `Request.routing`: the experts of the token before, whose logits gave this token."""
    prompt_experts: tuple[Experts, ...] | None = None
    """With `Request.routing` and the first new token: the experts of the last prompt tokens, those that were read."""
    prompt_logprobs: tuple[tuple[float, Top], ...] | None = None
    """With `Request.prompt_logprobs` and the first new token: logprob and top of each prompt token but the first."""


class Finished(NamedTuple):
    """The end of a sequence."""

    sequence: int
    reason: StopReason
    prompt_tokens: int
    cached_tokens: int
    """Number of prompt tokens that were in the prefix cache."""
    completion_tokens: int
    """Number of new tokens, without the stop token."""
    error: str | None = None
    """The message in one line, for the stop reason "error"."""
    prompt_experts: tuple[Experts, ...] | None = None
    """As in `NewToken`, for a sequence without new tokens."""
    prompt_logprobs: tuple[tuple[float, Top], ...] | None = None
    """As in `NewToken`, for a sequence without new tokens."""


@dataclass
class Stats:
    """What a scheduler does now, and what it has done so far."""

    running: int
    """Number of sequences whose prompt is read or that are written."""
    waiting: int
    """Number of requests in the queue."""
    cache_tokens_used: int
    """Number of tokens that the pages of running sequences can hold."""
    cache_tokens_reusable: int
    """Number of tokens in the prefix cache that no running sequence uses."""
    cache_tokens_total: int
    """Number of tokens that the cache can hold."""
    prompt_tokens: int
    """Number of prompt tokens of all sequences so far."""
    cached_tokens: int
    """Number of prompt tokens so far that were in the prefix cache."""
    completion_tokens: int
    """Number of new tokens so far."""
