"""What makes a training step fast on a GPU leaves its results as they are."""

import contextlib

import pytest
import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping
from speechbrain.dataio.batch import PaddedBatch

from modules.frontend import ConvolutionFrontEnd
from tests.modules.networks import padded_batch, small_network
from training.brains.cast_weights import CastWeights
from training.brains.graphs import CudaRecorder, GraphedEncoder, GraphedFrontEnd
from training.data.augmentation import SpectrogramAugmentation
from training.data.copied_ahead import CopiedAhead
from training.data.filter_augment import FilterAugment

STEPS = 20
BATCHES = [[37, 20, 9, 1], [30, 30], [40, 2, 17], [7]]


def train(device, graphs, dtype=torch.float32, dropout=0.0):
    """Losses of some steps of a small network, with its weights at the end and its shapes."""
    network = small_network("conmamba", dropout=dropout).train().to(device)
    graphed = None
    if graphs:
        graphed = GraphedEncoder(network.encoder, graphs, CudaRecorder(), dtype)
        network.encoder.forward = graphed
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    losses = []
    for number in range(STEPS):
        torch.manual_seed(number)
        x_BTD, lengths_B = (x.to(device) for x in padded_batch(BATCHES[number % len(BATCHES)]))
        # As a run does, for its place.
        torch.manual_seed(number)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out_BTD = network.encode(x_BTD, lengths_B)
            valid_BT = torch.arange(x_BTD.shape[1], device=device) < lengths_B[:, None]
            loss = (out_BTD.float().sin() * valid_BT.unsqueeze(-1)).sum() / valid_BT.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, graphed


@pytest.mark.gpu
def test_captured_steps_are_those_that_are_launched():
    wanted, _ = train(torch.device("cuda"), graphs=0)
    found, graphed = train(torch.device("cuda"), graphs=3)
    assert len(graphed.calls.steps) == 3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured_steps_learn_in_half_precision_and_with_dropout(dtype):
    wanted, _ = train(torch.device("cuda"), 0, dtype)
    found, _ = train(torch.device("cuda"), 4, dtype)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    first, _ = train(torch.device("cuda"), 4, dtype, dropout=0.1)
    second, _ = train(torch.device("cuda"), 4, dtype, dropout=0.1)
    assert first != found
    torch.testing.assert_close(first, second, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_graphs_of_a_front_end_and_of_the_encoder_behind_it_keep_apart():
    feats_BTM = torch.randn(2, 33, 12, generator=torch.Generator().manual_seed(0)).cuda()
    num_frames_B = torch.tensor([33, 7]).cuda()
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        front_end = ConvolutionFrontEnd((None, None, 12), out_channels=(4, 4), dropout=0.0)
        front_end.train().cuda()
        network = small_network("conmamba").train().cuda()
        if graphs:
            front_end.forward = GraphedFrontEnd(front_end, 1, CudaRecorder())
            network.encoder.forward = GraphedEncoder(network.encoder, 1, CudaRecorder())
        for _ in range(4):
            network.zero_grad()
            front_end.zero_grad()
            frames_BTD = front_end(feats_BTM, num_frames_B).flatten(2)
            out_BTD = network.encode(frames_BTD, front_end.out_frames(num_frames_B))
            out_BTD[0].sin().sum().backward()
        results.append([p.grad.clone() for p in (*front_end.parameters(), *network.parameters())])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_weights_cast_once_give_what_autocast_gives():
    x_BTD, lengths_B = (x.cuda() for x in padded_batch([37, 20, 9]))
    network = small_network("conmamba").train().cuda()
    results = []
    for cast in (contextlib.nullcontext(), CastWeights([network], torch.bfloat16).in_place()):
        with torch.autocast("cuda", torch.bfloat16), cast:
            out_BTD = network.encode(x_BTD, lengths_B)
        out_BTD.float().square().mean().backward()
        results.append([out_BTD.detach(), *(p.grad.clone() for p in network.parameters())])
        network.zero_grad()
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-4)


@pytest.mark.gpu
def test_batches_that_are_copied_ahead_are_those_of_the_loader():
    def batches():
        generator = torch.Generator().manual_seed(0)
        for number in range(20):
            sizes = torch.randint(1, 60000, (5,), generator=generator).tolist()
            items = [
                {"id": f"{number}-{size}", "sig": torch.full((size,), number)} for size in sizes
            ]
            yield PaddedBatch(items).pin_memory()

    loader = list(batches())
    wanted = [batch.sig.data.clone() for batch in loader]
    found = []
    for batch in CopiedAhead(loader, "cuda"):
        assert batch.sig.data.is_cuda
        # Work that takes longer than the copy of the next.
        noise = torch.randn(2000, 2000, device="cuda")
        for _ in range(10):
            noise = noise @ noise * 1e-3
        found.append(batch.sig.data * 1 + noise[0, 0].long() * 0)
    for copied, of_loader in zip(found, wanted, strict=True):
        assert torch.equal(copied.cpu(), of_loader)


def test_augmentation_is_that_of_the_cpu(device):
    lengths, ids = [90, 61, 11], ["a", "b", "c"]
    feats_BTM = torch.randn(3, 95, 40)
    modules = [
        Warping(warp_window=6, dim=2),
        FilterAugment(0.4),
        SpectrogramDrop(5, 20, 2, 6, replace="mean", dim=1),
        SpectrogramDrop(3, 9, 1, 3, replace="mean", dim=2),
    ]
    augmentation = SpectrogramAugmentation(modules, seed=3)
    wanted = augmentation(feats_BTM, lengths, ids, epoch=1)
    found = augmentation(feats_BTM.to(device), lengths, ids, epoch=1)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=2e-5)
