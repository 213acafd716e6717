"""The mel-spectrogram autoencoder for sound."""
