"""A small CLIP tokenizer and text encoder, untrained."""

import transformers


def make_tokenizer(captions, size=2048, length=24):
    """A tokenizer of CLIP's kind with merges learned from the captions, for texts of `length`."""
    letters = " ".join(map(chr, range(33, 127)))  # each is a word of its own, too
    learned = transformers.CLIPTokenizerFast().train_new_from_iterator([*captions, letters], size)
    learned.model_max_length = length
    return learned


def make_text_encoder(tokenizer, width, layers, heads):
    """A CLIP text encoder with random weights for a tokenizer."""
    end = tokenizer.eos_token_id
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, hidden_act="gelu",
        projection_dim=width, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)
