"""Reading official checkpoints: headers, configs, versions, streaming loads, fingerprints."""
