"""The causal video autoencoder and its tiled forms."""
