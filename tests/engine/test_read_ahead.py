"""Reading ahead: the next decoder layer is read while one computes, with the same bits, bounded memory and today's errors."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

from conftest import CALIBRATION, DEVICE, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import ahead, open_checkpoint
from expertsmith.checkpoint.reader import Checkpoint
from expertsmith.engine import Batch, Walk, devices, load_model, read_ahead
from expertsmith.engine.read_ahead import Arena
from expertsmith.errors import UserError
from quantise import WIDE, quantise_checkpoint

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
LAYERS = {"num_hidden_layers": 4}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def batches() -> list[Batch]:
    return [Batch(IDS, torch.ones_like(IDS, dtype=torch.bool), "a", [0, 1])]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A Mixtral of four decoder layers, so that some are read ahead."""
    return save_tiny("mixtral", tmp_path_factory.mktemp("deep") / "model", **LAYERS)


@pytest.fixture
def streamed(deep):
    return load_model(open_checkpoint(deep), families()["mixtral"], memory="stream", device="cpu")


@pytest.fixture
def counted(monkeypatch) -> list[tuple[str, bool]]:
    """What is read from disk: (tensor, whether in the thread)."""
    found: list[tuple[str, bool]] = []
    plain = Checkpoint.read

    def read(self, name, *rows):
        found.append((name, threading.current_thread() is not threading.main_thread()))
        return plain(self, name, *rows)

    monkeypatch.setattr(Checkpoint, "read", read)
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", None),
        ("qwen3_moe", None),
        ("deepseek_v3", None),
        ("gpt_oss", None),
        ("mixtral", "fp8_block"),
        ("deepseek_v3", "int4_asymmetric"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_statistics_are_the_same_bytes(family, kind, data, tmp_path, monkeypatch, counted):
    source = save_tiny(family, tmp_path / "plain", **(WIDE[family] if kind else {}), **LAYERS)
    if kind:
        pytest.importorskip("compressed_tensors")
        quantise_checkpoint(source, tmp_path / "model", kind)
        source = tmp_path / "model"
    api.calibrate(source, data, tmp_path / "ahead", memory="stream", **{**CALIBRATION, "device": "cpu"})
    held, early = {name for name, _ in counted}, {name for name, in_thread in counted if in_thread}
    for layer in range(4):  # all that is held of a layer was read in the thread
        mine = {name for name in held if f"layers.{layer}." in name}
        assert mine
        assert mine <= early
    counted.clear()
    monkeypatch.setattr(read_ahead, "SHARE", 0.0)
    api.calibrate(source, data, tmp_path / "plainly", memory="stream", **{**CALIBRATION, "device": "cpu"})
    assert not any(in_thread for _, in_thread in counted)
    files = sorted(path.name for path in (tmp_path / "ahead").glob("layer_*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert (tmp_path / "ahead" / file).read_bytes() == (tmp_path / "plainly" / file).read_bytes()
    assert threads() == []


def test_every_tensor_is_read_once(streamed, counted):
    with Walk(streamed, batches()) as walk:
        list(walk.layers())
    names = [name for name, _ in counted]
    assert len(names) == len(set(names))


def test_the_next_layer_is_read_while_one_computes(streamed, monkeypatch):
    """Each layer's forward waits until the thread reads the next layer, and the thread reads it only when the forward has begun."""
    computes = [threading.Event() for _ in range(4)]
    reads = [threading.Event() for _ in range(4)]
    plain = Checkpoint.read

    def read(self, name, *rows):
        layer = int(name.split(".")[2])
        assert layer == 0 or computes[layer - 1].wait(30)
        reads[layer].set()
        return plain(self, name, *rows)

    monkeypatch.setattr(ahead._Reader, "read", read)

    def before(layer, number, batch):
        computes[layer].set()
        if layer < 3:
            assert reads[layer + 1].wait(30)

    with Walk(streamed, batches(), before) as walk:
        assert list(walk.layers()) == [0, 1, 2, 3]


def test_no_layer_beyond_the_last_is_read(streamed, counted):
    with Walk(streamed, batches()) as walk:
        list(walk.layers(until=1))
    assert not any("layers.2." in name for name, _ in counted)


def test_a_walk_that_ends_early_leaves_no_thread(streamed, monkeypatch):
    """Its reader stops at the next block of bytes, and nothing is held."""
    monkeypatch.setattr(ahead, "BLOCK", 64)
    blocks, begun = [], threading.Event()
    plain = ahead.fill

    def fill(view, info, start):
        blocks.append(info.name)
        begun.set()
        plain(view, info, start)

    monkeypatch.setattr(ahead, "fill", fill)

    def before(layer, number, batch):
        assert begun.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Walk(streamed, batches(), before) as walk:
        list(walk.layers())
    assert threads() == []
    assert streamed._reads._reads._reads == {}
    after = len(blocks)
    with Walk(streamed, batches()) as walk:  # it can be used again
        assert list(walk.layers()) == [0, 1, 2, 3]
    assert len(blocks) > after


def test_at_most_one_more_layer_is_held(streamed, monkeypatch):
    """Two pieces of memory, each for one layer, serve all layers in turn, and are gone afterwards."""
    made: list[weakref.ref[read_ahead.Arena]] = []

    def arena(nbytes, pinned):
        found = Arena(nbytes, pinned)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(read_ahead, "Arena", arena)
    largest = max(streamed._reads._size(layer) for layer in range(4))
    places = []

    def before(layer, number, batch):
        for future in streamed._reads._reads._reads.values():
            future.result()
        begins = [found.begin for ref in made if (found := ref()) is not None]
        assert len(begins) <= 2
        held = [p.data_ptr() for p in streamed.layers[layer].parameters()]
        mine = [begin for begin in begins if all(begin <= place < begin + largest for place in held)]
        assert len(mine) == 1  # every parameter lies where it was read
        places.append(mine[0])

    with Walk(streamed, batches(), before) as walk:
        assert list(walk.layers()) == [0, 1, 2, 3]
    assert places == [places[0], places[1]] * 2
    with pytest.raises(RuntimeError, match="early"), Walk(streamed, batches(), end_early) as walk:
        list(walk.layers())
    gc.collect()
    assert [ref() for ref in made] == [None] * len(made)
    assert threads() == []


def test_memory_in_use_is_not_used_again(streamed, deep):
    """Weights that someone keeps stay as they are, though later layers are read."""
    kept = []

    def before(layer, number, batch):
        kept.append([p.detach() for p in streamed.layers[layer].parameters()])

    with Walk(streamed, batches(), before) as walk:
        list(walk.layers())
    resident = load_model(open_checkpoint(deep), families()["mixtral"], device="cpu")
    for layer, values in zip(resident.layers, kept, strict=True):
        for found, expected in zip(values, layer.parameters(), strict=True):
            assert torch.equal(found, expected)


def end_early(layer, number, batch):
    raise RuntimeError("early")


def test_shared_parts_are_held_until_their_last_use(deep):
    checkpoint = open_checkpoint(deep)
    name, other = list(checkpoint.tensors)[:2]
    _, reads = ahead.early(checkpoint)
    reads.begin([name, name, other])
    assert torch.equal(reads.read(name), checkpoint.read(name))
    reads.used([name])
    assert set(reads._reads) == {name, other}
    assert torch.equal(reads.read(name, 1, 3), checkpoint.read(name, 1, 3))
    reads.used([name])
    assert set(reads._reads) == {other}
    reads.stop()
    assert threads() == []


def test_a_file_that_was_cut_is_an_error_as_without_reading_ahead(deep, tmp_path, monkeypatch):
    """The file is cut while the first layer computes, so that the third cannot be read."""

    def refused(folder: Path) -> str:
        shutil.copytree(deep, folder)
        model = load_model(open_checkpoint(folder), families()["mixtral"], memory="stream", device="cpu")
        infos = [info for name, info in model.checkpoint.tensors.items() if "layers.2." in name]

        def cut(layer, number, batch):
            if layer == 0:
                with open(infos[0].file, "r+b") as stream:
                    stream.truncate(min(info.start for info in infos) + 10)

        done = []
        with pytest.raises(UserError) as error, Walk(model, batches(), cut) as walk:
            done.extend(walk.layers())
        assert done == [0, 1]
        return str(error.value)

    early = refused(tmp_path / "early")
    assert threads() == []
    monkeypatch.setattr(read_ahead, "SHARE", 0.0)
    assert early == refused(tmp_path / "plainly")
    assert "ended in the middle of model.layers.2" in early


@pytest.mark.parametrize(("name", "error"), [("_lent", MemoryError), ("Arena", OSError)])
def test_memory_that_is_too_short_for_two_layers_is_enough_for_one(name, error, streamed, monkeypatch):
    """The thread finds no memory, or there is none for it: the layers are read when they are needed."""

    def none(*args, **kwargs):
        raise error

    monkeypatch.setattr(read_ahead, name, none)
    with Walk(streamed, batches()) as walk:
        assert list(walk.layers()) == [0, 1, 2, 3]
    assert threads() == []


def test_a_layer_that_does_not_fit_beside_another_is_not_read_ahead(streamed, counted, monkeypatch):
    monkeypatch.setattr(read_ahead, "free_memory", lambda device: 4 * streamed._reads._size(1) - 4)
    with Walk(streamed, batches()) as walk:
        list(walk.layers())
    assert not any(in_thread for _, in_thread in counted)
    monkeypatch.setattr(read_ahead, "free_memory", lambda device: 4 * streamed._reads._size(1))
    with Walk(streamed, batches()) as walk:
        list(walk.layers())
    assert any(in_thread for _, in_thread in counted)


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_a_control_group_holds_count_as_free(version, tmp_path, monkeypatch):
    """Of 1000 bytes 900 are used, 600 of them by files read long ago: 700 are free."""
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, number in zip(names, (1000, 900), strict=True):
        (folder / name).write_text(f"{number}\n")
    held = "inactive_file 600\n" if version == 2 else "inactive_file 5\ntotal_inactive_file 600\n"
    (folder / "memory.stat").write_text(f"anon 300\n{held}")
    monkeypatch.setattr(devices, "GROUP", tmp_path)
    assert devices._free_memory() == 700


def test_an_arena_is_free_when_no_tensor_uses_it():
    memory = read_ahead.Arena(256, pinned=False)
    assert memory.is_free()
    tensor = torch.frombuffer(memory.lend(64, 8), dtype=torch.uint8)
    assert tensor.data_ptr() == memory.begin + 64
    assert memory.begin % 64 == 0
    part = tensor[3:]
    del tensor
    assert not memory.is_free()
    del part
    assert memory.is_free()
    part = torch.frombuffer(memory.lend(64, 8), dtype=torch.uint8).fill_(7)
    memory.close()
    assert part.tolist() == [7] * 8  # it stays as long as it is used


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, or a pretended one")
@pytest.mark.parametrize("room", [2**34, 0])
def test_on_a_gpu(room, deep, counted, monkeypatch):
    """The bytes are copied to it in the reading thread if it has room for them, and the result is the same."""
    found, sent = [], []
    plain = read_ahead.Copies.send

    def send(self, value):
        sent.append(threading.current_thread() is not threading.main_thread())
        return plain(self, value)

    monkeypatch.setattr(read_ahead.Copies, "send", send)
    free = read_ahead.free_memory
    monkeypatch.setattr(read_ahead, "free_memory", lambda device: free(device) if device.type == "cpu" else room)
    for share in (read_ahead.SHARE, 0.0):
        monkeypatch.setattr(read_ahead, "SHARE", share)
        counted.clear()
        sent.clear()
        model = load_model(open_checkpoint(deep), families()["mixtral"], memory="stream", device=DEVICE)
        with Walk(model, batches()) as walk:
            list(walk.layers())
            found.append(next(walk.outputs()).logits)
        assert any(in_thread for _, in_thread in counted) == (share > 0)
        assert all(sent)
        assert bool(sent) == (share > 0 and room > 0)
    assert torch.equal(*found)
