"""Schedules, guidance, conditioning, decoding, prompt files and previews."""
