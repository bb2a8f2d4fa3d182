"""Stable Diffusion 1.x and 2.x: one text encoder, its last hidden states after the final norm.

2.x ships its encoder with 23 of 24 layers, so "last" is what its authors trained on in both. Epsilon or v-prediction
comes from the scheduler's config. Conditioning: `embeddings` `[B, tokens, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import Components, quiet
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.families.schedules import solver


class StableDiffusion(Family):
    """The family "sd1" and "sd2"."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        super().__init__(facts, parts)
        self.num_used_text_layers = {"text_encoder": facts.number("text_encoder", "num_hidden_layers", 12)}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        encoder = self.text_encoders()["text_encoder"]
        ids = self._tokens["text_encoder"].ids(prompts).to(self.device)
        return {"embeddings": encoder(ids).last_hidden_state.to(self._dtype)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        embeddings, noisy = conditioning["embeddings"].to(self._dtype), noisy.to(self._dtype)
        timesteps = timesteps.to(noisy.device)
        predicted: Tensor = self.denoiser(noisy, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]
        return predicted

    def pipeline(self, sampler: str) -> Any:
        with quiet():
            from diffusers import StableDiffusionPipeline

        pipeline: Any = StableDiffusionPipeline(
            vae=self._vae.module,
            text_encoder=self._encoders.get("text_encoder"),
            tokenizer=self._tokens["text_encoder"].tokenizer,
            unet=self.denoiser,
            scheduler=solver(sampler, self._solver_config, self.schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(self, prompt: Conditioning, negative: Conditioning) -> dict[str, Any]:
        pairs = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        return {key: rows["embeddings"].to(self.device, self._dtype) for key, rows in pairs.items()}
