"""Network modules that --network_module can name (kohya network protocol)."""
