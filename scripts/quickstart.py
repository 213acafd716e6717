"""From nothing to a LoRA and a sample clip, on tiny random models: the whole path in a few minutes on a CPU.

python scripts/quickstart.py                  renders its own clips
python scripts/quickstart.py --clip FILE      cuts them from a clip of yours

What it trains is noise-sized, so the sample is a test pattern: the point is to see every step run on this machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import environment

STEPS = 40
# The tensors are tiny: a second thread gains nothing, and costs fifty times the time where the cores are busy.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, help="a clip to cut the training set from (rendered when absent)")
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "quickstart", help="folder for everything made"
    )
    arguments = parser.parse_args()
    if arguments.clip and not arguments.clip.is_file():
        print(f"error: --clip {arguments.clip}: no such file", file=sys.stderr)
        return 1
    folder = arguments.output.resolve()
    clip = ("--clip", arguments.clip.resolve()) if arguments.clip else ()
    python = environment.ensure(".venv", ("-e", ".[dev]"))
    for made in ("clips", "cache", "output"):
        shutil.rmtree(folder / made, ignore_errors=True)
    checkpoint, config = folder / "tiny_ltx23.safetensors", folder / "dataset.toml"
    shared = ("--dataset_config", config, "--ltx2_checkpoint", checkpoint, "--ltx2_mode", "av")
    prompts = ("--sample_prompts", folder / "prompts.txt")
    steps = [
        ("making a tiny checkpoint, a tiny Gemma and clips", "-m", "ltx2_tuner.cli.quickstart_assets")
        + ("--folder", folder, *clip),
        ("encoding the clips", "ltx2_cache_latents.py", *shared, "--vae_dtype", "float32"),
        ("encoding the captions", "ltx2_cache_text_encoder_outputs.py", *shared)
        + ("--gemma_root", folder / "tiny_gemma", "--precache_sample_prompts", *prompts),
        ("training and sampling", *_launch(), "ltx2_train_network.py", *shared, *prompts)
        + ("--use_precached_sample_prompts", "--sample_at_first", "--sample_every_n_steps", STEPS)
        + ("--sample_merge_audio", "--max_train_steps", STEPS, "--network_dim", 8, "--network_alpha", 8)
        + ("--learning_rate", "1e-3", "--seed", 0, "--dit_dtype", "float32", "--vae_dtype", "float32")
        + ("--max_data_loader_n_workers", 0, "--output_dir", folder / "output", "--output_name", "quickstart"),
    ]
    for title, *command in steps:
        print(f"\n== {title}\n   python {' '.join(map(str, command))}", flush=True)
        if status := environment.run(python, *command, **THREADS):
            print(f"error: {title} ended with status {status}; its message is above", file=sys.stderr)
            return status
    return report(folder / "output")


def _launch() -> tuple[str, ...]:
    return (
        *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
    )


def report(output: Path) -> int:
    """Print what was made; the last lines a newcomer sees."""
    loras = sorted(output.glob("quickstart*.safetensors"))
    samples = sorted((output / "sample").glob("*_av.mp4")) or sorted((output / "sample").glob("*.mp4"))
    if not loras or not samples:
        print(f"error: no LoRA or no sample in {output}", file=sys.stderr)
        return 1
    print("\n== done")
    for lora in loras:
        print(f"LoRA:   {lora}")
    print(f"sample: {samples[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
