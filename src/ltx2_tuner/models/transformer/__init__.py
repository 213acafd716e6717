"""The audio-video diffusion transformer."""
