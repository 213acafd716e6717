"""From mel spectrogram to waveform."""
