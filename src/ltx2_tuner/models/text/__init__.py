"""From Gemma hidden states to the text context of the transformer."""
