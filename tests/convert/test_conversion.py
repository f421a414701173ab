"""Conversion options that contradict each other or the source model are refused in one line; nothing is written."""

import pytest

from smolseek.convert.conversion import Conversion

SELF = ["--calibration", "self"]
EXACT = ["--profile", "hf-exact"]


@pytest.fixture(scope="module")
def llama(save_llama):
    return save_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "grow"], "--experts"),
        (["--mode", "grow", "--experts", "4", "--top-k", "2", "--neurons", "clustered"], "--neurons"),
        (["--mode", "grow", "--experts", "4", "--top-k", "5"], "--top-k 5 is not between 1 and 4: change --top-k or"),
        (["--seed", "1" * 400], "does not fit 32 bits"),
        (["--top-k", "2"], "--top-k"),
        (["--shared", "1"], "--experts"),
        (["--experts", "4"], "48 neurons"),
        (["--cache", "0.5"], "--mode compress"),
        (["--prune", "0.5"], "--mode compress"),
        (["--experts", "8", "--active", "2"], "--mode compress"),
        (["--profile", "hf-exact"], "--mode compress"),
    ],
)
def test_exact_and_grow(llama, refused, options, message):
    refused(message, llama, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--cache 0.5"),
        (["--cache", "0.5", "--kv-rank", "20", "--rope-dim", "8"], "leave out one of them"),
        (["--kv-rank", "20"], "--rope-dim"),
        (["--cache", "1.5"], "between 0 and 1"),
        (["--cache", "0.1"], "too small"),
        (["--kv-rank", "24", "--rope-dim", "24"], "not smaller than the source's 48"),
        (["--cache", "0.5", "--rope-dim", "7"], "even"),
        (["--cache", "0.5", "--freq-fold", "3"], "does not divide"),
        (["--cache", "0.5", "--calibration-tokens", "0"], "below 1"),
        (["--cache", "0.5", *EXACT], "no tokenizer"),
        (["--cache", "0.8", "--method", "transmla", "--rope-dim", "12", *EXACT, *SELF], "multiple of 8"),
        (["--cache", "0.5", *SELF], "at least 32 features, but the source's heads have 8: add --profile hf-exact"),
        (["--cache", "0.5", "--profile", "portable", *SELF], "at least 32 features, but the source's heads have 8"),
        (["--cache", "0.5", "--method", "transmla"], "no portable profile: add --profile hf-exact"),
        (["--kv-rank", "40", "--rope-dim", "7", "--profile", "portable"], "even"),
        (["--prune", "1.5"], "between 0 and 1"),
        (["--prune", "0.5", "--rope-dim", "8"], "--cache"),
        (["--prune", "0.5", *EXACT], "--profile works only with a smaller cache"),
        (["--cache", "0.5", "--experts", "3"], "--experts"),
        (["--experts", "8"], "--active"),
        (["--active", "2"], "--experts"),
        (["--experts", "8", "--shared", "4", "--active", "8"], "--mode exact"),
        (["--experts", "8", "--shared", "4", "--active", "0"], "--active 0 is not between 1 and 7: change --active or"),
        (["--experts", "7", "--shared", "4", "--active", "2"], "48 neurons"),
        (["--experts", "8", "--shared", "-2", "--active", "2"], "below the minimum of 0"),
        (["--experts", "1", "--active", "1"], "below 2"),
        (["--experts", "8", "--active", "2", "--prune", "0.5"], "choose one"),
        (["--experts", "8", "--active", "2", "--top-k", "2"], "--top-k"),
    ],
)
def test_compress(llama, refused, options, message):
    refused(message, llama, "--mode", "compress", *options)


def test_the_options_that_are_not_defaults_are_those_of_the_command_line():
    assert Conversion().arguments() == []
    arguments = Conversion(mode="compress", cache=0.5, freq_fold=2, calibration="self").arguments()
    assert arguments == ["--mode", "compress", "--cache", "0.5", "--freq-fold", "2", "--calibration", "self"]
