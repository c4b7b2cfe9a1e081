"""Work on torch's threads in one region, and the torch path that uses it."""

import threading

import pytest
import torch

from mra_attention import mra2_attention, parallel
from mra_attention.parallel import run_items, torch_parallel_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_regions = pytest.mark.skipif(torch_parallel_for() is None, reason="torch before 2.10")


@needs_regions
def test_every_item_is_worked_on_once_by_both_threads(two_threads):
    done, meeting = [], threading.Barrier(2, timeout=60)

    def work(item):
        if item < 2:
            meeting.wait()  # passes only where two threads work at once
        done.append((item, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    run_items(work, 7)
    assert sorted(item for item, *_ in done) == list(range(7))
    assert len({thread for _, thread, *_ in done}) == 2
    assert not any(has_gradients for *_, has_gradients in done)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_without_regions_the_items_are_done_in_turn(count, two_threads, monkeypatch):
    monkeypatch.setattr(parallel, "torch_parallel_for", lambda: None)
    done = []
    run_items(done.append, count)
    assert done == list(range(count))


def test_an_error_of_an_item_is_raised(two_threads):
    def work(item):
        raise KeyError(item)

    with pytest.raises(KeyError):
        run_items(work, 4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_items_may_write_to_tensors_of_the_callers_mode(mode, two_threads):
    with mode():
        tensor = torch.zeros(6)
        run_items(lambda item: tensor[item].fill_(item), 6)
        assert tensor.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("sparse", ["full", "sparse"])
def test_the_torch_path_has_the_same_bits_for_any_number_of_threads(sparse, two_threads):
    torch.manual_seed(0)
    # Three chunks: heads of 2048 tokens are half a mebibyte each.
    inputs = [torch.randn(1, 6, 2048, 64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(6, 64, requires_grad=True)
    results = []
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        output = mra2_attention(
            *inputs, block_per_row=4, approx_mode=sparse, distance_bias=bias, impl="torch"
        )
        results.append((output, *torch.autograd.grad(output.square().sum(), [*inputs, bias])))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_two_python_threads_may_call_the_torch_path_at_once(two_threads):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 2048, 64) for _ in range(3)]
    alone = mra2_attention(*inputs, block_per_row=4, impl="torch")
    found = [None] * 4

    def call(place):
        found[place] = mra2_attention(*inputs, block_per_row=4, impl="torch")

    callers = [threading.Thread(target=call, args=(place,)) for place in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(alone, x) for x in found)
