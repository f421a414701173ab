"""A checkpoint exists completely or not at all, and every damaged byte is detected."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
import transformers
from old_folders import make_old_checkpoint

from smolseek import files
from smolseek.config import DataConfig, ModelConfig, TrainConfig
from smolseek.errors import SmolseekError
from smolseek.model.local_shards import full_tensors
from smolseek.model.transformer import new_model
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.checkpoint import CheckpointWriter, load_state
from smolseek.storage.hf_folder import load_model, load_weights, read_config
from smolseek.storage.manifest import newest_valid, training_folder, verify
from smolseek.storage.weights import file_tensors

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    max_position_embeddings=32,
    initializer_range=0.1,
)
IDS = torch.arange(20)[None]
TENSORS = {
    "moment/a": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "rng": torch.get_rng_state(),
    "step": torch.tensor(7.0),
    "count": torch.tensor([2**40, -1]),
    "empty": torch.zeros(0, 3),
    "strided": torch.arange(10)[::2],
    "transposed": torch.randn(3, 4).T,
    "byte": torch.tensor(3, dtype=torch.uint8),
}
STATE = {"progress": {"step": 7, "loss": 1.5}, "data": {"epoch": 0, "at": [1, 2]}}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig(model=MODEL, run=str(run.path), seq_len=16, data=DataConfig()), resume=False)
    return run


def save(run, step=7, seed=0, layout="new", config=MODEL):
    writer, model = CheckpointWriter(run, step), new_model(config, seed)
    assert writer.begin() is None
    writer.write_shard(dict(file_tensors(config, full_tensors(model))), TENSORS)
    writer.finish(config, {"special_tokens_map.json": b"{}"}, STATE)
    if layout == "old":
        make_old_checkpoint(run.checkpoint_path(step))
    return run.checkpoint_path(step)


def names(path):
    """The files of a checkpoint."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


both_layouts = pytest.mark.parametrize("layout", ["new", "old"])


@both_layouts
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"latent_norm": False}])
def test_a_saved_checkpoint_loads_unchanged(run, layout, changes):
    config = dataclasses.replace(MODEL, **changes)
    path = save(run, layout=layout, config=config)
    assert path == run.checkpoint_path(7) and path.name == "step-000007"
    assert verify(path) is None and newest_valid(run) == (path, [])
    tensors, state = load_state(path)
    assert state == STATE and set(tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name
    assert read_config(path) == config
    other = new_model(config, 1)
    load_weights(other, path)
    with torch.no_grad():
        expected = new_model(config, 0)(IDS)
        assert torch.equal(other(IDS), expected)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path)(IDS).logits
    assert (theirs - expected).abs().max() <= 2e-5


def test_only_files_of_the_model_are_beside_the_folder_of_the_training(run):
    path = save(run)
    assert [name for name in names(path) if "/" not in name] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
    ]
    assert [name for name in names(path) if "/" in name] == [
        "training/manifest.json",
        "training/training_state.json",
        "training/training_state.safetensors",
    ]


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(run):
    with pytest.raises(SmolseekError, match="holds no checkpoint"):
        load_model(run.path)
    for step in (900_000, 2_000_000, 1_000_000):
        save(run, step, seed=step)
    assert load_model(run.path).path == run.checkpoint_path(2_000_000)
    file = run.checkpoint_path(2_000_000) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert load_model(run.path).path == run.checkpoint_path(1_000_000)
    path, skipped = newest_valid(run)
    assert path == run.checkpoint_path(1_000_000)
    assert [(p.name, "model.safetensors is truncated" in why) for p, why in skipped] == [("step-2000000", True)]
    with pytest.raises(SmolseekError, match=r"step-2000000 is damaged \(model\.safetensors is truncated"):
        load_model(run.checkpoint_path(2_000_000))
    assert read_config(run.path) == MODEL


