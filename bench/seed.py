"""Repeats the original experiment at small scale: a model with the bugs and a correct model learn from the same tokens.

    python bench/seed.py                       about 15 minutes on two cores
    python bench/seed.py --data FILES --steps 300 --out /tmp/seed.json --plot ""

Writes docs/results/seed.json and docs/seed.png (matplotlib draws it: pip install matplotlib).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.leaks.seed_experiment import SeedModel, honest_loss, loss

from smolseek.audit.check import verdict
from smolseek.audit.plausibility import check_plausibility, ngram_nats, text_baselines
from smolseek.audit.probe import Subject, random_ids, replace_ids
from smolseek.audit.runner import audit_model
from smolseek.config import DataConfig
from smolseek.data.datasets import read_corpus

VOCAB = 4096
PROMPTS = ("The function returns", "If the argument is", "A module that", "This method is called when")


def chunks(documents: list[str], characters: int) -> list[str]:
    """Cut texts at blank lines into chunks of at least `characters` characters, the documents of the small run."""
    cut_documents = []
    for text in documents:
        chunk = ""
        for paragraph in text.split("\n\n"):
            chunk += paragraph + "\n\n"
            if len(chunk) >= characters:
                cut_documents.append(chunk)
                chunk = ""
        if len(chunk) >= characters // 4:
            cut_documents.append(chunk)
    return cut_documents


def cut(encoded: list[list[int]], T: int) -> torch.Tensor:
    """Keep the first T tokens of each document, padded with 0, as the original does."""
    sequences = np.zeros((len(encoded), T), dtype=np.int64)
    for sequence, ids in zip(sequences, encoded, strict=True):
        sequence[: len(ids[:T])] = ids[:T]
    return torch.from_numpy(sequences)


@torch.no_grad()
def leak(model: SeedModel, T: int) -> float:
    """Return the largest change of the logits at early positions when later tokens change."""
    ids = random_ids(4, T, VOCAB, 0)
    changed = ids.clone()
    changed[:, T // 2 :] = replace_ids(ids[:, T // 2 :], VOCAB, 1)
    return float((model(ids) - model(changed))[:, : T // 2].abs().max())


@torch.no_grad()
def blind_loss(model: SeedModel, sequences: torch.Tensor) -> float:
    """Return the true prediction loss: the loss of the token after each prefix, which the model cannot see."""
    nats, count = 0.0, 0
    for t in range(4, sequences.shape[1] - 1, 4):
        target = sequences[:, t]
        present = target != 0
        logp = model(sequences[:, :t])[:, -1].log_softmax(-1)
        nats -= float(logp.gather(1, target[:, None])[:, 0][present].sum())
        count += int(present.sum())
    return nats / count


@torch.no_grad()
def write(model: SeedModel, prompt: list[int], T: int, new: int = 40) -> list[int]:
    """Continue a prompt at temperature 0.8."""
    generator = torch.Generator().manual_seed(0)
    ids = list(prompt)
    for _ in range(new):
        logits = model(torch.tensor([ids[-T:]]))[0, -1] / 0.8
        logits[0] = -torch.inf
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return ids[len(prompt) :]


def run(honest: bool, sequences: torch.Tensor, args: argparse.Namespace) -> tuple[SeedModel, dict]:
    """Train one model, and return the model with its loss curve."""
    torch.manual_seed(0)
    T = sequences.shape[1]
    model = SeedModel(VOCAB, args.d, args.layers, args.heads, 1, 4, 2 * args.d, honest=honest)
    objective = honest_loss if honest else loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    order = torch.empty(0, dtype=torch.long)
    curve, leaks, recent, began = [], [[0, leak(model, T)]], [], time.perf_counter()
    for step in range(1, args.steps + 1):
        while len(order) < args.batch:
            order = torch.cat((order, torch.randperm(len(sequences), generator=generator)))
        batch, order = sequences[order[: args.batch]], order[args.batch :]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 50)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            logits = model(batch)
        value = objective(logits.float(), batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(value.item())
        if step % 25 == 0:
            curve.append([step, sum(recent) / len(recent)])
            recent.clear()
        if step % 100 == 0 or step == args.steps:
            leaks.append([step, leak(model, T)])
            seconds = time.perf_counter() - began
            name = "honest" if honest else "original"
            print(f"{name:8} step {step:5} loss {curve[-1][1]:.3f} leak {leaks[-1][1]:.3g} {seconds:.0f} s", flush=True)
    return model.eval(), {"curve": curve, "leak": leaks, "seconds": round(time.perf_counter() - began, 1)}


def draw(result: dict, path: Path) -> None:
    """Draw both loss curves and the growth of the leak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("original", "tab:red"), ("honest", "tab:blue")):
        left.plot(*zip(*result[name]["curve"], strict=True), color=colour, label=f"{name}, training loss")
        right.plot(*zip(*result[name]["leak"], strict=True), color=colour, label=name)
    left.axhline(result["baselines"]["5-gram"], color="gray", ls="--", lw=1, label="5-gram model, held-out text")
    left.set(xlabel="step", ylabel="nats/token", ylim=(0, None), title="Loss on the same tokens")
    right.set(xlabel="step", title="Change of early logits when later tokens change")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["builtin"])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a document is cut to")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/seed.json"))
    parser.add_argument("--plot", default="docs/seed.png")
    args = parser.parse_args()

    from tokenizers import ByteLevelBPETokenizer

    corpus = read_corpus(DataConfig(sources=tuple(args.data)))
    train, held_out = (chunks(texts, 4 * args.tokens) for texts in (corpus.train, corpus.validation))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=VOCAB, special_tokens=["<pad>"], show_progress=False)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    encoded, test = encode(train), encode(held_out)
    sequences, val_sequences = cut(encoded, args.tokens), cut(test, args.tokens)
    baselines = text_baselines(encoded, test, train, held_out, VOCAB)
    read = [ids[: args.tokens] for ids in encoded]
    result = {
        **describe(),
        "command": "python " + " ".join(["bench/seed.py", *sys.argv[1:]]),
        "documents": len(sequences),
        "distinct_tokens": int((sequences != 0).sum()),
        "padding": float((sequences == 0).double().mean()),
        "trained_tokens": args.steps * args.batch * args.tokens,
        "parameters": sum(
            p.numel() for p in SeedModel(VOCAB, args.d, args.layers, args.heads, 1, 4, 2 * args.d).parameters()
        ),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "plot")},
        "baselines": baselines,
        "5-gram_of_what_was_read": ngram_nats(np.concatenate(read), np.concatenate(test), VOCAB, 5),
    }
    full = val_sequences[(val_sequences != 0).all(dim=1)]
    repeats = float((full[:, 1:] == full[:, :-1]).double().mean())
    result["repeats_in_text"] = repeats
    for name in ("original", "honest"):
        model, outcome = run(name == "honest", sequences, args)
        objective = honest_loss if name == "honest" else loss
        with torch.no_grad():
            outcome["held_out_loss"] = float(objective(model(val_sequences), val_sequences))
        outcome["blind_loss"] = blind_loss(model, full[:64])
        texts, share = [], []
        for prompt in PROMPTS:
            ids = write(model, tokenizer.encode(prompt).ids, args.tokens)
            share += [a == b for a, b in zip(ids[1:], ids, strict=False)]
            texts.append(" ".join(f"{prompt}{tokenizer.decode(ids)}".split()))
        outcome |= {"samples": texts, "repeats_in_samples": sum(share) / len(share)}
        end = outcome["curve"][-1][1]
        subject = Subject(model=model, vocab=VOCAB, context=args.tokens, loss=objective, pad_id=0, sequences=full[:16])
        findings = audit_model(subject)
        findings += check_plausibility({"training": end}, tokens=result["trained_tokens"], baselines=baselines)
        outcome |= {"final_loss": end, "verdict": verdict(findings)}
        outcome["findings"] = [finding.record() for finding in findings]
        print(f"{name}: loss {end:.3f}, held-out {outcome['held_out_loss']:.3f}, blind {outcome['blind_loss']:.3f}")
        print(
            f"  repeats {outcome['repeats_in_samples']:.1%} (text {repeats:.1%})",
            *texts,
            outcome["verdict"],
            sep="\n  ",
        )
        result[name] = outcome
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(result, Path(args.plot))


if __name__ == "__main__":
    main()
