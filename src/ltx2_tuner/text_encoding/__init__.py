"""Gemma 3, its tokenizer, and the encoder that turns prompts into text context."""

from ltx2_tuner.text_encoding.encoder import PromptEmbedding, TextEncoder, load_text_encoder
from ltx2_tuner.text_encoding.options import GemmaOptions
from ltx2_tuner.text_encoding.tiny import write_tiny_gemma, write_tiny_gemma_file

__all__ = [
    "GemmaOptions",
    "PromptEmbedding",
    "TextEncoder",
    "load_text_encoder",
    "write_tiny_gemma",
    "write_tiny_gemma_file",
]
