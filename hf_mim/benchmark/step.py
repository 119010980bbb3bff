"""`hf-mim benchmark step`: images/s, FLOPs and share of the matrix ceiling of full training steps."""

import collections
import contextlib
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_mim import methods
from hf_mim.checks import least
from hf_mim.pretraining.settings import suggestion, to_type

THEIRS = "transformers_mae"


def all_methods() -> list[str]:
    return [*(method.name for method in methods.rows()), THEIRS]


@dataclass
class Benchmark:
    """Images/s, FLOPs and share of the matrix ceiling of a training step.

    A step is forward with random masks, backward, AdamW and target update, on one batch that is on the device already.
    transformers' ViTMAEForPreTraining is measured beside MAE, with the same sizes, masks and loss. A new model of
    transformers has position tables of zeros; they are filled with MAE's, so that both do the same work. hf-mim plan
    takes the ceiling as --tflops and the share as --mfu.

    Args:
        methods: the methods to measure, which take turns
        size: tiny, small, base, large, huge or giant
        image_size: side of the images
        patch_size: side of a patch
        batch_size: images of a step
        device: cpu or cuda
        dtype: precision of the autocast
        masks_per_image: numbers of masks, as 1,4; each method is measured with those that it takes (SymMIM takes 1 and
            2, I-JEPA and StoP-JEPA any, the others 1), and masks/s compares them
        config: other fields of the config, as {context_scale: [0.4, 0.6]}; each method gets those that it has and that
            do not make it what it is: I-JEPA gets no position_noise_std
        compile: torch.compile the model
        steps: timed steps
        warmup: steps before the timed ones
        mask_draws: random masks over which FLOPs are averaged
    """

    methods: list[str] = field(default_factory=all_methods)
    size: str = "base"
    image_size: int = 224
    patch_size: int = 16
    batch_size: int = 8
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    masks_per_image: list[int] = field(default_factory=lambda: [1])
    config: dict = field(default_factory=dict)
    compile: bool = False
    steps: int = 10
    warmup: int = 2
    mask_draws: int = 20

    def __post_init__(self):
        least(1, batch_size=self.batch_size, steps=self.steps, mask_draws=self.mask_draws)
        least(1, masks_per_image=min(self.masks_per_image))
        least(0, warmup=self.warmup)
        known = {name for method in self.methods for name in config_fields(method)}
        for name in sorted(self.config.keys() - (known - {"size", "image_size", "patch_size", "masks_per_image"})):
            told = f": give it as --{name}" if name in known else suggestion(name, known)
            raise ValueError(f"config must have fields of {', '.join(self.methods)}, not {name!r}{told}")
        for method in self.methods:
            make_config(method, self)  # raises for mistakes
        for number in self.masks_per_image:
            if not any(takes_masks(method, self, number) for method in self.methods):
                told = f"numbers that one of the methods takes ({', '.join(self.methods)})"
                raise ValueError(f"masks_per_image must be {told}, not {number}")
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where there is no CUDA, not cuda")

    def __call__(self) -> dict:
        import torch

        device, dtype = torch.device(self.device), getattr(torch, self.dtype)
        ceiling, products = matrix_ceiling(device, dtype)
        runs, masks = {}, {}
        for method, number in contestants(self):
            torch.manual_seed(0)
            flops = count_flops(method, self, number)
            model, images = contestant(method, self, number)
            name = method if number == 1 else f"{method}, {number} masks"
            runs[name] = flops, training_step(model.to(device).train(), images.to(device), dtype, self.compile)
            masks[name] = number
        seconds = {method: [] for method in runs}
        for round_ in range(self.warmup + self.steps):
            for method, (_, step) in runs.items():
                elapsed = timed(step, device)
                if round_ >= self.warmup:
                    seconds[method].append(elapsed)
        medians = {method: statistics.median(times) for method, times in seconds.items()}
        mode = "compiled" if self.compile else "eager"
        print(f"ViT-{self.size}/{self.patch_size}, {self.image_size} px, batch {self.batch_size}, {self.dtype}, {mode}")
        print(f"matrix ceiling {ceiling / 1e12:.3f} TFLOP/s; median of {self.steps} steps\n")
        rates = f"{'s/step':>9}{'images/s':>10}{'masks/s':>10}"
        print(f"{'method':<20}{rates}{'GFLOP/image':>14}{'of ceiling':>12}{'speed':>8}")
        result = {"matrix_ceiling_tflops": ceiling / 1e12, "matrix_seconds": products, "methods": {}}
        last = [*runs][-1]
        for method, (flops, _) in runs.items():
            rate = self.batch_size / medians[method]
            share, speed = flops * rate / ceiling, medians[last] / medians[method]
            rates = f"{medians[method]:>9.3f}{rate:>10.2f}{rate * masks[method]:>10.2f}"
            print(f"{method:<20}{rates}{flops / 1e9:>14.2f}{share:>11.1%}{speed:>7.2f}x")
            result["methods"][method] = {
                "images_per_second": rate,
                "masks_per_second": rate * masks[method],
                "gflop_per_image": flops / 1e9,
                "share_of_ceiling": share,
                "speed_over_" + last: speed,
                "seconds": seconds[method],
            }
        return result


