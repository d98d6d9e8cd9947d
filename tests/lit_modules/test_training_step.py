"""The step of a training: what it counts, and that a recorded one computes what an eager one does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_modules.resnet import ResNet18
from lit_modules.training_step import GraphedStep, classification, hits


@pytest.mark.parametrize("classes", [3, 10])
def test_hits_are_first_guesses_and_those_among_five(classes):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, classes, generator=generator), torch.randint(classes, (50,), generator=generator)
    best = logits.topk(min(5, classes)).indices == labels[:, None]
    assert hits(logits, labels).tolist() == [best[:, 0].sum(), best.any(1).sum()]


def test_a_network_that_gives_nan_hits_nothing():
    assert hits(torch.full((4, 10), torch.nan), torch.arange(4)).tolist() == [0, 0]


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images in float64: cuDNN's sums in float32 differ from run to run, and what ReLU lets through then does, too."""
    generator = torch.Generator("cuda").manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, device="cuda", generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (count,), device="cuda", generator=generator)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet18(width=8).cuda().double().to(memory_format=torch.channels_last)


@pytest.mark.gpu
class TestGraphed:
    @pytest.mark.parametrize("counts", [[8] * 7, [8, 8, 8, 8, 8, 3, 8, 8], [4, 4, 4, 4, 4, 8, 8, 8, 8, 8]], ids=str)
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_each_batch_has_its_own_gradients_loss_hits_and_statistics(self, counts, compiled):
        graphed = small_network()
        eager = copy.deepcopy(graphed)
        compute, plain = classification(graphed, 0.1), classification(eager, 0.1)
        step = GraphedStep(compute, list(graphed.parameters()), torch.channels_last, compiled)
        optimizers = [torch.optim.SGD(network.parameters(), 0.01, fused=True) for network in (graphed, eager)]
        for seed, count in enumerate(counts):
            images, labels = batch(count, seed)
            loss, hit = step(images, labels)
            optimizers[1].zero_grad()
            expected, expected_hit = plain(images.contiguous(memory_format=torch.channels_last), labels)
            expected.backward()
            torch.testing.assert_close(loss, expected.detach())
            assert torch.equal(hit, expected_hit)
            for p, q in zip(graphed.parameters(), eager.parameters()):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(graphed.buffers(), eager.buffers()):
            torch.testing.assert_close(p, q)

    def test_gradients_that_were_set_to_none_come_back(self):
        network = small_network()
        step = GraphedStep(classification(network, 0.0), list(network.parameters()), torch.channels_last)
        for seed in range(6):
            step(*batch(4, seed))
            expected = [p.grad.clone() for p in network.parameters()]
            network.zero_grad()
        step(*batch(4, 5))
        for p, q in zip(network.parameters(), expected):
            torch.testing.assert_close(p.grad, q, rtol=1e-6, atol=1e-9)

    def test_what_was_given_out_is_not_overwritten(self):
        network = small_network()
        step = GraphedStep(classification(network, 0.0), list(network.parameters()), torch.channels_last)
        losses = [step(*batch(4, seed))[0] for seed in range(8)]
        assert len(set(torch.stack(losses).tolist())) == 8

    def test_a_step_that_waits_for_the_gpu_runs_without_a_graph(self):
        network = small_network()
        compute = classification(network, 0.0)

        def waiting(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, hit = compute(images, labels)
            return loss * (loss.item() > -1), hit

        with pytest.warns(UserWarning, match="runs without a CUDA graph"):
            step = GraphedStep(waiting, list(network.parameters()), torch.channels_last)
            for seed in range(6):
                loss, _ = step(*batch(4, seed))
        network.zero_grad()
        expected, _ = compute(batch(4, 5)[0].contiguous(memory_format=torch.channels_last), batch(4, 5)[1])
        torch.testing.assert_close(loss, expected.detach())
        step = GraphedStep(waiting, list(network.parameters()), torch.channels_last, required=True)
        with pytest.raises(RuntimeError):
            for seed in range(6):
                step(*batch(4, seed))
