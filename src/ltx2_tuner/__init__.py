"""Train LoRAs for LTX-2 and LTX-2.3, the open models that make picture and sound together."""

__version__ = "0.1.0"