def contestants(args) -> list[tuple[str, int]]:
    """Which methods are measured, with how many masks per image. A method that takes none of the numbers has one."""
    found = []
    for method in args.methods:
        fitting = [number for number in args.masks_per_image if takes_masks(method, args, number)]
        found += [(method, number) for number in fitting or [1]]
    return found


def takes_masks(method: str, args, number: int) -> bool:
    """Whether a method can have so many masks of an image."""
    if number == 1:
        return True
    if method == THEIRS or "masks_per_image" not in config_fields(method):
        return False
    with contextlib.suppress(ValueError):
        return bool(make_config(method, args, number))
    return False


def row_of(method: str) -> methods.Method:
    return methods.MAE if method == THEIRS else methods.get(method)


def config_fields(method: str) -> dict[str, Any]:
    """Name → type of what `config` may hold for a method: its fields without those that make it this variant."""
    from hf_mim.pretraining.recipe import model_fields

    row = row_of(method)
    return {name: hint for name, hint in model_fields(row.name).items() if name not in row.settings}


def make_config(method: str, args, masks_per_image: int = 1):
    row, hints = row_of(method), config_fields(method)
    given = {name: to_type(name, value, hints[name]) for name, value in args.config.items() if name in hints}
    if masks_per_image > 1:
        given["masks_per_image"] = masks_per_image
    sizes = dict(size=args.size, image_size=args.image_size, patch_size=args.patch_size)
    return row.config_class(**sizes, **row.settings | given)


def contestant(method: str, args, masks_per_image: int = 1):
    """A pretraining model on the CPU and a batch for it."""
    import torch

    config = make_config(method, args, masks_per_image)
    if method == THEIRS:
        model = filled_transformers_mae(config)
    else:
        model = methods.get(method).pretraining_class(config)
    return model, torch.randn(args.batch_size, 3, *config.training_size)


def filled_transformers_mae(config):
    """transformers' MAE of the same sizes, with the position tables that it leaves at zero."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from hf_mim.models.positions import sincos_table

    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("layer_norm_eps", "mask_ratio", "norm_pix_loss", "decoder_hidden_size", "decoder_num_hidden_layers")
    names += ("decoder_num_attention_heads",)
    theirs = {name: getattr(config, name) for name in names}
    model = ViTMAEForPreTraining(ViTMAEConfig(**theirs, decoder_intermediate_size=4 * config.decoder_hidden_size))
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data.copy_(sincos_table(config.grid_size, table.shape[-1], num_prefix_tokens=1)[None])
    return model


def training_step(model, images, dtype, compiled: bool):
    """One full step as a function without arguments."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=images.is_cuda)
    forward = torch.compile(model) if compiled else model
    update_target = getattr(model, "update_target", lambda progress: None)  # transformers' has no such call

    def step():
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = forward(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_target(0.5)

    return step


def count_flops(method: str, args, masks_per_image: int = 1) -> float:
    """FLOPs of a step per image, forward and backward: the mean over `args.mask_draws` random masks.

    Nothing is computed, because the tensors are fake. The masks are drawn before that: their size can be random too
    (StoP-JEPA). Masks of the same size are counted once.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hf_mim.testing import counted_flops

    with torch.device("meta"):  # initialisation reads the weights that it draws, and fake tensors have no values
        model, images = contestant(method, args, masks_per_image)
    drawn = [{}]
    if method != THEIRS:
        asked = len(images), model.config.grid_size, "meta"
        drawn = [model.draw_masks(*asked, **model.training_masks()) for _ in range(args.mask_draws)]
    sizes = collections.Counter(tuple((name, x.shape, x.dtype) for name, x in masks.items()) for masks in drawn)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.empty(images.shape)
        flops = {
            size: sum(counted_flops(model, images, **{name: torch.zeros(*shape, dtype=t) for name, shape, t in size}))
            for size in sizes
        }
    return sum(flops[size] * count for size, count in sizes.items()) / len(drawn) / len(images)


def matrix_ceiling(device, dtype) -> tuple[float, list[float]]:
    """FLOP/s of the fastest of five square matrix products, and the seconds of each."""
    import torch

    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timed(lambda: a @ b, device)
    seconds = [timed(lambda: a @ b, device) for _ in range(5)]
    return 2 * side**3 / min(seconds), seconds


def timed(function, device) -> float:
    """Seconds of one call, including the work that it started on the device."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start
