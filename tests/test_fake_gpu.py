"""Training on a GPU, without one: its tensors have a type and a shape, but no values.

Checked are the types that convolutions compute in, and the copies between CPU and GPU."""
import argparse
import importlib

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common

TINY = {
    "dfgan": "--size 32 --nf 2",
    "gan_cls": "--ngf 4 --ndf 2",
    "stackgan": "--ngf 4 --ndf 2 --size 128 --num-residual 1"}
NUM_STEPS = 4
LARGE = 2**36  # bytes of GPU memory: all images fit
SMALL = 0

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="not on a GPU: run python tests/gpu.py"),
    pytest.mark.skipif(torch.__version__ < "2.14", reason="needs torch 2.14; fails in 2.11"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]


class EnoughSteps(Exception):
    """Ends a training after NUM_STEPS steps."""


class FakeGPU(TorchDispatchMode):
    """Make tensors on "cuda" fake; those on "cpu" stay real.

    copies: for each copy between CPU and GPU, whether it was started without waiting.
    convolution_types: the types of the images and weights of convolutions on the GPU.
    adam_tensors: the learning rates and step counts of Adam."""

    def __init__(self):
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies = []
        self.convolution_types = set()
        self.adam_tensors = []
        with self.fake_mode:
            pass  # without a GPU, this replaces the guard of devices, which needs a driver

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        to_gpu = "cuda" in str(kwargs.get("device"))
        if "_to_copy" in name and "device" in kwargs and args[0].is_cuda != to_gpu:
            self.copies.append(kwargs.get("non_blocking"))
            args = (self.fake_mode.from_tensor(args[0]),)
        if name.startswith("aten.copy_") and args[0].is_cuda != args[1].is_cuda:
            self.copies.append(args[2:] == (True,))  # whether non_blocking
        if not to_gpu and FakeTensor not in types:
            return function(*args, **kwargs)
        if "_fused_adam_" in name:  # has no fake version for learning rates that are tensors
            step_counts = args[5]
            self.adam_tensors += [kwargs["lr"], *step_counts]
            return
        if "convolution" in name:
            self.convolution_types |= {args[0].dtype, args[1].dtype}
        with self.fake_mode:
            return function(*args, **kwargs)


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Return a function that makes PyTorch believe in a GPU with some bytes of memory.

    All gradients are zeros, because the engine of autograd needs a real GPU. The text encoder stays
    on the CPU, because embeddings must have values."""
    get_text_encoder = common.get_text_encoder
    embed_captions = common.embed_captions

    def get_on_cpu(kind, dataset, args, checkpoint=None):
        cpu_args = argparse.Namespace(**vars(args))
        cpu_args.device = "cpu"
        return get_text_encoder(kind, dataset, cpu_args, checkpoint)

    def embed_to_gpu(encoder, dataset):
        return embed_captions(encoder, dataset).to("cuda")

    def zero_gradients(outputs, grads, keep_graph, create_graph, inputs=(), *args, **kwargs):
        return [torch.zeros_like(x) for x in inputs]

    make_tensor = torch.tensor

    def tensor(values, dtype=None, device="cpu"):
        # torch.tensor itself fills the memory of the GPU, which no dispatch mode sees
        return make_tensor(values, dtype=dtype).to(device)

    def zero_grad(optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)

    def pretend(memory):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
        monkeypatch.setattr(torch.autograd, "_engine_run_backward", zero_gradients)
        monkeypatch.setattr(torch, "tensor", tensor)
        monkeypatch.setattr(torch.optim.Adam, "zero_grad", zero_grad)
        monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
        monkeypatch.setattr(common, "get_text_encoder", get_on_cpu)
        monkeypatch.setattr(common, "embed_captions", embed_to_gpu)

    return pretend


@pytest.fixture
def train(home, tmp_path, monkeypatch):
    """Return a function that trains a script from its command line."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)

    def train(script, device, more=""):
        line = (f"--data own --epochs 1 --batch-size 4 --device {device} --no-cuda-graph "
                f"--out-dir {tmp_path} {TINY[script]} {more}")
        importlib.import_module(script).main(line.split())

    return train


@pytest.mark.parametrize("script, label, memory, copies_per_step", [
    ("dfgan", "training", LARGE, 1),
    ("gan_cls", "training", LARGE, 1),
    ("gan_cls", "training", SMALL, 2),
    ("stackgan", "Stage 1", LARGE, 1),
    ("stackgan", "Stage 2", LARGE, 1)])
def test_training_on_a_fake_gpu(script, label, memory, copies_per_step, train, pretend_cuda,
                                monkeypatch):
    """Convolutions compute in bfloat16. A step copies the numbers of its batch without waiting, and
    the images too if the memory of the GPU is too small for all. Adam keeps its numbers on the GPU,
    where a CUDA graph sees them change."""
    gpu = FakeGPU()
    copies_of_steps = []
    pinned = []

    def pin_memory(x):
        pinned.append(x)
        return x

    def end_of_step(bar, n):
        assert bar.label == label
        copies_of_steps.append(gpu.copies)
        gpu.copies = []
        if len(copies_of_steps) == NUM_STEPS:
            raise EnoughSteps

    if label == "Stage 2":
        train(script, "cpu", "--stage 1")
    pretend_cuda(memory)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(common.TrainingProgress, "update", end_of_step)
    with gpu, pytest.raises(EnoughSteps):
        train(script, "cuda")

    first, *later = copies_of_steps  # the first copies the networks too
    assert later == [[True] * copies_per_step] * (NUM_STEPS - 1)
    assert len(pinned) == NUM_STEPS * copies_per_step
    assert gpu.convolution_types == {torch.bfloat16}
    assert gpu.adam_tensors
    assert all(x.is_cuda for x in gpu.adam_tensors)
