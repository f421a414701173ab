import numpy as np
import pytest

from smolseek.audit.plausibility import ngram_nats, xz_nats


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 7, 500)
    history = [1, 2, 3, 4]

    def p(token: int) -> float:
        # The total cross-entropy with this last token, minus the total cross-entropy of the tokens before it.
        text = np.array([*history, token])
        return float(np.exp(-(ngram_nats(train, text, 9, order) * 5 - ngram_nats(train, text[:4], 9, order) * 4)))

    assert sum(p(token) for token in range(9)) == pytest.approx(1.0)


def test_unigram_is_witten_bell_by_hand() -> None:
    # 4 tokens with 2 distinct ids: p(0) = (3 + 2/4) / 6, p(1) = (1 + 2/4) / 6, p(2) = (0 + 2/4) / 6
    nats = ngram_nats(np.array([0, 0, 0, 1]), np.array([0, 1, 2]), 4, 1)
    assert nats == pytest.approx(-np.mean(np.log(np.array([3.5, 1.5, 0.5]) / 6)))


def test_a_longer_history_helps_where_text_repeats() -> None:
    train = np.tile(np.random.default_rng(1).permutation(50), 40)
    assert ngram_nats(train, train[:200], 50, 5) < 0.2 < 3.5 < ngram_nats(train, train[:200], 50, 1)


def test_xz_knows_text_that_it_has_seen() -> None:
    text = " ".join(map(str, np.random.default_rng(2).integers(0, 1000, 2000)))
    assert xz_nats(text, text, 2000) < 0.2 < 3 < xz_nats("", text, 2000)
