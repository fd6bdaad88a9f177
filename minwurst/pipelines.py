"""All three stages for programs of your own, from a prompt to an image.

    wuerstchen = load("my_prior", "warp-ai/wuerstchen", torch.float16, "cuda")
    image = wuerstchen("a bear", seed=1)                                         # RGB, PIL
    latents = wuerstchen.latents("a bear", seed=1)                               # (1, 16, 24, 24)
"""

import torch

from minwurst.base.errors import UserError
from minwurst.base.model_folder import FLAGS, SAID, own_parts
from minwurst.base.settings import Settings
from minwurst.edge import lora_file, models, run_file
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

    prior, decoder: folders or Hub repositories; prior may be the output folder of a run. By
    default, the decoder is that of the run, or the one in the prior's folder, or else the published
    one. dtype: of the prior and text encoder; the decoder is fp32, or fp16 on a GPU. lora: file,
    folder or repository of a LoRA, which is merged into the prior with strength lora_scale. A
    UserError names what is missing or broken.
    """
    folder, device = models.locate("prior", prior), torch.device(device)
    run = run_file.folder_of(prior) or run_file.folder_of(lora)
    own = {**(run_file.read(run)["settings"] if run else {}), **own_parts(folder)}
    named = own.get(FLAGS["decoder"], Settings.pretrained_decoder_model_name_or_path)
    decoder = decoder or own.get("decoder", named)
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
    resolution, guidance = (own.get(name, getattr(Settings, name)) for name in SAID)
    size = decode.latent_size(resolution // 32)
    return Wuerstchen(text[0], text[1].to(device), prior, decode, size, guidance)


class Wuerstchen:
    """Attributes: tokenizer, text_encoder, prior (an EvaluationModel), decode (a FullDecoder), size
    (of an image's latents by default), guidance (by default).
    """

    def __init__(self, tokenizer, text_encoder, prior, decode, size, guidance):
        self.tokenizer, self.text_encoder, self.prior = tokenizer, text_encoder, prior
        self.decode, self.size, self.guidance = decode, size, guidance

    def latents(self, prompt, seed=0, size=None, guidance=None):
        """The prior's latents of an image, (1, 16, h, w), scaled.

        size: h = w, or (h, w). 24 gives 1024 pixels; a multiple of 3, which is what can be decoded.
        Default: from the resolution that the prior's folder states, else 24; of the guidance, what
        the folder states, else 4.
        """
        size = size or self.size
        height, width = size if isinstance(size, tuple) else (size, size)
        if [height, width] != [self.decode.latent_size(side) for side in (height, width)]:
            raise UserError(f"size is {size}; it must be a multiple of 3.")
        condition = condition_of(self.tokenizer, self.text_encoder, [prompt, ""])
        shape, key = (self.prior.prior.config.c_in, height, width), randomness.image_key(prompt, 0)
        guidance = self.guidance if guidance is None else guidance
        with self.prior.active():
            return generate_latents(
                self.prior, condition, shape, seed=seed, key=key, guidance=guidance
            )

    def __call__(self, prompt, seed=0, size=None, guidance=None):
        """An RGB image, the same as `minwurst.sample` generates from these."""
        latents = self.latents(prompt, seed, size, guidance)
        generator = randomness.decoding_generator(seed, randomness.image_key(prompt, 0))
        with self.decode.on_device():
            return self.decode(latents, prompt, generator)
