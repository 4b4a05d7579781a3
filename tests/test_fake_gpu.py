"""Training on a GPU, without one: a fake GPU, its data types, and copies to it."""
import importlib

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import stackgan

CASES = {"dfgan": "--size 32 --nf 2", "gan_cls": "--ngf 4 --ndf 2",
         "stackgan 1": "--ngf 4 --ndf 2 --size 128 --num-residual 1 --stage 1",
         "stackgan 2": "--ngf 4 --ndf 2 --size 128 --num-residual 1 --stage 2"}

@pytest.fixture
def train(home, tmp_path, monkeypatch):
    """Return a function that runs the command line of a script."""
    def train(case, device):
        importlib.import_module(case.split()[0]).main([
            "--data", "own", "--epochs", "1", "--batch-size", "4", "--device", device,
            "--out-dir", str(tmp_path), *CASES[case].split()])

    monkeypatch.chdir(home)
    monkeypatch.setattr(common.signal, "signal", lambda *args: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    torch.set_num_threads(1)    # two threads take minutes where the cores are busy
    return train

class FakeGPU(TorchDispatchMode):
    """Tensors on "cuda" are fake, those on "cpu" real. Records copies between them, and the types
    of tensors that convolutions on the GPU get."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_gpu = "cuda" in str(kwargs.get("device"))
        if "_to_copy" in str(function) and "device" in kwargs and args[0].is_cuda != to_gpu:
            self.copies.append(kwargs.get("non_blocking"))
            args = (self.fake.from_tensor(args[0]),)
        if not to_gpu and FakeTensor not in types:
            return function(*args, **kwargs)
        if "convolution" in str(function):
            self.types |= {x.dtype for x in args[:2]}
        with self.fake:
            return function(*args, **kwargs)

@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU: see gpu.py")
@pytest.mark.skipif(torch.__version__ < "2.14", reason="tried with torch 2.14; fails in 2.11")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("case, memory, copies", [
    *((case, 2**36, 1) for case in CASES), ("gan_cls", 0, 2)])
def test_training_on_a_fake_gpu(case, memory, copies, train, monkeypatch):
    """Convolutions run in bf16. A step copies the numbers of a batch, and its images if the memory
    is too small for all, without waiting. Gradients are 0: the engine of autograd needs a GPU."""
    def update(bar, n=1):
        if bar.label[:5] in ("train", "Stage"):
            steps.append(gpu.copies)
            gpu.copies = []
            if len(steps) == 4:
                raise StopIteration

    def zero_grad(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)

    if case == "stackgan 2":
        train("stackgan 1", "cpu")
        train_stage = stackgan.train
        monkeypatch.setattr(stackgan, "train", lambda *args: train_stage(*args[:2], 2))
    gpu, steps, pinned = FakeGPU(), [], []
    gpu.fake, gpu.copies, gpu.types = FakeTensorMode(), [], set()
    with gpu.fake:    # without a GPU, this replaces the guard of devices, which needs a driver
        embed, get = common.embed_captions, common.get_text_encoder
    for owner, name, value in (
            (torch.cuda, "is_available", lambda: True), (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_bf16_supported", lambda *args: True),
            (torch.cuda, "mem_get_info", lambda device: (0, memory)),
            (torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x),
            (torch.autograd, "_engine_run_backward", lambda outputs, grads, keep, create, inputs=(),
             *args, **kwargs: [torch.zeros_like(x) for x in inputs]),
            (torch.optim.Adam, "zero_grad", zero_grad), (data.Progress, "update", update),
            (common, "get_text_encoder", lambda *args, rms: get(*args[:3], "cpu", *args[4:])),
            (common, "embed_captions", lambda *args: embed(*args).to("cuda")),
            (FakeTensorMode, "__deepcopy__", lambda mode, memo: mode)):
        monkeypatch.setattr(owner, name, value, raising=False)
    with gpu, pytest.raises(StopIteration):
        train(case, "cuda")
    assert steps[1:] == [[True] * copies] * 3 and len(pinned) == 4 * copies
    assert gpu.types == {torch.bfloat16}
