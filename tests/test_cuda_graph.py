"""CUDA graphs and the Adam that they need, without a GPU.

Stand-ins replace torch.cuda. The stand-in of a graph records the operations of the captured
function and computes them again at each replay, as a GPU does. gpu.py tests the real one.
"""
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dfgan
import gan_cls
import stackgan
from conftest import equal

EAGER_CALLS = 11  # in which cuDNN chooses its algorithms and Adam creates its state


class StandInStream:
    """Notes the streams for which it waited."""

    def __init__(self, name):
        self.name = name
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other.name)


class StandInGraph(TorchDispatchMode):
    """Records operations during a capture; replay() writes their results again."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.replays = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            # An operation in place, and a view, has its result in the right memory already
            if isinstance(again, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


class StandInGPU:
    """Replaces what CUDAGraph uses of torch.cuda.

    A capture on a GPU runs nothing. The stand-in runs the function, and therefore puts back the
    tensors that `state` returns."""

    def __init__(self, monkeypatch):
        self.default = self.current = StandInStream("default")
        self.side_streams, self.graphs = [], []
        self.state = list  # a function that returns tensors, here none
        self.capturing = False
        self.error = None  # raised at the end of a capture
        for name, stand_in in (
                ("Stream", self.new_stream), ("current_stream", lambda: self.current),
                ("stream", self.stream), ("CUDAGraph", self.new_graph), ("graph", self.graph)):
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def new_stream(self):
        self.side_streams.append(StandInStream("side"))
        return self.side_streams[-1]

    def new_graph(self):
        self.graphs.append(StandInGraph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self.current = stream
        try:
            yield
        finally:
            self.current = self.default

    @contextlib.contextmanager
    def graph(self, graph, stream):
        before = [(x, x.detach().clone()) for x in self.state()]
        self.capturing = True
        try:
            with self.stream(stream), graph:
                yield
        finally:
            self.capturing = False
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
        if self.error:
            raise self.error


@pytest.fixture
def gpu(monkeypatch):
    return StandInGPU(monkeypatch)


def test_eleven_eager_calls_then_a_capture_then_replays(gpu):
    """Every call returns the value of the function for its own inputs."""
    streams = []

    def function(x, y):
        streams.append(gpu.current.name)
        return {"sum": x + 2 * y, "product": (x * y).sum()}

    graphed = common.CUDAGraph(function, enabled=True)
    for call in range(1, 21):
        x = torch.tensor([1.0, 2.0]) * call
        y = torch.tensor([3.0, -1.0]) + call
        outputs = graphed(x, y)
        assert outputs["sum"].tolist() == [call + 2 * (3 + call), 2 * call + 2 * (call - 1)]
        assert outputs["product"].item() == call * (3 + call) + 2 * call * (call - 1)
        # Python runs the function until it is captured in the twelfth call
        assert len(streams) == min(call, EAGER_CALLS + 1)
        assert len(gpu.graphs) == (call > EAGER_CALLS)
    assert gpu.graphs[0].replays == 20 - EAGER_CALLS

    # Warm-up and capture share one side stream, which waits for the work before it
    assert streams == ["side"] * (EAGER_CALLS + 1)
    assert len(gpu.side_streams) == 1
    assert gpu.side_streams[0].waited_for == ["default"] * EAGER_CALLS
    assert gpu.default.waited_for == ["side"] * EAGER_CALLS
    assert gpu.current is gpu.default


def test_inputs_are_copied_and_outputs_overwritten(gpu):
    """A graph reads and writes the same memory in each replay."""
    graphed = common.CUDAGraph(lambda x: x + 1, enabled=True)
    x = torch.zeros(3)
    for _ in range(EAGER_CALLS):
        graphed(x)
    first = graphed(x)
    assert first.tolist() == [1, 1, 1]
    second = graphed(torch.full((3,), 5.0))
    assert second is first and first.tolist() == [6, 6, 6]
    assert x.tolist() == [0, 0, 0]


def make_training(lr_type):
    """Return a network, its optimizer, and an update() as in the scripts, from fixed weights."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, (0.5, 0.999), fused=True)
    if lr_type == "tensor":
        common.prepare_adam(optimizer, 1e-2, "cpu")

    def update(x, y):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return net, optimizer, update


