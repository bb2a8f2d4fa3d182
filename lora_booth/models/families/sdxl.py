"""SDXL (arXiv 2307.01952): two text encoders, and the size and crop of each image as inputs.

Conditioning: `embeddings` `[B, tokens, 768 + 1280]`, the penultimate hidden states of both encoders side by side,
without final norm; `pooled` `[B, 1280]`, the second encoder's projected end token; `is_empty` bool `[B]`, true for the
empty prompt, which the base may want as zeros when it is the negative of guidance (`force_zeros_for_empty_prompt`),
never in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import read_json
from lora_booth.models.families.components import Components, quiet
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.families.schedules import solver

ENCODERS = ("text_encoder", "text_encoder_2")


class StableDiffusionXL(Family):
    """The family "sdxl"."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        super().__init__(facts, parts)
        layers = [facts.number(name, "num_hidden_layers", 12) for name in ENCODERS]
        # The first encoder's last layer reaches nothing; the second's reaches the pooled prompt.
        self.num_used_text_layers = dict(zip(ENCODERS, (layers[0] - 1, layers[1]), strict=True))
        index = read_json(facts.configs / "model_index.json")
        self._has_zero_negatives = bool(index.get("force_zeros_for_empty_prompt", True))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        encoders = self.text_encoders()
        outputs = []
        for name in ENCODERS:
            ids = self._tokens[name].ids(prompts).to(self.device)
            outputs.append(encoders[name](ids, output_hidden_states=True))
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {
            "embeddings": embeddings.to(self._dtype),
            "pooled": outputs[1].text_embeds.to(self._dtype),
            "is_empty": torch.tensor([prompt == "" for prompt in prompts], device=self.device),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        # Sizes stay float32: bf16 has 8 bits and would make 1365 of 1367. The UNet casts their sinusoids.
        sizes = {"text_embeds": conditioning["pooled"].to(self._dtype), "time_ids": geometry.to(self.device).float()}
        embeddings = conditioning["embeddings"].to(self._dtype)
        predicted: Tensor = self.denoiser(
            noisy.to(self._dtype),
            timesteps.to(noisy.device),
            encoder_hidden_states=embeddings,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return predicted

    def pipeline(self, sampler: str) -> Any:
        with quiet():
            from diffusers import StableDiffusionXLPipeline

        pipeline: Any = StableDiffusionXLPipeline(
            vae=self._vae.module,
            **{name: self._encoders.get(name) for name in ENCODERS},
            tokenizer=self._tokens["text_encoder"].tokenizer,
            tokenizer_2=self._tokens["text_encoder_2"].tokenizer,
            unet=self.denoiser,
            scheduler=solver(sampler, self._solver_config, self.schedule),
            force_zeros_for_empty_prompt=self._has_zero_negatives,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(self, prompt: Conditioning, negative: Conditioning) -> dict[str, Any]:
        inputs = {}
        for prefix, rows in (("", prompt), ("negative_", negative)):
            for key, name in (("prompt_embeds", "embeddings"), ("pooled_prompt_embeds", "pooled")):
                inputs[prefix + key] = rows[name].to(self.device, self._dtype)
        if self._has_zero_negatives:
            is_empty = negative["is_empty"].to(self.device).bool()
            for key in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
                value = inputs[key]
                inputs[key] = value.masked_fill(is_empty.view(-1, *[1] * (value.ndim - 1)), 0.0)
        return inputs
