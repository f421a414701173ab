"""Users' text on the command line: what is trained on, what is left out, and that the log reports both."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZES = "--model.num-hidden-layers 1 --model.hidden-size 16 --seq-len 16 --batch-size 1 --eval-tokens 32"
REST = "--steps 1 --sample-tokens 0 --data.val-fraction 0.2 --tokenizer tok --model.vocab-size 300"


def write_tokenizer(path: Path, pre_tokenizer: pre_tokenizers.PreTokenizer, alphabet: list[str]) -> None:
    """Train a small tokenizer, so that a training run takes less than a second."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["abcdefghijklmnopqrstuvwxyz the old river runs a ."] * 9, trainer)
    if alphabet:
        backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(path)


@pytest.fixture
def train(run_cli, tmp_path: Path, monkeypatch):
    """Return a function that trains one step in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tok", pre_tokenizers.ByteLevel(False), pre_tokenizers.ByteLevel.alphabet())

    def run(*arguments: str):
        return run_cli("train", "tiny", *arguments, *SIZES.split(), *REST.split())

    return run


def data_line(result) -> str:
    assert result.code == 0, result
    return next(line for line in result.out.splitlines() if line.startswith("Data: "))


def lines(name: str, n: int) -> str:
    return "".join(json.dumps({"text": f"{name} {i}. " + "The old river runs. " * 5}) + "\n" for i in range(n))


def test_a_folder_of_everything(train, tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "a.jsonl").write_text(lines("a", 30) + lines("a", 2))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("b", 30).encode()))
    (folder / "c.csv").write_text("id,text\n" + "".join(f'{i},"c {i}, quoted"\n' for i in range(30)))
    (other / "d.jsonl").write_text(lines("d", 30))
    (folder / "other").symlink_to(other)
    (folder / "settings.json").write_text("{}")
    line = data_line(train("--data", "data"))
    training, validation = int(line.split()[1]), int(line.split()[4])
    assert training + validation == 120
    assert "left out: 2 copies of other documents, 1 .json file (name it to have it read); 16 tokens" in line


def test_one_text_file_trains_and_resumes(train, run_cli, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n\n".join(f"Paragraph {i} of the only text." * 3 for i in range(400)))
    line = data_line(train("--data", "one.txt", "--run", "run"))
    assert "1 document cut into parts at paragraph borders, with the last parts for validation" in line
    resumed = run_cli("train", "--run", "run", "--resume")
    assert resumed.code == 0 and "The run is complete" in resumed.out, resumed
    # The audit, too, decides by a part's position in its document. By their text, a third of the parts would be for
    # validation.
    audited = train("--data", "one.txt", "--data.val-fraction", "0.3", "--run", "audited")
    assert audited.code == 0 and "FAIL  data: validation" not in audited.out, audited
    assert "PASS  data: validation never trained on" in run_cli("audit", "audited").out
    # Also with a separate validation text, and with prepared tokens.
    (tmp_path / "other.txt").write_text("Validated on this. " * 30)
    line = data_line(train("--data", "one.txt", "--data.val-sources", "other.txt", "--run", "other"))
    assert "and 1 validation documents; 1 document cut" in line and "of --data.val-fraction" in line
    done = run_cli("prepare", "tokens", "--data", "one.txt", "--tokenizer", "tok")
    assert done.code == 0 and "one.txt: 1 document cut into parts at paragraph borders" in done.out, done
    assert "prepared tokens of one.txt; 1" in data_line(train("--data", "tokens", "--run", "prepared"))


def test_a_run_inside_its_data_folder_resumes(train, run_cli, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a", 60))
    arguments = ["--data", ".", "--run", "runs/a", "--save-every", "1"]
    assert train(*arguments).code == 0
    for path in (tmp_path / "runs/a/checkpoints").iterdir():  # so that the run is not complete
        (path / "training" / "manifest.json").unlink()
        path.rename(path.with_name("broken"))
    resumed = run_cli("train", "--run", "runs/a", "--resume")
    assert resumed.code == 0, resumed


def test_separated_documents_are_offered_and_taken(train, run_cli, tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"Story {i} of a river. " * 20 for i in range(40)))
    offered = train("--data", "stories.txt", "--run", "a")
    assert (
        "contains <|endoftext|> 39 times: to split it there, add --data.document-separator "
        "'<|endoftext|>'" in offered.err
    )
    taken = train("--data", "stories.txt", "--run", "b", "--data.document-separator", "<|endoftext|>")
    line = data_line(taken)
    assert int(line.split()[1]) + int(line.split()[4]) == 40 and "cut" not in line and not taken.err
    assert json.loads((tmp_path / "b/config.json").read_text())["data"]["document_separator"] == "<|endoftext|>"


def test_a_tokenizer_that_cannot_spell_the_text_is_refused(train, run_cli, tmp_path: Path) -> None:
    # A tokenizer without byte tokens and unknown token drops the characters that it does not know.
    write_tokenizer(tmp_path / "tok", pre_tokenizers.Whitespace(), [])
    arguments = ["--data", "a.jsonl", "--run", "run"]
    russian = "\u0441\u0442\u0430\u0440\u0430\u044f \u0440\u0435\u043a\u0430 " * 5
    texts = [f"the old river runs {'x' * i} {russian}" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    refused = train(*arguments)
    assert refused.code == 2 and refused.err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "the tokenizer tok cannot encode" in refused.err and "% of the text's characters ('" in refused.err
    texts = [f"the old river runs a {'abcdefghijklmnopqrst' * (i % 7 + 9)} {i % 7 * 'x'}\u00df" for i in range(60)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{'y' * i}{t}"}) + "\n" for i, t in enumerate(texts))
    )
    assert "% of the characters, which the tokenizer cannot encode" in data_line(train(*arguments))


def test_a_broken_archive_is_one_line(train, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("a", 60).encode())[:-30])
    refused = train("--data", "a.jsonl.gz", "--run", "run")
    assert refused.code == 2 and refused.err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "a.jsonl.gz is not a valid gzip file" in refused.err