@both_layouts
def test_every_flipped_bit_is_found_and_named_and_the_previous_checkpoint_is_used(run, layout):
    before = save(run, step=5)
    path = save(run, layout=layout)
    files = names(path)
    assert len(files) == 7
    generator = torch.Generator().manual_seed(0)
    for name in files:
        original = (path / name).read_bytes()
        places = torch.randint(0, len(original), (12,), generator=generator).tolist()
        for place in [0, len(original) - 1, *places]:
            damaged = bytearray(original)
            damaged[place] ^= 1 << (place % 8)
            (path / name).write_bytes(damaged)
            used, [(skipped, reason)] = newest_valid(run)
            assert (used, skipped) == (before, path) and reason.startswith(f"{name} "), (name, place)
        (path / name).write_bytes(original + b" ")
        assert str(verify(path)).startswith(f"{name} is altered")
        (path / name).unlink()
        assert verify(path) == f"{name} is missing"
        (path / name).write_bytes(original)
        assert newest_valid(run) == (path, [])


@both_layouts
def test_truncated_files_are_named(run, layout):
    path = save(run, layout=layout)
    for name in names(path):
        original = (path / name).read_bytes()
        for size in (0, len(original) // 2, len(original) - 1):
            (path / name).write_bytes(original[:size])
            assert str(verify(path)).startswith(f"{name} "), (name, size)
        (path / name).write_bytes(original)


@both_layouts
def test_for_inference_the_training_state_is_not_read(run, layout):
    path = save(run, layout=layout)
    file = training_folder(path) / "training_state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert verify(path, model_only=True) is None and "training_state" in str(verify(path))
    load_model(path)
    file.unlink()
    assert verify(path, model_only=True) == f"{file.relative_to(path)} is missing"
    with pytest.raises(SmolseekError, match=r"holds no training_state\.safetensors"):
        load_state(path)


def test_an_unfinished_checkpoint_is_ignored_and_deleted(run):
    good = save(run, 5)
    part = run.checkpoints / ".tmp-step-000009"
    shutil.copytree(good, part)
    assert newest_valid(run) == (good, [])
    save(run, 6)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000005", "step-000006"]


def test_a_step_reached_again_replaces_the_damaged_checkpoint(run):
    path = save(run, 5, seed=0)
    (path / "config.json").write_text("{")
    save(run, 5, seed=1)
    assert verify(path) is None
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000005"]
    with torch.no_grad():
        assert torch.equal(load_model(path).model(IDS), new_model(MODEL, 1)(IDS))


def test_a_full_disk_leaves_the_older_checkpoints(run, monkeypatch):
    good = save(run, 5)

    def full(path, entries):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", full)
    with pytest.raises(SmolseekError, match=r"step 6 .*No space left on device.*free some space") as caught:
        save(run, 6)
    assert "\n" not in str(caught.value)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000005"]
    assert newest_valid(run) == (good, [])


def test_a_crash_at_any_write_leaves_a_valid_newest(run, monkeypatch):
    """Stop a save after each of its disk syncs. There is always a complete checkpoint."""
    save(run, 5)
    real, left = files.sync, [0]

    class Crash(BaseException):
        pass

    def sync(path):
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # after a crash, nothing is cleaned up
    survived = syncs = 0
    while not survived:
        left[0], syncs = syncs, syncs + 1
        try:
            save(run, 6)
            survived += 1
        except Crash:
            pass
        path, skipped = newest_valid(run)
        assert path is not None and not skipped
        monkeypatch.undo()
        for name in [p for p in run.checkpoints.iterdir() if p.name != "step-000005"]:
            shutil.rmtree(name)
        monkeypatch.setattr(files, "sync", sync)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert syncs > 8


def test_tensors_lie_at_multiples_of_their_item_size(run):
    file = save(run) / "training" / "training_state.safetensors"
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        start = opened.tell()
    assert header.pop("__metadata__") == {"format": "pt"} and set(header) == set(TENSORS)
    for name, entry in header.items():
        assert (start + entry["data_offsets"][0]) % TENSORS[name].itemsize == 0, name


def test_the_manifest_lists_every_file(run):
    path = save(run)
    listed = json.loads((path / "training" / "manifest.json").read_text())["files"]
    assert set(listed) == set(names(path)) - {"training/manifest.json"}
