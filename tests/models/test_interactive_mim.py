"""Interactive MIM: what it promises beyond the matrix of `test_models.py`."""

import pytest
import torch
from passes import drawn, make
from transformers import AutoConfig

from hf_mim import testing
from hf_mim.models.decoders import CrossAttention
from hf_mim.models.masking import split_modalities
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.vit import patchify

MODALITIES = {"rgb": 3, "ir": 1, "radar": 2}
TWO = {"rgb": 3, "ir": 1}


def interactive(modalities=TWO, **changes):
    count = sum(modalities.values()) if modalities else 3
    return make("interactive_mim", **{"num_channels": count, "modalities": modalities} | changes)


def images(model, count=4):
    return torch.randn(count, model.config.num_channels, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("masking", ["independent", "shared"])
@pytest.mark.parametrize("modalities", [TWO, MODALITIES], ids=len)
def test_it_keeps_the_promises_of_a_method_with_several_modalities(modalities, masking, monkeypatch):
    # A place may be context and target, in two modalities.
    monkeypatch.setattr(testing, "CHECKS", [check for check in testing.CHECKS if check is not testing.check_output])
    sizes = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    more = dict(num_channels=sum(modalities.values()), modalities=modalities, modality_masking=masking)
    testing.check_method("interactive_mim", **sizes, **more, decoder_num_hidden_layers=1)


def test_the_order_of_the_modalities_is_kept_in_a_checkpoint(tmp_path):
    interactive(MODALITIES).save_pretrained(tmp_path)
    assert list(AutoConfig.from_pretrained(tmp_path).modality_channels.items()) == list(MODALITIES.items())


def test_with_one_modality_and_no_interaction_it_is_mae():
    model = interactive(None, interaction_num_layers=0)
    mae = MAEForPreTraining(make("mae", decoder_num_hidden_layers=len(model.decoder.layers)).config)
    mae.load_state_dict({name.replace("heads.0", "head"): x for name, x in model.state_dict().items()})
    pictures, noise = images(model), torch.rand(4, 64)
    ours, theirs = model(pictures, noise=noise), mae(pictures, noise=noise)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.target_ids, theirs.target_ids)
    for one, other in zip(
        model.reconstruct(pictures, noise=noise), mae.reconstruct(pictures, noise=noise), strict=True
    ):
        assert torch.equal(one, other)


