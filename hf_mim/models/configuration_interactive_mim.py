"""Configuration of Interactive MIM (Vu et al., arXiv 2409.08885)."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_decoder, fill_decoder_sizes, num_visible


@strict
class InteractiveMIMConfig(MIMConfig):
    """A ViT encoder on the visible patches of several modalities of one scene, such as RGB and infrared, and a decoder
    in which masked tokens attend to the visible ones before their pixels are predicted.

    No code of the paper was released. What it leaves open is decided here: see `InteractiveMIMForPreTraining`.

    Args:
        modalities: name → number of channels, in the order of the channels of an image, such as `{rgb: 3, ir: 1}`;
            default: all channels are one modality.
        modalities_seen: the modalities that the encoder reads in an ordinary pass; default: all.
        modality_masking: "independent" masks each modality by itself, so that a place can be visible in one and masked
            in another; "shared" masks the same places in all.
        modality_dropout: share of the images in training of which the encoder sees a single modality, drawn at random,
            so that it learns to do without the others; only with independent masks.
        mask_ratio: share of the patches of each modality that is masked; `int(N · (1 - mask_ratio))` stay visible.
        norm_pix_loss: reconstruct each patch of a modality standardised by its own mean and variance.
        interaction_num_layers: cross-attention blocks in which the masked tokens read the visible ones; 0: none.
        decoder_num_hidden_layers: blocks of the light transformer after them.
        decoder_hidden_size, decoder_num_attention_heads: as in `MAEConfig`.

    The rest is in `MIMConfig`.
    """

    model_type = "interactive_mim"

    modalities: dict | list | None = None
    modalities_seen: list[str] | None = None
    modality_masking: Literal["independent", "shared"] = "independent"
    modality_dropout: float | int = 0.0
    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    interaction_num_layers: int = 2
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        if self.modalities is None:
            self.modalities = {"image": self.num_channels}
        if isinstance(self.modalities, dict):  # JSON would sort the names
            self.modalities = [list(item) for item in self.modalities.items()]
        self.check_fields()

    def check_fields(self) -> None:
        super().check_fields()
        check_decoder(self)
        self.check_modalities()
        self.num_visible(self.grid_size)
        if not 0 <= self.modality_dropout <= 1:
            raise ValueError(f"modality_dropout must be between 0 and 1, not {self.modality_dropout}")
        if self.modality_dropout and (len(self.modalities) == 1 or self.modality_masking == "shared"):
            raise ValueError("modality_dropout needs two modalities and modality_masking=independent")
        if self.interaction_num_layers < 0:
            raise ValueError(f"interaction_num_layers must be 0 or more, not {self.interaction_num_layers}")

    def check_modalities(self) -> None:
        """Raise ValueError for modalities that are not those of `num_channels` channels."""
        pairs: list[Any] = [item for item in self.modalities if isinstance(item, list | tuple) and len(item) == 2]
        right = [
            isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name) and isinstance(count, int) and count > 0
            for name, count in pairs
        ]
        if not (pairs and all(right) and len(dict(pairs)) == len(self.modalities)):
            raise ValueError(
                "modalities must be names (small letters, digits, underscores) with numbers of channels, such as "
                f"{{rgb: 3, ir: 1}}, not {self.modalities}"
            )
        counts = self.modality_channels.values()
        if sum(counts) != self.num_channels:
            told = " + ".join(f"{name} {count}" for name, count in self.modalities)
            raise ValueError(f"modalities must add up to num_channels={self.num_channels}, got {told} = {sum(counts)}")
        if self.norm_pix_loss and min(counts) * math.prod(self.patch_height_width) < 2:
            raise ValueError("norm_pix_loss must be False for patches of a single value, which have no variance")
        if self.modalities_seen is not None:
            self.check_seen(self.modalities_seen)

    def check_seen(self, names: Sequence[str]) -> None:
        """Raise ValueError unless these are modalities, one at least."""
        known = self.modality_channels
        if not names or any(name not in known for name in names):
            given = ", ".join(map(str, names)) or "none"
            raise ValueError(f"modalities must be one or more of {', '.join(known)}, not {given}")

    @property
    def modality_channels(self) -> dict[str, int]:
        """Name → number of channels, in the order of the channels."""
        return dict(self.modalities)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """How many patches of each modality stay visible. Raises ValueError if that is none or all."""
        return num_visible(self.mask_ratio, grid, rounding=int)

    @property
    def channels_of_modalities(self) -> dict[str, slice]:
        """Name → its channels."""
        found, start = {}, 0
        for name, count in self.modalities:
            found[name] = slice(start, start + count)
            start += count
        return found
