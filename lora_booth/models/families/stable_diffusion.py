"""Stable Diffusion 1.x and 2.x: one text encoder, its last hidden states after the final norm.

2.x ships its encoder with 23 of 24 layers, so "last" is what its authors trained on in both. Epsilon or v-prediction
comes from the scheduler's config. Conditioning: `embeddings` `[B, tokens, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import Components, compile_unet_, prepare_unet_, quiet
from lora_booth.models.families.family import Conditioning
from lora_booth.models.families.quantize import move_frozen_
from lora_booth.models.families.schedules import noise_schedule, solver


class StableDiffusion:
    """The family "sd1" and "sd2"; see `base.Family` for what each method promises."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        self.name = facts.family
        self.native_resolution = facts.native_resolution
        self.bucket_step = facts.bucket_step
        self._solver_config = facts.config("scheduler")
        self.schedule = noise_schedule(self._solver_config, source=facts.path)
        self.num_used_text_layers = {"text_encoder": facts.number("text_encoder", "num_hidden_layers", 12)}
        self.denoiser, self.device = parts.unet, parts.device
        self._vae, self._encoders, self._tokens = parts.vae, dict(parts.text_encoders), parts.tokens

    def tokenizers(self) -> dict[str, Any]:
        return {name: tokens.tokenizer for name, tokens in self._tokens.items()}

    def text_encoders(self) -> dict[str, nn.Module]:
        assert self._encoders, "the text encoders were released, or never loaded"
        return dict(self._encoders)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert self._vae is not None, "the VAE was not loaded"
        return self._vae.encode(pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        encoder = self.text_encoders()["text_encoder"]
        ids = self._tokens["text_encoder"].ids(prompts).to(self.device)
        return {"embeddings": encoder(ids).last_hidden_state.to(self._dtype)}

    def words_cut(self, prompts: Sequence[str]) -> dict[str, str]:
        return self._tokens["text_encoder"].cut(prompts)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        embeddings, noisy = conditioning["embeddings"].to(self._dtype), noisy.to(self._dtype)
        timesteps = timesteps.to(noisy.device)
        return self.denoiser(noisy, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]

    def pipeline(self, sampler: str) -> Any:
        with quiet():
            from diffusers import StableDiffusionPipeline

        assert self._vae is not None, "the VAE was not loaded"
        scheduler = solver(sampler, self._solver_config, self.schedule)
        pipeline = StableDiffusionPipeline(
            vae=self._vae.module,
            text_encoder=self._encoders.get("text_encoder"),
            tokenizer=self._tokens["text_encoder"].tokenizer,
            unet=self.denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(self, prompt: Conditioning, negative: Conditioning) -> dict[str, Any]:
        pairs = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        return {key: rows["embeddings"].to(self.device, self._dtype) for key, rows in pairs.items()}

    def decode_latents(self, latents: Tensor, *, is_tiled: bool = False) -> Tensor:
        assert self._vae is not None, "the VAE was not loaded"
        return self._vae.decode(latents, is_tiled=is_tiled)

    def move_vae(self, device: torch.device | str) -> None:
        assert self._vae is not None, "the VAE was not loaded"
        self._vae.module.to(device)

    def move_denoiser(self, device: torch.device | str) -> None:
        move_frozen_(self.denoiser, device)

    def release_text_encoders(self) -> None:
        self._encoders.clear()

    def prepare_denoiser_(self, *, gradient_checkpointing: float, attention: str, is_offloading: bool = False) -> None:
        prepare_unet_(self.denoiser, gradient_checkpointing, attention, is_offloading=is_offloading)

    def compile_denoiser_(self) -> None:
        compile_unet_(self.denoiser)

    @property
    def _dtype(self) -> torch.dtype:
        return self.denoiser.conv_in.weight.dtype  # of the base: adapters in other layers are float32
