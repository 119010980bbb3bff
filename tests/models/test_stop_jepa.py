"""Claims of StoP and I-JEPA, on tiny models."""

from functools import partial

import passes
import pytest
import torch

make = partial(passes.make, "stop_jepa")


def test_the_encoder_that_is_used_is_the_target():
    model = make()
    assert model.base_model is model.target_encoder


def images(count=4, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_zero_noise_is_i_jepa():
    """With σ = 0 nothing is drawn but the masks, and given noise of zeros changes nothing."""
    model = make(position_noise_std=0.0).eval()
    first = model(images())
    given = dict(context_ids=first.context_ids, target_ids=first.target_ids)
    assert torch.equal(model(images(), **given).loss, model(images(), **given).loss)
    zeros = torch.zeros_like(first.targets)
    assert torch.equal(model(images(), **given, position_noise=zeros).loss, first.loss)


@pytest.mark.parametrize(("noise_on", "target", "context"), [("target", 1, 0), ("context", 0, 1), ("both", 1, 1)])
def test_noise_goes_where_the_config_says_fresh_for_every_image_block_and_token(noise_on, target, context):
    model = make(noise_on=noise_on)
    seen = {}

    def record(module, args, output):
        seen["target"], seen["context"] = args[4:6]

    model.predictor.register_forward_hook(record)
    output = model(images(16))
    for name, expected, length in (
        ("target", target, output.target_ids.shape[2]),
        ("context", context, output.context_ids.shape[1]),
    ):
        assert (seen[name] is not None) == bool(expected)
        if expected:
            assert seen[name].shape == (16, 4, length, 48)
            assert abs(seen[name].std() / 0.25 - 1) < 0.02
            assert len(seen[name].flatten().unique()) > 0.99 * seen[name].numel()


def test_context_noise_enters_the_projection_beside_the_features():
    model = make(noise_on="context").predictor
    features, noise = torch.randn(2, 5, 48), torch.randn(2, 4, 5, 48)
    positions = torch.randn(2, 5, 24)
    ours = model.context_tokens(features, positions, noise)
    expected = model.embed(features[:, None] + noise) + positions[:, None]
    torch.testing.assert_close(ours, expected)


def test_masked_tokens_follow_the_papers_equation():
    noise, positions = torch.randn(2, 4, 6, 48), torch.randn(2, 4, 6, 24)
    paper = make(use_mask_token=True).predictor
    torch.nn.init.normal_(paper.embed.bias)
    torch.testing.assert_close(
        paper.masked_tokens(positions, noise), noise @ paper.embed.weight.T + positions + paper.mask_token
    )
    released = make(use_mask_token=False).predictor
    torch.nn.init.normal_(released.embed.bias)
    torch.testing.assert_close(released.masked_tokens(positions, noise), released.embed(noise) + positions)
    assert torch.equal(released.masked_tokens(positions, None), positions)


def coloured_images(count, seed):
    """One random colour an image, and noise: the context tells all that can be told of the targets."""
    generator = torch.Generator().manual_seed(seed)
    colours, noise = (
        torch.randn(count, 3, 1, 1, generator=generator),
        torch.randn(count, 3, 32, 32, generator=generator),
    )
    return 3 * colours + 0.3 * noise


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_noise_projection_shrinks_while_the_tied_one_does_not(tied):
    """Section 3.2: noise with a projection of its own is trained away; through the context's projection it cannot be,
    because the context must get through."""
    model = make(tie_noise_projection=tied, position_noise_std=0.25, momentum_start=1.0)
    weight = model.predictor.embed.weight if tied else model.predictor.noise_embed.weight
    with torch.no_grad():
        model.predictor.embed.weight.normal_(std=0.05)
        weight.copy_(model.predictor.embed.weight)
    start = weight.abs().sum().item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(100):
        optimizer.zero_grad()
        loss = model(coloured_images(32, step)).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.06, "the context's content must have been learned"
    share_left = weight.abs().sum().item() / start
    assert share_left > 1 if tied else share_left < 0.5, share_left


def test_target_update_is_the_moving_average_of_the_momentum_schedule():
    model = make(momentum_start=0.9, momentum_end=1.0)
    assert [round(model.momentum(p), 6) for p in (0, 0.5, 1)] == [0.9, 0.95, 1.0]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p))
    expected = [
        0.95 * t + 0.05 * o for t, o in zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True)
    ]
    model.update_target(0.5)
    for t, e in zip(model.target_encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(t, e)
    before = [t.clone() for t in model.target_encoder.parameters()]
    model.update_target(1.0)
    assert all(torch.equal(t, b) for t, b in zip(model.target_encoder.parameters(), before, strict=True))
