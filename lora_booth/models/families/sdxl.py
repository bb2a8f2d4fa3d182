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
from torch import Tensor, nn

from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import read_json
from lora_booth.models.families.components import Components, compile_unet_, prepare_unet_, quiet
from lora_booth.models.families.family import Conditioning
from lora_booth.models.families.quantize import move_frozen_
from lora_booth.models.families.schedules import noise_schedule, solver

ENCODERS = ("text_encoder", "text_encoder_2")


class StableDiffusionXL:
    """The family "sdxl"; see `base.Family` for what each method promises."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        self.name = facts.family
        self.native_resolution = facts.native_resolution
        self.bucket_step = facts.bucket_step
        self._solver_config = facts.config("scheduler")
        self.schedule = noise_schedule(self._solver_config, source=facts.path)
        layers = [facts.number(name, "num_hidden_layers", 12) for name in ENCODERS]
        # The first encoder's last layer reaches nothing; the second's reaches the pooled prompt.
        self.num_used_text_layers = dict(zip(ENCODERS, (layers[0] - 1, layers[1]), strict=True))
        self.denoiser, self.device = parts.unet, parts.device
        self._vae, self._encoders, self._tokens = parts.vae, dict(parts.text_encoders), parts.tokens
        index = read_json(facts.configs / "model_index.json")
        self._has_zero_negatives = bool(index.get("force_zeros_for_empty_prompt", True))

    def tokenizers(self) -> dict[str, Any]:
        return {name: tokens.tokenizer for name, tokens in self._tokens.items()}

    def text_encoders(self) -> dict[str, nn.Module]:
        assert self._encoders, "the text encoders were released, or never loaded"
        return dict(self._encoders)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert self._vae is not None, "the VAE was not loaded"
        return self._vae.encode(pixels)

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

    def words_cut(self, prompts: Sequence[str]) -> dict[str, str]:
        return self._tokens["text_encoder"].cut(prompts)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        # Sizes stay float32: bf16 has 8 bits and would make 1365 of 1367. The UNet casts their sinusoids.
        sizes = {"text_embeds": conditioning["pooled"].to(self._dtype), "time_ids": geometry.to(self.device).float()}
        embeddings = conditioning["embeddings"].to(self._dtype)
        return self.denoiser(
            noisy.to(self._dtype),
            timesteps.to(noisy.device),
            encoder_hidden_states=embeddings,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]

    def pipeline(self, sampler: str) -> Any:
        with quiet():
            from diffusers import StableDiffusionXLPipeline

        assert self._vae is not None, "the VAE was not loaded"
        pipeline = StableDiffusionXLPipeline(
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
