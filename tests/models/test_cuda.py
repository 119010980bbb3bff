"""What only an accelerator can show; skipped without one."""

import pytest
import torch
from passes import given_back
from passes import make as make_small
from tiny import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(method):
    model = make_small(method, image_size=64, patch_size=8, hidden_size=96)
    return model, torch.randn(8, 3, *model.config.training_size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_drawn_masks_never_waits_for_the_device(method, dtype):
    model, images = make(method)
    model, images = model.cuda().train(), images.cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step():
        model.set_progress(0.5)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(0.5)
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_the_device_gives_the_losses_of_the_cpu(method):
    model, images = make(method)
    drawn = model.eval()(images)
    given = {name: tensor.cuda() for name, tensor in given_back(drawn).items()}
    loss = model.cuda()(images.cuda(), **given).loss
    torch.testing.assert_close(loss.cpu(), drawn.loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_gives_the_loss_of_an_eager_one(method):
    model, images = make(method)
    model, images = model.cuda().eval(), images.cuda()
    drawn = model(images)
    torch.testing.assert_close(torch.compile(model)(images, **given_back(drawn)).loss, drawn.loss, rtol=1e-4, atol=0)
