"""The pretended card obeys CUDA's rules of place, so that what runs on it runs on a card."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.card import pretend

pytestmark = pretend.COUNTED

MIXES = {
    "sum": lambda x, y: x + y,
    "cat": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([x, y]),
    "in place": lambda x, y: y.add_(x),
    "equal": lambda x, y: torch.equal(x, y),
    "number of the card": lambda x, y: y + x.sum(),
    "loss": lambda x, y: F.mse_loss(x, y),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "stacked numbers": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "one element of one dimension": lambda x, y: x * torch.ones(())[None],
}

ON_CARD = {
    "new": lambda x: x.new_zeros(3),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "like": torch.zeros_like,
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor([1.0], device="cuda"),
    "arange": lambda x: torch.arange(3, device="cuda"),
    "eye": lambda x: torch.eye(3, device="cuda"),
    "randn": lambda x: torch.randn(3, device="cuda"),
    "randperm": lambda x: torch.randperm(3, device="cuda"),
    "double": lambda x: x.double(),
    "to dtype": lambda x: x.to(torch.float64),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(2, device="cuda")),
    "one_hot": lambda x: F.one_hot(torch.zeros(3, dtype=torch.int64, device="cuda"), 2),
    "deepcopy": copy.deepcopy,
    "parameter": nn.Parameter,
    "view": lambda x: x.view(-1).expand(2, 4),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "sort": lambda x: x.sort().values,
    "max": lambda x: x.max(0)[1],
    "cov": torch.cov,
    "unfold": lambda x: x.unfold(0, 1, 1),
}

OFF_CARD = {
    "like with device": lambda x: torch.zeros_like(x, device="cpu"),
    "zeros": lambda x: torch.zeros(2),
    "numbers": lambda x: torch.tensor([x.sum(), 1.0]),
    "numpy": lambda x: torch.from_numpy(np.zeros(2)),
    "cpu": lambda x: x.cpu(),
    "to cpu with dtype": lambda x: x.to("cpu", torch.float64),
}


@pytest.fixture(autouse=True)
def seen():
    with pretend.card(memory=1e9) as seen:
        yield seen


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_tensors_of_two_places_do_not_mix(mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.zeros(3, device="cuda"), torch.ones(3))


def test_a_number_of_the_processor_goes_with_tensors_of_the_card():
    x = torch.zeros(3, device="cuda")
    assert (x + torch.tensor(1.0)).is_cuda and (x * 2).is_cuda and (torch.tensor(2.0) * x).is_cuda
    assert x.device == torch.device("cuda:0") and x.sum().item() == 0 and (x + 1).tolist() == [1, 1, 1]


def test_numpy_reads_no_tensor_of_the_card():
    x = torch.zeros(3, device="cuda")
    for read in (lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            read()


def test_indices_may_be_on_the_processor_but_not_the_other_way_round():
    x, i = torch.arange(6.0).to("cuda"), torch.tensor([1, 2])
    assert x[i].is_cuda and x[x > 2].is_cuda and x[i.cuda()].is_cuda
    for index in (i.cuda(), x > 2):
        with pytest.raises(RuntimeError, match="indices should be"):
            x.cpu()[index]
    with pytest.raises(RuntimeError, match="same device"):
        x.index_select(0, i)
    with pytest.raises(RuntimeError, match="same device"):
        x[i] = torch.zeros(2)
    x[i], x[1:3], x[x > 2] = 3.0, torch.zeros(2), 1.0  # numbers, and a copy into a slice, as torch allows them
    assert x.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("make", ON_CARD.values(), ids=ON_CARD)
def test_what_is_made_of_tensors_of_the_card_is_on_it(make):
    assert make(torch.zeros(2, 2, device="cuda")).is_cuda


@pytest.mark.parametrize("make", OFF_CARD.values(), ids=OFF_CARD)
def test_what_does_not_ask_for_the_card_is_not_on_it(make):
    assert not make(torch.zeros(2, 2, device="cuda")).is_cuda


def test_a_device_block_is_heard():
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda and torch.tensor([1]).is_cuda
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


def test_generators_draw_at_their_own_place_only():
    here, there = torch.Generator().manual_seed(0), torch.Generator("cuda").manual_seed(0)
    for draw in (
        lambda: torch.randn(2, generator=here, device="cuda"),
        lambda: torch.randn(2, generator=there),
        lambda: torch.multinomial(torch.ones(3, device="cuda"), 1, generator=here),
    ):
        with pytest.raises(RuntimeError, match="for generator"):
            draw()
    assert torch.randn(2, generator=there, device="cuda").is_cuda
    assert not torch.randperm(4, generator=here).is_cuda


def test_modules_move_with_all_their_tensors_and_train():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to("cuda")
    twin = copy.deepcopy(net)
    assert all(tensor.is_cuda for one in (net, twin) for tensor in one.state_dict().values())
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="same device"):
        net(images)
    leaf = images.requires_grad_(True)
    loss = F.cross_entropy(net(leaf.to("cuda")), torch.zeros(2, dtype=torch.int64, device="cuda"))
    loss.backward()
    assert all(parameter.grad.is_cuda for parameter in net.parameters()) and not leaf.grad.is_cuda
    torch.optim.Adam(net.parameters()).step()
    attention = nn.TransformerEncoderLayer(8, 2, batch_first=True).cuda().eval()
    assert attention(torch.randn(1, 3, 8, device="cuda")).is_cuda
    assert not any(tensor.is_cuda for tensor in net.cpu().parameters())


def test_what_cuda_has_no_kernel_for_fails():
    integers = torch.ones(2, 2, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="not implemented for 'Long'|not implemented for 'int64'"):
        integers @ integers


def test_memory_is_that_of_living_storages(seen):
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    view = x[1:]
    del x
    assert torch.cuda.memory_allocated() - before == 4000
    del view
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= 4000
    assert torch.cuda.mem_get_info() == (seen.total - before, seen.total)


def test_a_full_card_says_so():
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.zeros(250_000_001, device="cuda")


def test_copies_and_waits_are_counted_with_their_bytes(seen):
    x = torch.zeros(250).to("cuda")
    x.cpu(), x.sum().item(), x.nonzero()
    assert seen.moved("to card") == seen.moved("from card") == 1000
    assert sum(seen.waits.values()) == 2


def test_pinned_memory_is_told_from_other_memory(seen):
    x = torch.zeros(10)
    assert not x.is_pinned() and x.pin_memory().is_pinned() and seen.pinned == 40
    with pytest.raises(RuntimeError, match="cannot pin"):
        x.to("cuda").pin_memory()


def test_modes_and_hooks_of_the_program_are_not_calls_of_torch():
    made = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            made.append(torch.arange(2))
            return func(*args, **(kwargs or {}))

    with Mode():
        x = F.relu(torch.zeros(3, device="cuda", requires_grad=True) * 2)
    x.register_hook(lambda gradient: made.append(torch.zeros(2)))
    x.sum().backward()
    assert x.is_cuda and len(made) > 3 and not any(tensor.is_cuda for tensor in made)


def test_taken_out_again_it_leaves_torch_as_it_was():
    before = torch.Tensor.to, torch.Generator
    with pretend.card():
        pass
    assert (torch.Tensor.to, torch.Generator) == before
