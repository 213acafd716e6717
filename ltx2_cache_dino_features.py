"""Cache DINOv2 features of clips for CREPA's dino mode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ltx2_tuner.cli.ltx2_cache_dino_features import main

if __name__ == "__main__":
    sys.exit(main())
