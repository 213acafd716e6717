"""Decoding and encoding of video, images and sound."""
