"""diffusers' pipelines for programs of your own.

    prior, decoder = load("runs/demo/prior_pipeline", "warp-ai/wuerstchen", torch.float16)
    latents = prior.to("cuda")("a bear").image_embeddings                        # (1, 16, 24, 24)
    image = decoder.to("cuda")(latents, "a bear").images[0]
"""

import torch

from minwurst.edge import diffusers_pipelines, models


def load(prior, decoder="warp-ai/wuerstchen", dtype=torch.float32, lora=None, lora_scale=1.0):
    """(WuerstchenPriorPipeline, WuerstchenDecoderPipeline), on the CPU, ready to be called.

    prior, decoder: folders or Hub repositories. lora: file, folder or repository of a LoRA, which
    is merged into the prior with strength lora_scale; PEFT is not needed. A UserError names what is
    missing or broken.
    """
    folder = models.locate("prior", prior)
    text_folder = models.text_folder(folder)
    return (
        diffusers_pipelines.prior_pipeline(folder, text_folder, dtype, lora, lora_scale),
        diffusers_pipelines.decoder_pipeline(models.locate("decoder", decoder), dtype),
    )
