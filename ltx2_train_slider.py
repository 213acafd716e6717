"""Train a slider LoRA."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ltx2_tuner.cli.ltx2_train_slider import main

if __name__ == "__main__":
    sys.exit(main())
