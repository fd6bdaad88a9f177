"""All three stages for programs of your own, from a prompt to an image.

    wuerstchen = load("my_prior", "warp-ai/wuerstchen", torch.float16, "cuda")
    image = wuerstchen("a bear", seed=1)                                         # RGB, PIL
    latents = wuerstchen.latents("a bear", seed=1)                               # (1, 16, 24, 24)
"""

import torch

from minwurst.base.errors import UserError
from minwurst.base.model_folder import own_parts
from minwurst.base.settings import Settings
from minwurst.edge import lora_file, models
from minwurst.edge.decoders import FullDecoder
from minwurst.run.validation import EvaluationModel, generate_latents
from minwurst.step import adapter, randomness
from minwurst.step.encoders import condition_of
from minwurst.step.optimizer import NoEMA


def load(
    prior, decoder=None, dtype=torch.float32, device="cpu", lora=None,
    lora_scale=1.0,
):  # fmt: skip
    """A Wuerstchen, ready to be called.

    prior, decoder: folders or Hub repositories; by default, the decoder is the one in the prior's
    folder, or else the published one. dtype: of the prior and text encoder; the decoder is fp32, or
    fp16 on a GPU. lora: file, folder or repository of a LoRA, which is merged into the
    prior with strength lora_scale. A UserError names what is missing or broken.
    """
    folder, device = models.locate("prior", prior), torch.device(device)
    own = own_parts(folder)
    decoder = decoder or own.get("decoder", Settings.pretrained_decoder_model_name_or_path)
    text = models.load_text(models.text_folder(folder, where="prior"), dtype)
    network = models.load_prior(folder, dtype, as_trained=not lora)
    if lora:
        lora_file.load(network, models.locate_lora(lora))
        adapter.set_scale(network, lora_scale)
        adapter.merge(network)
    half = dtype != torch.float32
    decode = FullDecoder(models.locate("decoder", decoder), device, half)
    autocast = torch.autocast(device.type, dtype, enabled=half)
    prior = EvaluationModel(network.to(device), NoEMA(), autocast)
    size = decode.latent_size(own.get("resolution", Settings.resolution) // 32)
    return Wuerstchen(text[0], text[1].to(device), prior, decode, size)


class Wuerstchen:
    """Attributes: tokenizer, text_encoder, prior (an EvaluationModel), decode (a FullDecoder), size
    (of an image's latents by default).
    """

    def __init__(self, tokenizer, text_encoder, prior, decode, size):
        self.tokenizer, self.text_encoder, self.prior = tokenizer, text_encoder, prior
        self.decode, self.size = decode, size

    def latents(self, prompt, seed=0, size=None, guidance=4.0):
        """The prior's latents of an image, (1, 16, h, w), scaled.

        size: h = w, or (h, w). 24 gives 1024 pixels; a multiple of 3, which is what can be decoded.
        Default: from the resolution that the prior's folder states, else 24.
        """
        size = size or self.size
        height, width = size if isinstance(size, tuple) else (size, size)
        if [height, width] != [self.decode.latent_size(side) for side in (height, width)]:
            raise UserError(f"size is {size}; it must be a multiple of 3.")
        condition = condition_of(self.tokenizer, self.text_encoder, [prompt, ""])
        shape, key = (self.prior.prior.config.c_in, height, width), randomness.image_key(prompt, 0)
        with self.prior.active():
            return generate_latents(
                self.prior, condition, shape, seed=seed, key=key, guidance=guidance
            )

    def __call__(self, prompt, seed=0, size=None, guidance=4.0):
        """An RGB image, the same as `minwurst.sample` generates from these."""
        latents = self.latents(prompt, seed, size, guidance)
        generator = randomness.decoding_generator(seed, randomness.image_key(prompt, 0))
        with self.decode.on_device():
            return self.decode(latents, prompt, generator)
