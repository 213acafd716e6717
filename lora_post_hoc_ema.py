"""Average the checkpoints of one LoRA run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if __name__ == "__main__":  # processes that are started from here import this file, and need nothing of it
    from ltx2_tuner.cli.lora_post_hoc_ema import main

    sys.exit(main())