def random_batch(step):
    torch.manual_seed(step)
    return torch.randn(6, 4), torch.randn(6, 1)


def set_rate(optimizer, lr):
    """Set a learning rate as a plain number, or as common does."""
    if isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
        common.set_learning_rate(optimizer, lr)
    else:
        optimizer.param_groups[0]["lr"] = lr


def test_training_in_a_graph_has_the_bits_of_eager_training(gpu):
    """Replays update the weights, and follow a change of the learning rate."""
    net, optimizer, update = make_training("tensor")
    eager_net, eager_optimizer, eager_update = make_training("float")

    def state():
        moments = [x for values in optimizer.state.values() for x in values.values()]
        return [*net.parameters(), *moments]

    gpu.state = state
    graphed = common.CUDAGraph(update, enabled=True)
    for step in range(24):
        lr = 1e-2 if step < 16 else 3e-3
        set_rate(optimizer, lr)
        set_rate(eager_optimizer, lr)
        losses = graphed(*random_batch(step))
        eager_losses = eager_update(*random_batch(step))
        assert torch.equal(losses["loss"], eager_losses["loss"]), step
        assert equal(net.state_dict(), eager_net.state_dict()), step
    assert gpu.graphs[0].replays == 24 - EAGER_CALLS


@pytest.mark.parametrize("raised_by", ["function", "end of the capture"])
def test_failed_capture_warns_once_and_goes_on(gpu, capsys, raised_by):
    """A function that reads a number back, for example, cannot be captured."""
    error = RuntimeError("operation not permitted when stream is capturing")
    if raised_by == "end of the capture":
        gpu.error = error

    def function(x):
        if gpu.capturing and raised_by == "function":
            raise error
        return 2 * x

    graphed = common.CUDAGraph(function, enabled=True)
    for call in range(EAGER_CALLS + 5):
        assert graphed(torch.tensor(float(call))).item() == 2 * call
    assert len(gpu.graphs) == 1 and gpu.graphs[0].replays == 0
    assert gpu.current is gpu.default
    printed = capsys.readouterr().out
    assert printed.count("warning: no CUDA graph") == 1
    assert "not permitted" in printed


def make_script_update(script, step_of_g):
    """Return the update() of a script with tiny networks, and its inputs for a batch of 2.

    step_of_g replaces the step of G's optimizer."""
    images = torch.randn(2, 3, 64, 64)
    z = torch.randn(2, 100)
    t = torch.randn(2, dfgan.TEXT_DIM if script == "dfgan" else gan_cls.TEXT_DIM)
    if script == "gan_cls":
        G, D, opt_g, opt_d = gan_cls.build(4, 4)
    elif script == "stackgan":
        G, D, opt_g, opt_d = stackgan.build(64, 4, 4)
    else:
        G, D, opt_g, opt_d = dfgan.build(4, 64)
    opt_g.step = step_of_g

    def update(images, z, t, t_wrong):
        if script == "stackgan":
            fake, kl = G(z, torch.zeros(2, stackgan.NC), t)
            losses = stackgan.d_step(D, opt_d, images, fake, t, t_wrong)
            losses["loss_g"] = stackgan.g_step(D, opt_g, fake, t, kl)
        else:
            module = gan_cls if script == "gan_cls" else dfgan
            fake = G(z, t)
            losses = module.d_step(D, opt_d, images, fake, t, t_wrong)
            losses["loss_g"] = module.g_step(D, opt_g, fake, t)
        return losses

    return update, (images, z, t, t.flip(0))


