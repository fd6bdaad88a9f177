"""A small CLIP tokenizer and text encoder, untrained."""

import json

import tokenizers
import transformers


def make_tokenizer(captions, size=2048, length=24):
    """A tokenizer of CLIP's kind with merges learned from the captions, for texts of `length`."""
    base = transformers.CLIPTokenizerFast()._tokenizer  # for CLIP's way of splitting text
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=letters, end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )  # fmt: skip
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in [*(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=length)


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
