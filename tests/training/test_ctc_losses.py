"""CTC losses against definitions that can be read."""

import itertools
import math

import pytest
import torch

from decoding.ctc_alignment import min_ctc_frames
from training.losses.ctc import consistency_loss, ctc_loss, flat_start_loss, mean_over_feasible


def batch_of(targets, frames, vocabulary=5, seed=0):
    """(log_probs_BTV that require gradients, tokens_BU, num_frames_B, num_tokens_B)."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(len(targets), max(frames), vocabulary, generator=generator)
    width = max(1, *(len(t) for t in targets))
    tokens_BU = torch.zeros(len(targets), width, dtype=torch.long)
    for row, target in enumerate(targets):
        tokens_BU[row, : len(target)] = torch.tensor(target, dtype=torch.long)
    return (
        logits_BTV.requires_grad_(),
        tokens_BU,
        torch.tensor(frames),
        torch.tensor([len(t) for t in targets]),
    )


def loss_of(logits_BTV, *rest):
    return ctc_loss(logits_BTV.log_softmax(-1), *rest)


@pytest.mark.parametrize(
    ("target", "needed"),
    [([], 0), ([3], 1), ([3, 4], 2), ([3, 3], 3), ([3, 3, 3], 5), ([3, 4, 4, 3, 3], 7)],
)
def test_fewest_frames_are_one_per_token_and_one_per_adjacent_repetition(target, needed):
    _, tokens_BU, _, num_tokens_B = batch_of([target, [1] * 6], [9, 9])
    assert min_ctc_frames(tokens_BU, num_tokens_B).tolist() == [needed, 11]


def test_fewest_frames_do_not_depend_on_what_pads_the_tokens():
    tokens_BU = torch.tensor([[3, 4, 4, 4, 4]])
    assert min_ctc_frames(tokens_BU, torch.tensor([2])).tolist() == [2]
    assert min_ctc_frames(tokens_BU, torch.tensor([3])).tolist() == [4]


@pytest.mark.parametrize("target", [[1], [1, 2], [1, 1], [2, 2, 1], [1, 2, 1]])
def test_fewest_frames_is_the_shortest_path_that_exists(target):
    def collapsed(path):
        return [t for t, _ in itertools.groupby(path) if t != 0]

    shortest = next(
        frames
        for frames in itertools.count(1)
        if any(collapsed(p) == target for p in itertools.product(range(3), repeat=frames))
    )
    needed = min_ctc_frames(torch.tensor([target]), torch.tensor([len(target)]))
    assert needed.tolist() == [shortest]


def test_loss_is_minus_the_log_of_the_sum_over_paths():
    logits_BTV, tokens_BU, frames_B, num_tokens_B = batch_of([[1, 1, 2]], [5], vocabulary=3)
    loss_B, _ = loss_of(logits_BTV, tokens_BU, frames_B, num_tokens_B)
    probs_TV = logits_BTV[0].softmax(-1).tolist()
    total = sum(
        math.prod(probs_TV[t][token] for t, token in enumerate(path))
        for path in itertools.product(range(3), repeat=5)
        if [t for t, _ in itertools.groupby(path) if t != 0] == [1, 1, 2]
    )
    torch.testing.assert_close(loss_B[0], torch.tensor(-math.log(total)), rtol=1e-5, atol=0)


def test_an_infeasible_utterance_weighs_nothing_and_has_no_gradient():
    logits_BTV, *rest = batch_of([[1, 2], [1, 1, 1, 1], [], [3, 3]], [6, 6, 6, 3])
    loss_B, feasible_B = loss_of(logits_BTV, *rest)
    assert feasible_B.tolist() == [True, False, False, True]
    assert loss_B[[1, 2]].tolist() == [0.0, 0.0]
    assert (loss_B[[0, 3]] > 0).all()
    loss_B.sum().backward()
    assert logits_BTV.grad[[1, 2]].abs().max() == 0
    assert logits_BTV.grad[0].abs().max() > 0


def test_the_mean_counts_feasible_utterances_alone():
    targets, frames = [[1, 2], [1, 1, 1, 1], [3, 3]], [6, 6, 3]
    logits_BTV, *rest = batch_of(targets, frames)
    mean = mean_over_feasible(*loss_of(logits_BTV, *rest))
    alone = [loss_of(logits_BTV[i : i + 1], *(t[i : i + 1] for t in rest))[0] for i in (0, 2)]
    torch.testing.assert_close(mean, (alone[0] + alone[1])[0] / 2)


def test_a_batch_without_a_feasible_utterance_has_loss_zero_and_zero_gradient():
    logits_BTV, *rest = batch_of([[1, 1, 1]], [2])
    mean = mean_over_feasible(*loss_of(logits_BTV, *rest))
    assert mean.item() == 0
    mean.backward()
    assert logits_BTV.grad.abs().max() == 0


def test_an_utterance_has_one_loss_and_one_gradient_in_any_batch_with_any_padding():
    logits_BTV, tokens_BU, frames_B, num_tokens_B = batch_of([[1, 2, 2], [4], [3, 1]], [7, 4, 9])
    loss_B, _ = loss_of(logits_BTV, tokens_BU, frames_B, num_tokens_B)
    loss_B.sum().backward()
    for row, (frames, tokens) in enumerate(
        zip(frames_B.tolist(), num_tokens_B.tolist(), strict=True)
    ):
        alone_1TV = logits_BTV[row : row + 1, :frames].detach().clone().requires_grad_()
        loss_1, _ = loss_of(
            alone_1TV, tokens_BU[row : row + 1, :tokens], frames_B[[row]], num_tokens_B[[row]]
        )
        loss_1.sum().backward()
        torch.testing.assert_close(loss_1[0], loss_B[row], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone_1TV.grad[0], logits_BTV.grad[row, :frames])
        assert logits_BTV.grad[row, frames:].abs().sum() == 0


def consistency_by_loops(log_probs_BTV, num_frames_B, feasible_B):
    """CR-CTC, one number at a time; the teacher is a constant."""
    utterances = log_probs_BTV.shape[0] // 2
    total = log_probs_BTV.new_zeros(())
    for row in range(utterances):
        if not feasible_B[row]:
            continue
        for frame in range(int(num_frames_B[row])):
            a_V, b_V = log_probs_BTV[row, frame], log_probs_BTV[row + utterances, frame]
            for student_V, teacher_V in ((a_V, b_V.detach()), (b_V, a_V.detach())):
                total = total + (teacher_V.exp() * (teacher_V - student_V)).sum()
    return 0.5 * total / max(1, int(feasible_B[:utterances].sum()))


def test_consistency_is_the_symmetric_divergence_of_the_two_copies():
    logits_BTV = batch_of([[1]] * 6, [8, 5, 3, 8, 5, 3], seed=3)[0]
    frames_B = torch.tensor([8, 5, 3, 8, 5, 3])
    feasible_B = torch.tensor([True, False, True] * 2)
    value = consistency_loss(logits_BTV.log_softmax(-1), frames_B, feasible_B)
    (gradient,) = torch.autograd.grad(value, logits_BTV)
    expected = consistency_by_loops(logits_BTV.log_softmax(-1), frames_B, feasible_B)
    (expected_gradient,) = torch.autograd.grad(expected, logits_BTV)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert value > 0
    assert gradient[[1, 4]].abs().sum() == 0
    assert gradient[2, 3:].abs().sum() == 0


def test_equal_copies_are_consistent():
    logits_BTV = batch_of([[1]] * 2, [4, 4])[0].detach()
    log_probs_BTV = logits_BTV.log_softmax(-1).repeat(2, 1, 1)
    value = consistency_loss(
        log_probs_BTV, torch.tensor([4, 4, 4, 4]), torch.ones(4, dtype=torch.bool)
    )
    assert value.item() == pytest.approx(0.0, abs=1e-6)


def test_padding_does_not_change_the_consistency():
    logits_BTV = batch_of([[1]] * 4, [6] * 4)[0].detach()
    frames_B, feasible_B = torch.tensor([6, 4, 6, 4]), torch.ones(4, dtype=torch.bool)
    value = consistency_loss(logits_BTV.log_softmax(-1), frames_B, feasible_B)
    poisoned = torch.nn.functional.pad(logits_BTV.log_softmax(-1), (0, 0, 0, 3), value=math.nan)
    poisoned[1, 4:] = poisoned[3, 4:] = math.nan
    torch.testing.assert_close(consistency_loss(poisoned, frames_B, feasible_B), value)


def flat_start_by_paths(log_probs_TV, target, prior_V):
    """Occupancies summed over every path there is, each weighed by its scaled likelihood."""
    frames, vocabulary = log_probs_TV.shape
    occupancy_TV, total = torch.zeros(frames, vocabulary), 0.0
    for path in itertools.product(range(vocabulary), repeat=frames):
        if [t for t, _ in itertools.groupby(path) if t != 0] != target:
            continue
        weight = math.prod(
            math.exp(log_probs_TV[t, token]) / float(prior_V[token]) for t, token in enumerate(path)
        )
        total += weight
        for t, token in enumerate(path):
            occupancy_TV[t, token] += weight
    return -((occupancy_TV / total) * log_probs_TV).sum()


def test_flat_start_weighs_every_path_by_posteriors_over_their_mean():
    targets, frames = [[1, 1, 2], [2]], [6, 4]
    logits_BTV, *rest = batch_of(targets, frames, vocabulary=3)
    log_probs_BTV = logits_BTV.log_softmax(-1)
    loss_B, feasible_B = flat_start_loss(log_probs_BTV, *rest)
    valid = [log_probs_BTV[row, :count].detach() for row, count in enumerate(frames)]
    prior_V = torch.cat(valid).exp().mean(0)
    expected = [
        flat_start_by_paths(item, target, prior_V)
        for item, target in zip(valid, targets, strict=True)
    ]
    assert feasible_B.all()
    torch.testing.assert_close(loss_B, torch.stack(expected), rtol=1e-5, atol=0)


def test_without_the_prior_flat_start_has_the_gradient_of_ctc():
    logits_BTV, *rest = batch_of([[1, 1, 2], [3]], [8, 5])
    gradients = [
        torch.autograd.grad(loss_B.sum(), logits_BTV)[0]
        for loss_B, _ in (
            loss_of(logits_BTV, *rest),
            flat_start_loss(logits_BTV.log_softmax(-1), *rest, prior_scale=0.0),
        )
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_flat_start_spreads_tokens_over_time_where_ctc_sees_blanks_alone():
    """Posteriors that are the same in all frames, blank far ahead: CTC's plateau."""
    log_probs_1TV = torch.tensor([0.94, 0.02, 0.02, 0.02]).log().expand(1, 30, 4)
    rest = torch.tensor([[1, 2, 3]]), torch.tensor([30]), torch.tensor([3])

    def frames_of_tokens(loss):
        leaf = log_probs_1TV.clone().requires_grad_()
        gradient_TV = torch.autograd.grad(loss(leaf.log_softmax(-1), *rest)[0].sum(), leaf)[0][0]
        return (leaf[0].softmax(-1) - gradient_TV).detach()[:, 1:]

    assert frames_of_tokens(ctc_loss).sum() < 6
    occupancy_TU = frames_of_tokens(flat_start_loss)
    assert occupancy_TU.sum() > 12
    centres = (occupancy_TU * torch.arange(30.0)[:, None]).sum(0) / occupancy_TU.sum(0)
    torch.testing.assert_close(centres, torch.tensor([7.25, 14.5, 21.75]), rtol=0, atol=2.0)


def test_flat_start_ignores_padding_and_infeasible_utterances():
    logits_BTV, *rest = batch_of([[1, 2], [1, 1, 1, 1]], [5, 6])
    loss_B, feasible_B = flat_start_loss(logits_BTV.log_softmax(-1), *rest)
    assert feasible_B.tolist() == [True, False]
    assert loss_B[1] == 0
    (gradient,) = torch.autograd.grad(loss_B.sum(), logits_BTV)
    assert gradient[0, 5:].abs().sum() == 0
    assert gradient[1].abs().sum() == 0
    poisoned = logits_BTV.detach().clone()
    poisoned[0, 5:] = math.nan
    poisoned.requires_grad_()
    again_B, _ = flat_start_loss(poisoned.log_softmax(-1), *rest)
    torch.testing.assert_close(again_B, loss_B)
    (again,) = torch.autograd.grad(again_B.sum(), poisoned)
    torch.testing.assert_close(again[0, :5], gradient[0, :5])
