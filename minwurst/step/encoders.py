"""The two frozen encoders: what turns images and captions into what the prior works on.

    samples = encoders.samples(data, run)
    latents, condition = encoders.encode(batch)      # (B, 16, h, w), {"text": (B, 77, D)}

The condition is a dict that is passed on unread, to the cache, the loop, the sampler and finally
the network as keyword arguments: model(noisy, t, **condition). With --cache_latents, EncodedRows in
edge/cache.py takes the encoders' place, with the same methods.
"""

import functools

import torch

from minwurst.base.console import say
from minwurst.step import diffusion
from minwurst.step.distributed import to_device
from minwurst.step.samples import Samples


class Encoders:
    """The text encoder and the image encoder, each loaded when it is first needed.

    prompts: {prompt: condition of the prompt and of the empty caption, {name: (2, …)}}, for
    validation.
    """

    def __init__(self, load_text, load_image, compute_type, device):
        """load_text: () → (tokenizer, text encoder). load_image: () → image encoder. compute_type:
        of the text encoder.
        """
        self.load_text, self.load_image = load_text, load_image
        self.compute_type, self.device, self.prompts = compute_type, device, {}

    @functools.cached_property
    def text(self):
        """(tokenizer, text encoder on the device)."""
        tokenizer, text_encoder = self.load_text()
        return tokenizer, text_encoder.to(self.device)

    @functools.cached_property
    def image(self):
        """The image encoder on the device, fp32 as its authors used it."""
        return self.load_image().to(self.device)

    def samples(self, data, run):
        """The stream of samples to train on, to read with `batches`."""
        return Samples.for_training(data, run)

    def held_out(self, data, run):
        """The held-out samples."""
        return Samples.held_out(data, run)

    def encode(self, batch):
        """(latents, condition) of a batch, on the device, without gradients."""
        return self.latents(batch["pixels"]), self.condition(batch["captions"])

    @torch.no_grad()
    def latents(self, pixels):
        """Images (B, 3, 32·h, 32·w) → (B, 16, h, w) fp32, scaled as the prior's."""
        pixels = to_device(pixels, self.device)
        # A CPU is twice as fast one by one, while a layer's output is still in its caches.
        parts = pixels.split(1 if self.device.type == "cpu" else len(pixels))
        encoded = torch.cat([self.image(part) for part in parts]).contiguous()
        return diffusion.scale_latents(encoded)

    def condition(self, captions):
        """What the prior is told about B captions, {name: (B, …)}."""
        return condition_of(*self.text, captions)

    def add_prompts(self, prompts):
        """Encode validation prompts, and report those longer than the text encoder's context."""
        for prompt in prompts:
            tokenizer = self.text[0]
            count = len(tokenizer(prompt, verbose=False).input_ids)
            most = tokenizer.model_max_length
            if count > most:
                say(f"The prompt “{prompt[:40]}…” has {count} tokens; only {most} are read.")
            self.prompts[prompt] = self.condition([prompt, ""])

    def frozen(self):
        """The modules that stay on the device."""
        return [self.text[1], self.image]

    def unload(self):
        """Free their memory. What is needed again is loaded again."""
        for name in ("text", "image"):
            self.__dict__.pop(name, None)


def condition_of(tokenizer, text_encoder, captions):
    """B captions → {"text": the text encoder's states (B, 77, D), in its type}."""
    return {"text": encode_text(tokenizer, text_encoder, captions)}


@torch.no_grad()
def encode_text(tokenizer, text_encoder, captions):
    """Captions → the text encoder's last hidden states, (B, 77, D), in its type.

    Padding is masked, as it is in sampling. Captions are truncated to 77 tokens.
    """
    tokens = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    device = text_encoder.device
    ids, mask = (to_device(t, device) for t in (tokens.input_ids, tokens.attention_mask))
    return text_encoder(ids, attention_mask=mask).last_hidden_state


def try_out(tokenizer, text_encoder):
    """Encode three tokens: most of what can be wrong with their configs raises an error then."""
    length = tokenizer.model_max_length
    tokens = tokenizer("a", padding="max_length", max_length=length, return_tensors="pt")
    text_encoder(tokens.input_ids[:, :3], attention_mask=tokens.attention_mask[:, :3])
