"""Loads exported models where hf_mim cannot be imported: `python blind.py JOBS.json OUT.safetensors`.

JOBS is a list of [name, form, folder]; OUT gets what each model gives for the images in JOBS's folder, as
`name/output`. Not a test itself: tests/hub/test_export.py compares OUT with our models.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "hf_mim":
            raise ModuleNotFoundError("hf_mim is blocked")


sys.meta_path.insert(0, Blocked())
try:
    import hf_mim  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("hf_mim can be imported")


class TimmAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class TimmBlock(nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = TimmAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.activation = activation

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    """What timm's VisionTransformer does with these arguments, under its names."""

    def __init__(
        self,
        img_size,
        patch_size,
        in_chans,
        num_classes,
        global_pool,
        fc_norm,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        class_token,
        act_layer,
        reg_tokens=0,
    ):
        super().__init__()
        activation = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[act_layer]
        count = (img_size[0] // patch_size[0]) * (img_size[1] // patch_size[1]) + class_token + reg_tokens
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.num_prefix = class_token + reg_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, count, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.Sequential(*(TimmBlock(embed_dim, num_heads, hidden, activation) for _ in range(depth)))
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if fc_norm else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.global_pool = global_pool

    def forward_features(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        for token in (self.reg_token, self.cls_token):
            if token is not None:
                x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks(x + self.pos_embed))

    def forward_head(self, x):
        pooled = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix :].mean(dim=1)
        return self.head(self.fc_norm(pooled))


def timm_like(folder, images):
    """By the stand-in above: strict loading says that every key of timm's is there, and no other."""
    model = TimmViT(**json.loads((folder / "config.json").read_text())["model_args"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    features = model.forward_features(images)
    return {"features": features, "pooled": model.forward_head(features)}


def real_timm(folder, images):
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    known = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert list(timm.data.resolve_data_config(model=model)["mean"]) == known["mean"]
    features = model.forward_features(images)
    return {"features": features, "pooled": model.forward_head(features)}


def loaded(model_class, folder, **options):
    """A model of which nothing was drawn at random."""
    model, loading = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


def in_transformers(folder, images):
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = loaded(getattr(transformers, architecture), folder)
    if architecture == "ViTMAEForPreTraining":
        noise = torch.linspace(0, 1, model.vit.embeddings.patch_embeddings.num_patches).expand(len(images), -1)
        loss = model(images, noise=noise).loss
        model.vit.config.mask_ratio = 0.0
        in_order = model.vit(images, noise=noise)
        vit = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
        torch.testing.assert_close(vit(images).last_hidden_state, in_order.last_hidden_state, atol=1e-5, rtol=0)
        return {"features": in_order.last_hidden_state, "loss": loss}
    output = model(images)
    if hasattr(output, "logits"):
        return {"pooled": output.logits}
    pooler = {} if output.pooler_output is None else {"cls": output.pooler_output}
    return {"features": output.last_hidden_state} | pooler


def by_remote_code(folder, images):
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
    )

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    backbone_class = type(AutoBackbone.from_config(config, trust_remote_code=True))
    backbone = backbone_class.from_pretrained(folder).eval()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    result = {"map": backbone(images).feature_maps[-1]}
    if "ForImageClassification" in config.architectures[0]:
        classifier = loaded(AutoModelForImageClassification, folder, trust_remote_code=True)
        return result | {"pooled": classifier(images).logits}
    if "ForPreTraining" in config.architectures[0]:
        whole = loaded(AutoModelForPreTraining, folder, trust_remote_code=True)
        torch.manual_seed(0)
        result["loss"] = whole(torch.nn.functional.interpolate(images, config.training_size)).loss
    output = model(images)
    return result | {"features": output.last_hidden_state, "pooled": output.pooler_output}


def from_the_hub(folder, images):
    """`folder` is a repository's name."""
    from transformers import AutoBackbone, AutoModel

    backbone = AutoBackbone.from_pretrained(str(folder), trust_remote_code=True).eval()
    output = AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()(images)
    maps = backbone(images).feature_maps
    return {"features": output.last_hidden_state, "pooled": output.pooler_output, "map": maps[-1]}


def in_onnxruntime(folder, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    whole = session.run(None, {"pixel_values": images.numpy()})
    alone = [session.run(None, {"pixel_values": image.numpy()}) for image in images.split(1)]
    for together, single in zip(whole, zip(*alone, strict=True), strict=True):  # any batch
        torch.testing.assert_close(
            torch.from_numpy(together), torch.cat([*map(torch.tensor, single)]), atol=1e-5, rtol=0
        )
    output = dict(zip(names, map(torch.from_numpy, whole), strict=True))
    return {"features": output["last_hidden_state"], "pooled": output.get("logits", output["pooler_output"])}


FORMS = {
    "transformers": in_transformers,
    "timm": timm_like,
    "real timm": real_timm,
    "remote-code": by_remote_code,
    "hub": from_the_hub,
    "onnx": in_onnxruntime,
}


@torch.no_grad()
def main(jobs, out):
    results = {}
    for name, form, folder in json.loads(Path(jobs).read_text()):
        images = load_file(Path(jobs).parent / f"{name}.safetensors")["images"]
        for key, tensor in FORMS[form](Path(folder), images).items():
            results[f"{name}/{form}/{key}"] = tensor.detach().contiguous()
    assert not any(module.partition(".")[0] == "hf_mim" for module in sys.modules)
    save_file(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