def test_a_token_is_the_sum_of_the_embeddings_of_the_visible_modalities():
    embeddings = interactive(MODALITIES).encoder.embeddings
    torch.nn.init.normal_(embeddings.absent)
    patches, count = torch.randn(2, 5, 16 * 6), 16
    visible = torch.rand(2, 5, 3) < 0.5
    ids = torch.stack([torch.randperm(64)[:5] for _ in range(2)])
    tokens = embeddings(patches, (8, 8), ids, visible)[:, 1:]
    prefix, places = embeddings.position_embeddings((8, 8), torch.float32)
    weight = embeddings.projection.weight.unflatten(-1, (count, 6))
    biases = -embeddings.absent
    rest = embeddings.projection.bias - biases.sum(dim=0)  # of no modality
    for image, place in ((0, 0), (0, 3), (1, 4)):
        expected, start = rest + places[ids[image, place]], 0
        for number, channels in enumerate(MODALITIES.values()):
            own = slice(start, start := start + channels)
            if visible[image, place, number]:
                pixels = patches[image, place].unflatten(-1, (count, 6))[:, own]
                expected = expected + torch.einsum("dpc,pc->d", weight[..., own], pixels) + biases[number]
        torch.testing.assert_close(tokens[image, place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masking", ["independent", "shared"])
def test_a_masked_patch_of_any_modality_never_reaches_the_encoder(masking):
    model = interactive(MODALITIES, modality_masking=masking).eval()
    pictures = images(model)
    masks = model.draw_masks(4, (8, 8))
    before = drawn(model, pictures).metrics["feature_std"]
    hidden = torch.zeros(4, 3, 64, dtype=torch.bool).scatter(2, masks["target_ids"], True)
    owner = torch.tensor([0, 0, 0, 1, 2, 2])
    gone = hidden[:, owner].unflatten(-1, (8, 8)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(gone, torch.randn_like(pictures), pictures)
    before, after = (model(x, **masks, output_hidden_states=True) for x in (pictures, other))
    assert all(torch.equal(one, two) for one, two in zip(before.hidden_states, after.hidden_states, strict=True))
    assert torch.equal(before.predictions, after.predictions) and not torch.equal(before.targets, after.targets)


def test_visible_infrared_changes_the_prediction_of_masked_rgb_at_its_place():
    model = interactive().eval()
    pictures, masks = images(model), model.draw_masks(4, (8, 8))
    rgb = torch.zeros(4, 64, dtype=torch.bool).scatter(1, masks["target_ids"][:, 0], True)
    only_ir = torch.zeros(4, 64, dtype=torch.bool).scatter(1, masks["context_ids"], True) & rgb
    assert only_ir.any(dim=1).all()
    other = pictures.clone()
    where = only_ir.unflatten(-1, (8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    other[:, 3] = torch.where(where, torch.randn_like(other[:, 3]), other[:, 3])
    pixels = 3 * 16
    change = (model(pictures, **masks).predictions - model(other, **masks).predictions)[..., :pixels].abs().amax(-1)
    at_its_place = torch.stack([place[ids] for place, ids in zip(only_ir, masks["target_ids"][:, 0], strict=True)])
    assert change[at_its_place].min() > 1e-5


def test_masks_of_modalities_are_independent_and_uniform():
    torch.manual_seed(0)
    both = torch.zeros(2, 400, 16)
    for batch in range(100):
        context, masked, visible = split_modalities(torch.rand(4, 16), 4, 2)
        rows = slice(4 * batch, 4 * batch + 4)
        for modality in (0, 1):
            both[modality, rows] = 1 - torch.zeros(4, 16).scatter(1, masked[:, modality], 1.0)
            shown = torch.zeros(4, 16).scatter(1, context, visible[..., modality].float())
            assert torch.equal(shown, both[modality, rows])
    assert (both.sum(dim=2) == 4).all()
    assert (both.mean(dim=1) - 0.25).abs().max() < 0.08
    assert abs((both[0] * both[1]).mean() - 1 / 16) < 0.01  # each is visible at a quarter of the places


@pytest.mark.parametrize("name", TWO)
def test_a_modality_that_is_left_out_is_one_that_is_masked_everywhere(name):
    model = interactive().eval()
    torch.nn.init.normal_(model.encoder.embeddings.absent)
    pictures = images(model)
    part = model.config.channels_of_modalities[name]
    visible = torch.tensor([other == name for other in TWO]).expand(4, 64, 2)
    patches, grid = model.encoder.cut(pictures)
    expected = model.encoder.encode(patches, grid, visible=visible)
    alone = model.encoder(pictures, modalities=[name]).last_hidden_state
    assert torch.equal(alone, expected)
    assert torch.equal(alone, model.encoder(pictures[:, part], modalities=[name]).last_hidden_state)
    assert not torch.equal(alone, model.encoder(pictures).last_hidden_state)
    both = model.encoder(pictures, modalities=list(TWO)).last_hidden_state
    torch.testing.assert_close(both, model.encoder(pictures).last_hidden_state)
    model.config.modalities_seen = [name]
    assert torch.equal(model.encoder(pictures).last_hidden_state, alone)


@pytest.mark.parametrize("seen", [None, ["ir"], ["rgb", "radar"]])
def test_a_plain_vit_gives_the_same_features(seen):
    model = interactive(MODALITIES, modalities_seen=seen).encoder.eval()
    torch.nn.init.normal_(model.embeddings.absent)
    plain = make("mae", "encoder", num_channels=6).eval()
    plain.load_state_dict(model.plain_state_dict())
    pictures = torch.randn(2, 6, 32, 32)
    theirs = plain(pictures).last_hidden_state
    torch.testing.assert_close(theirs, model(pictures).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", [None, ["ir"]])
def test_a_graph_of_the_encoder_takes_any_number_of_images(seen):
    encoder = interactive(modalities_seen=seen).encoder.eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(encoder, (torch.randn(2, 4, 32, 32),), dynamic_shapes=shapes, strict=False)
    pictures = torch.randn(5, 4, 32, 32)
    ours, graph = encoder(pictures).pooler_output, program.module()(pictures).pooler_output
    torch.testing.assert_close(graph, ours, rtol=1e-5, atol=1e-6)


def test_the_interaction_is_attention_by_hand():
    model = interactive()
    layer, heads = model.decoder.interaction[0].eval(), model.config.decoder_num_attention_heads
    width = model.config.decoder_hidden_size
    queries, memory = torch.randn(2, 3, width), torch.randn(2, 5, width)
    attention = layer.cross_attention
    assert isinstance(attention, CrossAttention)
    q, kv = attention.q(layer.norm1_queries(queries)), attention.kv(layer.norm1_memory(memory))
    k, v = kv[..., :width], kv[..., width:]
    size, mixed = width // heads, torch.empty(2, 3, width)
    for image in range(2):
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            for query in range(3):
                scores = torch.stack([q[image, query, own] @ key / size**0.5 for key in k[image, :, own]])
                mixed[image, query, own] = scores.softmax(dim=0) @ v[image, :, own]
    expected = queries + attention.proj(mixed)
    expected = expected + layer.mlp(layer.norm2(expected))
    torch.testing.assert_close(layer(queries, memory), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_mean_of_the_losses_of_the_modalities_each_on_its_masked_patches():
    model = interactive(norm_pix_loss=False)
    pictures = images(model)
    output, losses = drawn(model, pictures), []
    for number, (name, part) in enumerate(model.config.channels_of_modalities.items()):
        own = patchify(pictures[:, part], (4, 4))
        ids = output.target_ids[:, number, :, None].expand(-1, -1, own.shape[-1])
        start = 16 * part.start
        predictions = output.predictions[..., start : start + own.shape[-1]]
        losses.append((predictions - own.gather(1, ids)).square().mean())
        torch.testing.assert_close(output.metrics[f"reconstruction_{name}"], losses[-1].detach())
    torch.testing.assert_close(output.loss, sum(losses) / 2)


def test_a_perfect_prediction_reconstructs_the_image(monkeypatch):
    model = interactive(MODALITIES).eval()
    pictures = images(model)
    forward = type(model).forward

    def perfect(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.predictions = output.targets
        return output

    monkeypatch.setattr(type(model), "forward", perfect)
    torch.testing.assert_close(model.reconstruct(pictures)[0], pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"modalities": {"rgb": 3, "ir": 2}, "num_channels": 4},
            "modalities must add up to num_channels=4, got rgb",
        ),
        ({"modalities": {"RGB": 3}, "num_channels": 3}, "modalities must be names"),
        ({"modalities": {"rgb": 0, "ir": 3}}, "modalities must be names"),
        ({"modalities": {}, "num_channels": 3}, "modalities must be names"),
        ({"modalities_seen": ["radar"]}, "modalities must be one or more of rgb, ir, not radar"),
        ({"modalities_seen": []}, "modalities must be one or more of rgb, ir, not none"),
        ({"interaction_num_layers": -1}, "interaction_num_layers must be 0 or more, not -1"),
        ({"mask_ratio": 1}, "mask_ratio must leave between 1 and 63 of the 64 patches visible"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        interactive(**{"modalities": TWO, "num_channels": 4} | settings)
    with pytest.raises(ValueError, match="^modalities must be one or more of rgb, ir, not depth"):
        model = interactive()
        model.encoder(images(model), modalities=["depth"])


# ---- images that lack a modality: their infrared is 0 and not valid


def lacking(pictures, *rows):
    """The images with infrared taken from those in `rows`, and which pixels have data."""
    valid = torch.ones_like(pictures, dtype=torch.bool)
    valid[list(rows), 3] = False
    return pictures * valid, valid


@pytest.mark.parametrize("masking", ["independent", "shared"])
def test_an_image_without_infrared_has_the_tokens_of_rgb_alone(masking):
    encoder = interactive(modality_masking=masking).encoder.eval()
    if masking == "independent":
        torch.nn.init.normal_(encoder.embeddings.absent)
    pictures, valid = lacking(images(encoder), 0, 2)
    tokens = encoder(pictures, valid_pixels=valid).last_hidden_state
    alone, whole = encoder(pictures, modalities=["rgb"]), encoder(pictures)
    assert torch.equal(tokens[[0, 2]], alone.last_hidden_state[[0, 2]])
    assert torch.equal(tokens[[1, 3]], whole.last_hidden_state[[1, 3]])
    if masking == "independent":  # a black infrared would be another image
        assert not torch.allclose(tokens[0], whole.last_hidden_state[0], atol=1e-3)
    one = encoder(pictures[:, :3], modalities=["rgb"], valid_pixels=valid[:, :3])
    assert torch.equal(one.last_hidden_state, alone.last_hidden_state)
    ids = torch.stack([torch.randperm(64)[:9] for _ in range(4)])
    some = encoder(pictures, ids, valid_pixels=valid).last_hidden_state
    assert torch.equal(some[[0, 2]], encoder(pictures, ids, modalities=["rgb"]).last_hidden_state[[0, 2]])


def test_in_pretraining_an_image_without_infrared_is_one_whose_infrared_is_masked_everywhere():
    model = interactive().eval()
    torch.nn.init.normal_(model.encoder.embeddings.absent)
    masks = model.draw_masks(4, (8, 8))
    pictures, valid = lacking(images(model), 0, 2)
    hidden = masks["visible"].clone()
    hidden[[0, 2], :, 1] = False
    ours = model(pictures, valid_pixels=valid, **masks, output_hidden_states=True)
    masked = model(pictures, **masks | {"visible": hidden}, output_hidden_states=True)
    assert all(torch.equal(one, two) for one, two in zip(ours.hidden_states, masked.hidden_states, strict=True))
    assert torch.equal(ours.predictions, masked.predictions)


def test_the_infrared_that_an_image_lacks_has_no_share_in_the_loss():
    model = interactive().eval()
    masks = model.draw_masks(4, (8, 8))
    pictures, valid = lacking(images(model), 0, 2)
    output = model(pictures, valid_pixels=valid, **masks)
    errors, pixels = (output.predictions - output.targets).square(), 3 * 16
    rgb, ir = errors[..., :pixels].mean(), errors[[1, 3]][..., pixels:].mean()
    torch.testing.assert_close(output.loss, (rgb + ir) / 2)
    torch.testing.assert_close(output.metrics["reconstruction_ir"], ir.detach())
    none, valid = lacking(images(model), 0, 1, 2, 3)
    output = model(none, valid_pixels=valid, **masks)
    torch.testing.assert_close(output.loss.detach(), output.metrics["reconstruction_rgb"])
    assert output.metrics["reconstruction_ir"].isnan()
    output.loss.backward()
    assert model.decoder.heads[1].weight.grad.abs().sum() == 0


def test_modality_dropout_shows_one_modality_of_that_share_of_the_images_and_each_as_often():
    torch.manual_seed(0)
    model = interactive(MODALITIES, modality_dropout=0.5).train()
    visible = model.draw_masks(3000, (8, 8))["visible"].any(dim=1)
    alone = visible[visible.sum(dim=1) == 1]
    assert len(alone) / 3000 == pytest.approx(0.5, abs=0.05) and visible.sum(dim=1).unique().tolist() == [1, 3]
    torch.testing.assert_close(alone.float().mean(dim=0), torch.full((3,), 1 / 3), rtol=0, atol=0.05)


def test_a_modality_that_dropout_hides_is_predicted_and_never_reaches_the_encoder():
    model = interactive(modality_dropout=1).train()
    pictures, masks = images(model), model.draw_masks(4, (8, 8))
    rgb, ir = masks["visible"].any(dim=1).unbind(dim=1)
    assert torch.equal(rgb, ~ir)
    hidden = ~torch.stack([rgb, rgb, rgb, ir], dim=1)[..., None, None].expand_as(pictures)
    one = model(pictures, **masks)
    two = model(torch.where(hidden, torch.randn_like(pictures), pictures), **masks)
    assert torch.equal(one.predictions, two.predictions) and not torch.equal(one.targets, two.targets)


def test_without_a_training_no_modality_drops_out():
    model = interactive(modality_dropout=1).eval()
    assert model.draw_masks(4, (8, 8))["visible"].any(dim=1).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(modality_dropout=1.5), "modality_dropout must be between 0 and 1, not 1.5"),
        (dict(modality_dropout=0.1, modality_masking="shared"), "modality_dropout needs two modalities"),
        (dict(modality_dropout=0.1, modalities=None), "modality_dropout needs two modalities"),
    ],
)
def test_modality_dropout_that_can_do_nothing_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        interactive(**changes)
