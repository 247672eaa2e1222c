"""``kind: clip``: CLIP from a local folder, asked which of several texts an image is closest to.

Zero-shot classification with prompt ensembling (Radford et al., arXiv 2103.00020, section 3.1.4): a class is the
mean of its prompts' normalised embeddings, an image gets the class of the highest cosine similarity.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sfd_deploy.errors import ModelError
from sfd_deploy.measure.foreign.config import ForeignConfig
from sfd_deploy.models.text.tokens import read_tokenizer, require_within_limit, transformers
from sfd_deploy.runtime.seam import to_uint8

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NEEDED = (CONFIG, "preprocessor_config.json", "vocab.json", "merges.txt")
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
BATCH = 32


class ClipJudge(ForeignConfig):
    """A folder as ``CLIPModel`` and ``CLIPProcessor`` save it, weights in safetensors."""

    kind: Literal["clip"] = Field(description="CLIP, zero-shot")
    classes: dict[str, tuple[str, ...]] = Field(min_length=2, description="class → one prompt, or several")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classes)

    @field_validator("classes", mode="before")
    @classmethod
    def one_prompt_is_a_list_of_one(cls, classes: Any) -> Any:
        found = classes.items() if isinstance(classes, dict) else ()
        return {name: (texts,) if isinstance(texts, str) else texts for name, texts in found} or classes

    @field_validator("classes")
    @classmethod
    def classes_need_prompts(cls, classes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, texts in classes.items():
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"class {name} has an empty prompt, or none")
        return classes

    def files(self, source: Path) -> dict[str, Path]:
        weights = clip_weights(source)
        if missing := next((name for name in NEEDED if not (source / name).is_file()), None):
            raise ModelError(
                f"{missing} is missing", "save the folder with CLIPModel's and CLIPProcessor's save_pretrained"
            )
        present = [name for name in OPTIONAL if (source / name).is_file()]
        return {name: source / name for name in (*NEEDED, *present, *weights)}

    def open(self, model: Path) -> ClipSight:
        folder = model.parent
        clip_weights(folder)  # again: somebody else may have sealed the folder, and weights outside it have no digest
        network, processor = read_clip(folder)
        classes = embedded_classes(network, read_tokenizer(folder), tuple(self.classes.values()))
        return ClipSight(network, processor, classes)


@dataclass(frozen=True)
class ClipSight:
    """CLIP's image half, and the classes' embeddings (K, D)."""

    network: Any
    processor: Any
    classes: Tensor

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) and normalised image embeddings (B, D) of images (B, C, H, W) in [-1, 1]."""
        features = torch.cat([self._embedded(part) for part in images.split(BATCH)])
        return (features @ self.classes.T).argmax(1), features

    def _embedded(self, images: Tensor) -> Tensor:
        pictures = to_uint8(images.expand(-1, 3, -1, -1).numpy()).transpose(0, 2, 3, 1)
        pixels = self.processor(
            images=list(pictures), input_data_format="channels_last", return_tensors="pt"
        ).pixel_values
        return nn.functional.normalize(self.network.get_image_features(pixel_values=pixels), dim=1)


def clip_weights(source: Path) -> list[str]:
    """Names of the weight files of a folder: one safetensors file, or an index and its shards.

    Raises:
        ModelError: not CLIP's folder, or weights in a pickle alone.
    """
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        index = json.loads((source / INDEX).read_text(encoding="utf-8")) if (source / INDEX).is_file() else None
        shards = [] if index is None else sorted(set(index["weight_map"].values()))
        kind = config.get("model_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"not a readable CLIP folder ({type(error).__name__})", "give CLIPModel's") from None
    if kind != "clip":
        raise ModelError(f"{CONFIG} says model_type {kind}", "give a folder of CLIPModel: model_type clip")
    names = [INDEX, *shards] if shards else [WEIGHTS]
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise ModelError(
                f"no weights in {name}, and pickled ones are not read",
                "save the model with save_pretrained(FOLDER, safe_serialization=True)",
            )
    return names


def read_clip(folder: Path) -> tuple[Any, Any]:
    """CLIPModel of a folder, every weight of it read, and the folder's image processor.

    Raises:
        ModelError: weights that are damaged, or missing: transformers would fill them with random numbers.
        BackendError: transformers is not installed.
    """
    from safetensors import SafetensorError

    package = transformers()
    try:
        network, found = package.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        processor = package.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"it cannot be loaded ({reason})", "save it again") from None
    if found["missing_keys"]:
        raise ModelError(f"its weights lack {sorted(found['missing_keys'])[0]}", "give the whole CLIPModel")
    return network.eval().requires_grad_(False), processor


@torch.inference_mode()
def embedded_classes(network: Any, tokenizer: Any, classes: Sequence[Sequence[str]]) -> Tensor:
    """A row a class (K, D): the mean of its prompts' normalised embeddings, normalised again.

    Raises:
        PromptError: a prompt is longer than the text encoder reads.
    """
    rows = []
    for texts in classes:
        require_within_limit(tokenizer, texts)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        found = network.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        rows.append(nn.functional.normalize(found, dim=1).mean(0))
    return nn.functional.normalize(torch.stack(rows), dim=1)
