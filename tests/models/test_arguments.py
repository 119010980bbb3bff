"""What `forward` takes: no argument is swallowed, and hidden states, attentions and tuples are as in transformers."""

import pytest
import torch
from tiny import METHODS, make_model

from hf_mim.models.masking import gather


def images_for(model):
    return torch.randn(2, model.config.num_channels, *torch.Size(model.config.training_size))


@pytest.mark.parametrize("kind", ["pretraining", "encoder", "classifier", "backbone"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bool_masked_pos", "patch_idz", "interpolate_pos_encoding"])
def test_an_argument_that_does_not_exist_is_an_error(method, kind, name):
    model = make_model(method, kind)
    images = images_for(model) if kind == "pretraining" else torch.randn(2, 3, 24, 24)
    with pytest.raises(TypeError, match=name):
        model(images, **{name: torch.zeros(2, 36, dtype=torch.bool)})


def context_of(model, images, output):
    """(the patches of the context, their grid), as the pretraining model cuts them."""
    if "patch_offsets" in output:
        patches, grid, _ = model.draw(
            images, output.patch_offsets, context_ids=output.context_ids, target_ids=output.target_ids
        )
    else:
        patches, grid = model.encoder.cut(images)
    return gather(patches, output.context_ids), grid


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_and_attentions_are_those_of_the_encoder_of_the_context_by_itself(method):
    model = make_model(method, attn_implementation="eager").eval()
    images = images_for(model)
    output = model(images, output_hidden_states=True, output_attentions=True)
    patches, grid = context_of(model, images, output)
    encoder, ids = model.encoder, output.context_ids
    states = [encoder.embeddings(patches, grid, ids)]
    weights = []
    for layer in encoder.layers:
        weights.append(layer.attention(layer.norm1(states[-1]))[1])
        states.append(layer(states[-1]))
    assert len(output.hidden_states) == len(states) and len(output.attentions) == len(weights)
    for ours, theirs in zip((*output.hidden_states, *output.attentions), (*states, *weights), strict=True):
        assert torch.equal(ours, theirs)
    if "patch_offsets" not in output:  # then the encoder by itself sees the same patches
        alone = encoder(images, ids, output_hidden_states=True, output_attentions=True)
        for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(output.attentions, alone.attentions, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_recorded_changes_no_number_and_leaves_no_hook(method):
    model = make_model(method)
    images = images_for(model)
    torch.manual_seed(0)
    plain = model(images)
    torch.manual_seed(0)
    recorded = model(images, output_hidden_states=True)
    assert torch.equal(plain.loss, recorded.loss) and plain.hidden_states is None and recorded.attentions is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    recorded.loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_config_can_ask_for_hidden_states_and_for_tuples(method):
    model = make_model(method)
    images = images_for(model)
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == model.config.num_hidden_layers + 1
    assert model(images, output_hidden_states=False).hidden_states is None
    as_tuple = model(images, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0
    assert any(isinstance(part, tuple) and len(part) == model.config.num_hidden_layers + 1 for part in as_tuple)


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_still_takes_what_trainer_gives_to_the_loss(method):
    model = make_model(method, "classifier", num_labels=3)
    output = model(torch.randn(2, 3, 24, 24), labels=torch.tensor([0, 2]), num_items_in_batch=torch.tensor(2))
    assert output.loss.isfinite()