@pytest.mark.parametrize("script", ["gan_cls", "stackgan", "dfgan"])
def test_scripts_train_on_after_a_failed_capture(script, gpu, monkeypatch):
    """A capture that fails in the step of G must not leave the weights of D frozen."""
    monkeypatch.setattr(common.CUDAGraph, "WARM_UP", 1)

    def step_of_g():
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    update, inputs = make_script_update(script, step_of_g)
    graphed = common.CUDAGraph(update, enabled=True)
    losses = [graphed(*inputs)["loss_d"].item() for _ in range(4)]
    assert len(gpu.graphs) == 1
    assert len(set(losses)) == 4  # D still learns


@pytest.mark.parametrize("enabled, processes", [(False, 1), (True, 2), (None, 1)])
def test_plain_function_without_a_graph(enabled, processes, monkeypatch):
    """Without --cuda-graph, on a CPU and with several processes nothing of CUDA is used."""
    monkeypatch.setattr(common, "world_size", lambda: processes)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, None)
    graphed = common.CUDAGraph(lambda x, y: (x, y), enabled)
    for _ in range(EAGER_CALLS + 3):
        inputs = (torch.zeros(1), None)  # passed on as they are
        x, y = graphed(*inputs)
        assert x is inputs[0] and y is None


# ---- Adam with a learning rate that a graph can see


def train_steps(update, steps):
    for step in steps:
        update(*random_batch(step))


def test_adam_with_a_tensor_rate_has_the_bits_of_a_number():
    """The bits are the same after the rate has changed, too."""
    net, optimizer, update = make_training("tensor")
    plain_net, plain_optimizer, plain_update = make_training("float")
    for first, lr in ((0, 1e-2), (5, 1e-2 / 3), (10, 7e-5)):
        set_rate(optimizer, lr)
        set_rate(plain_optimizer, lr)
        train_steps(update, range(first, first + 5))
        train_steps(plain_update, range(first, first + 5))
        assert equal(net.state_dict(), plain_net.state_dict()), lr


@pytest.mark.parametrize("saved_as", ["float", "tensor"])
def test_adam_goes_on_after_loading_a_state(saved_as):
    """Checkpoints of the code before hold the rate as a number, and load_state_dict restores it."""
    saved_net, saved_optimizer, saved_update = make_training(saved_as)
    train_steps(saved_update, range(4))
    torch.save([saved_net.state_dict(), saved_optimizer.state_dict()], "state.pt")

    net, optimizer, update = make_training("tensor")
    net_state, optimizer_state = torch.load("state.pt", weights_only=True)
    net.load_state_dict(net_state)
    optimizer.load_state_dict(optimizer_state)
    common.prepare_adam(optimizer, 4e-3, "cpu")
    group = optimizer.param_groups[0]
    assert group["capturable"] is True and group["betas"] == (0.5, 0.999)
    assert isinstance(group["lr"], torch.Tensor) and group["lr"].item() == 4e-3

    set_rate(saved_optimizer, 4e-3)
    train_steps(saved_update, range(4, 9))
    train_steps(update, range(4, 9))
    assert equal(net.state_dict(), saved_net.state_dict())
    weights = list(net.parameters())
    saved_weights = list(saved_net.parameters())
    for weight, saved_weight in zip(weights, saved_weights, strict=True):
        assert equal(optimizer.state[weight], saved_optimizer.state[saved_weight])


def test_rate_of_several_groups_and_of_other_devices():
    """On devices other than a CPU the rate is a float32 tensor, because MPS has no float64."""
    weights = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [weight]} for weight in weights], 1e-3)
    common.prepare_adam(optimizer, 1e-3, "meta")
    for group in optimizer.param_groups:
        assert group["lr"].dtype == torch.float32 and group["lr"].device.type == "meta"
    common.prepare_adam(optimizer, 1e-3, "cpu")
    common.set_learning_rate(optimizer, 0.1)
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.1, 0.1]
