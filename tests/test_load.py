"""Models that are never loaded whole."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import memopt
from memopt import InputError, MemoptError, NothingToDo
from memopt.passes import Checkpoint

PROGRAM = """
import sys, threading, time
import psutil, torch
process = psutil.Process()
base = process.memory_info().rss
import memopt
from tests.test_load import Net
peak, going = [0], True

def watch():
    while going:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)

path, dim, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
thread = threading.Thread(target=watch)
thread.start()
model = memopt.load_swapped(lambda: Net(dim, depth), path).model
with torch.no_grad():
    for _ in range(2):
        result = model(torch.ones(2, dim))
going = False
thread.join()
torch.save(result, path + ".result")
print(peak[0] - base)
"""


class Net(nn.Module):
    """Tied weights, a table that is no part of the file, statistics that are."""

    def __init__(self, dim=8, depth=3):
        super().__init__()
        self.table = nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)) for _ in range(depth)
        )
        self.norm, self.head = nn.BatchNorm1d(dim), nn.Linear(dim, dim, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.arange(dim) / dim, persistent=False)

    def forward(self, x):
        x = self.table(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x)) * self.scale


def build(seed=0, dim=8, depth=3):
    torch.manual_seed(seed)
    model = Net(dim, depth)
    model.norm.running_mean.normal_()
    return model.eval()


def save(model, path, **changes):
    state = {name: value for name, value in model.state_dict().items() if name != "head.weight"} | changes
    save_file({name: value.contiguous() for name, value in state.items() if value is not None}, path)
    return path


def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", [{}, {"level": "leaf"}, {"resident": 2, "prefetch": 0}], ids=str)
def test_the_same_model(tmp_path, how):
    plain = build()
    path = save(plain, tmp_path / "model.safetensors")
    made = []

    def factory():
        made.append(Net())
        assert all(p.device.type == "meta" for p in made[0].parameters())
        return made[0]

    handle = memopt.load_swapped(factory, path, **how)
    assert handle.model is made[0]
    assert not handle.model.training
    assert torch.equal(handle.model(x()), plain(x()))
    assert handle.model.head.weight is handle.model.table.weight
    for (name, a), b in zip(handle.model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    handle.undo()
    assert torch.equal(handle.model(x()), plain(x()))


def test_training_leaves_the_file_alone(tmp_path):
    plain, path = build(), tmp_path / "model.safetensors"
    before = save(plain, path).read_bytes()
    model = memopt.load_swapped(Net, path, passes=[Checkpoint()]).model
    for m in (plain, model):
        m.train()
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        for _ in range(5):
            m(x()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert path.read_bytes() == before


def test_several_files(tmp_path):
    plain = build()
    state = {name: value for name, value in plain.state_dict().items() if name != "head.weight"}
    names = list(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, inside in parts.items():
        save_file({name: state[name] for name in inside}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, inside in parts.items() for name in inside}}))
    assert torch.equal(memopt.load_swapped(Net, index).model(x()), plain(x()))
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(InputError, match="names files outside its folder"):
        memopt.load_swapped(Net, index)
    index.write_text("{}")
    with pytest.raises(InputError, match="is not the index of safetensors files: 'weight_map'"):
        memopt.load_swapped(Net, index)


def test_other_files_are_refused(tmp_path):
    model, path = build(), tmp_path / "model.safetensors"
    for changes, message in (
        ({"blocks.1.0.bias": None}, "has no blocks.1.0.bias: it is not of this Net"),
        ({"norm.running_var": None}, "has no norm.running_var: it is not of this Net"),
        ({"table.weight": None}, "has no table.weight: it is not of this Net"),
        ({"more": torch.ones(1)}, "has unknown more: it is not of this Net"),
        (
            {"blocks.0.1.bias": torch.ones(3)},
            r"blocks.0.1.bias is \[3\] torch.float32 in .*, and \[8\] torch.float32 in Net",
        ),
        ({"norm.weight": torch.ones(8).half()}, r"norm.weight is \[8\] torch.float16 in .*, and \[8\] torch.float32"),
    ):
        save(model, path, **changes)
        with pytest.raises(InputError, match=message):
            memopt.load_swapped(Net, path)
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/none: No such file"):
        memopt.load_swapped(Net, tmp_path / "none")
    whole = save(model, path).read_bytes()
    for content in (b"", b"1234567", whole[:100], whole[:-4], b"\xff" * 100, (50).to_bytes(8, "little") + b"x" * 50):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is not a safetensors file|cannot map .* into memory"):
            memopt.load_swapped(Net, path)
    save(model, path)
    with pytest.raises(InputError, match=r"needs a function that makes a torch.nn.Module, not a int"):
        memopt.load_swapped(lambda: 3, path)
    one = tmp_path / "one.safetensors"
    save_file(nn.Linear(2, 2).state_dict(), one)
    with pytest.raises(NothingToDo, match="needs repeated blocks"):
        memopt.load_swapped(lambda: nn.Linear(2, 2), one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table.weight": {"data_offsets": [0, 256]}}, "do not lie one after another"),
        ({"table.weight": {"dtype": "U16"}}, "torch has no type for U16"),
        ({"table.weight": {"shape": [-1, -64]}}, "cannot lie in bytes"),
        ({"table.weight": {"shape": "many"}}, "is not a safetensors file"),
        ({"table.weight": None}, "is not a safetensors file"),
    ],
)
def test_headers_that_lie(tmp_path, changes, message):
    path = save(build(), tmp_path / "model.safetensors")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, change in changes.items():
        header[name] = header[name] | change if change else change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(InputError, match=message):
        memopt.load_swapped(Net, path)
    text = b'{"a":' * 100_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="is not a safetensors file"):
        memopt.load_swapped(Net, path)
    entry = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + entry + b"," + entry + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="a name stands in its header twice"):
        memopt.load_swapped(Net, path)


def test_tied_weights_that_differ_in_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: value.clone() for name, value in build().state_dict().items()}, path)
    assert torch.equal(memopt.load_swapped(Net, path).model(x()), build()(x()))
    save_file(build().state_dict() | {"head.weight": torch.zeros(8, 8)}, path)
    with pytest.raises(InputError, match=r"has different values for table.weight and head.weight, which are one"):
        memopt.load_swapped(Net, path)


def test_a_file_that_changes_is_told_and_one_that_goes_stays(tmp_path):
    plain, path = build(), tmp_path / "model.safetensors"
    model = memopt.load_swapped(Net, save(plain, path)).model
    expected = model(x())
    os.utime(path, ns=(1, 1))
    with pytest.raises(MemoptError, match=f"{path} was changed while weights in it were in use"):
        model(x())
    os.truncate(path, 100)
    with pytest.raises(MemoptError, match=f"{path} was changed while weights in it were in use"):
        model(x())
    model = memopt.load_swapped(Net, save(plain, path)).model
    path.unlink()
    assert torch.equal(model(x()), expected)


def test_a_large_model_takes_little_memory(tmp_path, root):
    dim, depth = 2048, 4
    path = tmp_path / "model.safetensors"
    save(build(dim=dim, depth=depth), path)
    block, outside = 4 * (8 * dim * dim + 5 * dim), 4 * dim * dim
    assert path.stat().st_size > depth * block
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(dim), str(depth)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = build(dim=dim, depth=depth)(torch.ones(2, dim))
    torch.testing.assert_close(torch.load(f"{path}.result", weights_only=True), expected)
    assert int(run.stdout) < 2 * block + outside + 90 * 2**20 < 0.75 * depth * block
