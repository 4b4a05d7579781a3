"""Training on a GPU, checked without one: compiled graphs, a fake GPU with bf16, copies to it."""
import importlib

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import data

STACKGAN = "--ngf 4 --ndf 2 --size 128 --num-residual 1 --stage"
CASES = [("dfgan", "--nf 2 --size 32"), ("gan_cls", "--ngf 4 --ndf 2"),
         ("stackgan", f"{STACKGAN} 1"), ("stackgan", f"{STACKGAN} 2")]


@pytest.fixture
def train(home, tmp_path, monkeypatch):
    """Return a function that runs the command line of a script and returns its checkpoint."""
    def train(script, flags, *more, out_dir="run"):
        importlib.import_module(script).main([
            "--data", "own", "--epochs", "1", "--out-dir", str(tmp_path / out_dir),
            *flags.split(), *more])
        return torch.load(tmp_path / out_dir / "last.pt")

    monkeypatch.chdir(home)
    monkeypatch.setattr(common.signal, "signal", lambda *args: None)
    return train


@pytest.mark.parametrize("script, flags", CASES)
def test_compiled_training(script, flags, train, monkeypatch):
    """No graph breaks, no new graph after the first step, and the results of eager training."""
    def compile(*args, compile=torch.compile, **kwargs):
        return compile(*args, backend="aot_eager", **kwargs)

    def update(bar, n=1):
        graphs.append(counters["stats"]["unique_graphs"])

    results, graphs = [], []
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(data.Progress, "update", update)
    for mode in ("--no-compile", "--compile"):
        for stage in CASES[2:][:flags[-1] == "2"]:    # Stage-II needs Stage-I
            train(*stage, "--batch-size", "8", out_dir=mode)
        counters.clear()
        results.append(train(script, flags, "--batch-size", "8", mode, out_dir=mode))
    assert graphs[-2] == graphs[-1] > 0 and not counters["graph_break"]
    for name in ("history", "G", "D", "ema"):
        torch.testing.assert_close(*(result[name] for result in results))


def run_backward(outputs, grads, keep_graph, create_graph, inputs=(), *_, **flags):
    """Differentiate as the engine of autograd does, which would ask the GPU for its streams."""
    pending, results = {}, {}    # nodes with gradients of their outputs

    def add(node, i, grad):
        if node is not None and grad is not None:
            meta, slots = node._input_metadata[i], pending.setdefault(node, {})
            slots[i] = slots.get(i, 0) + grad.sum_to_size(meta.shape).to(meta.dtype)

    for output, grad in zip(outputs, grads):
        add(output.grad_fn, output.output_nr, grad)
    with torch.set_grad_enabled(create_graph):
        while pending:
            node = max(pending, key=lambda n: -1 if hasattr(n, "variable") else n._sequence_nr())
            slots = pending.pop(node)
            results |= {(node, i): grad for i, grad in slots.items()}
            if not hasattr(node, "variable"):
                below = node(*(slots.get(i) for i in range(len(node._input_metadata))))
                for edge, grad in zip(node.next_functions, below if type(below) is tuple else [below]):
                    add(*edge, grad)
            elif not inputs:
                node.variable.grad = slots[0]
    return [results[tuple(torch.autograd.graph.get_gradient_edge(x))[:2]] for x in inputs]


class FakeGPU(TorchDispatchMode):
    """Tensors on "cuda" are fake, those on "cpu" are real. Records copies between the two."""

    def __init__(self):
        super().__init__()
        self.fake, self.copies, self.dtypes = FakeTensorMode(), [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = "cuda" in str(kwargs.get("device"))
        if "_to_copy" in str(function) and kwargs.get("device") and args[0].is_cuda != on_gpu:
            self.copies.append(kwargs.get("non_blocking"))
            args = (self.fake.from_tensor(args[0]),)
        if "convolution" in str(function):
            self.dtypes |= {x.dtype for x in args[:2]}
        if on_gpu or any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            with self.fake:
                return function(*args, **kwargs)
        return function(*args, **kwargs)


@pytest.mark.parametrize("case, memory, copies", [
    *((case, 2**36, 1) for case in CASES), (CASES[1], 0, 2)])
def test_training_on_a_fake_gpu(case, memory, copies, train, monkeypatch):
    """Convolutions run in bf16. A step waits for nothing: it copies the numbers of a batch, and its
    images if they do not fit into the memory, without blocking."""
    class Stop(Exception):
        pass

    def update(bar, n=1):
        if bar.label == "training":
            steps.append(gpu.copies)
            gpu.copies = []
            if len(steps) == 4:
                raise Stop

    gpu, steps, pinned = FakeGPU(), [], []
    embed, get = common.embed_captions, common.get_text_encoder
    for owner, name, value in (
            (torch.cuda, "is_available", lambda: True), (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_bf16_supported", lambda *args: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "mem_get_info", lambda device: (0, memory)),
            (torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x),
            (torch.autograd, "_engine_run_backward", run_backward),
            (common, "get_text_encoder", lambda kind, dataset, root, device, *rest: get(
                kind, dataset, root, "cpu", *rest)),
            (common, "embed_captions", lambda *args: embed(*args).to("cuda")),
            (data.Progress, "update", update)):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    with gpu, pytest.raises(Stop):
        train(*case, "--device", "cuda", "--no-compile")
    assert steps[1:] == [[True] * copies] * 3 and len(pinned) == 4 * copies
    assert gpu.dtypes == {torch.bfloat16}
