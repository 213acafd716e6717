"""What a slider learns from pairs of pictures or clips of the same subject that differ in one attribute."""

from __future__ import annotations

import logging
from pathlib import Path

from ltx2_tuner.data import order
from ltx2_tuner.data.batches import EpochLoader
from ltx2_tuner.data.cache_files import CacheHeader, read_header
from ltx2_tuner.data.cache_names import LATENT_SUFFIX, CacheName, parse_latent_name, text_name
from ltx2_tuner.data.collate import load_batch
from ltx2_tuner.data.config import Dataset, DatasetConfig, dataset_from_options
from ltx2_tuner.data.inventory import CachedItem, Inventory
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.sliders.config import SliderConfig

logger = logging.getLogger(__name__)
_LISTED = 10


class ReferencePairs:
    """Stands where a run's training data does: every batch is one pair, the negative as the item's reference.

    Raises:
        UserError: no pair, or a pair of differing shapes.
    """

    def __init__(self, config: SliderConfig, seed: int) -> None:
        self._seed = seed
        inventory = _find_pairs(config)
        self.inventories = [inventory]
        self._dataset = inventory.dataset
        self.items = inventory.items

    def __len__(self) -> int:
        return len(self.items)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"inventories": []}  # workers need no headers

    def order(self, epoch: int) -> list[int]:
        return order.shuffled_order(len(self), self._seed, epoch)

    def batch_items(self, epoch: int, number: int) -> list[CachedItem]:
        return [self.items[number]]

    def __getitem__(self, position: tuple[int, int]) -> dict:
        """The pair: positive under `latents`, negative under `ref_latents`."""
        return load_batch(self._dataset, self.batch_items(*position))

    def loader(self, *, rank: int = 0, world_size: int = 1, workers: int = 0, **more: bool) -> EpochLoader:
        """Batches of one rank in training order."""
        return EpochLoader(self, rank, world_size, workers, **more)


def _find_pairs(config: SliderConfig) -> Inventory:
    """Every positive latent that has a negative of the same name and a text."""
    inventory = Inventory(_dataset(config))
    missing: dict[str, list[str]] = {}
    names = sorted(path.name for path in config.positive_cache.iterdir() if path.name.endswith(LATENT_SUFFIX))
    for file_name in names:
        positive, negative = config.positive_cache / file_name, config.negative_cache / file_name
        parsed = _parse(file_name, config.text_cache)
        if parsed is None:
            missing.setdefault("no item name", []).append(file_name)
            continue
        text = config.text_cache / text_name(parsed.stem)
        if not negative.is_file():
            missing.setdefault("no negative", []).append(file_name)
        elif not text.is_file():
            missing.setdefault("no text", []).append(file_name)
        else:
            _add_pair(inventory, parsed, positive, negative, text)
    lonely = {path.name for path in config.negative_cache.iterdir() if path.name.endswith(LATENT_SUFFIX)} - {*names}
    if lonely:
        missing["no positive"] = sorted(lonely)
    for reason, left_out in missing.items():
        some = ", ".join(left_out[:_LISTED]) + (", ..." if len(left_out) > _LISTED else "")
        logger.warning("%d latents are left out, %s: %s", len(left_out), reason, some)
    if not inventory.items:
        raise UserError(
            f"no pairs in {config.positive_cache} and {config.negative_cache}: a pair is a latent of the same file "
            f"name in both and a text in {config.text_cache}; run ltx2_cache_latents.py for both folders and "
            "ltx2_cache_text_encoder_outputs.py for one"
        )
    logger.info("%d pairs of latents", len(inventory.items))
    return inventory


def _parse(file_name: str, texts: Path) -> CacheName | None:
    """The parts of a latent's name: of a clip, or of a picture where only that has a text."""
    clip, picture = parse_latent_name(file_name, video=True), parse_latent_name(file_name, video=False)
    if clip is None or (texts / text_name(clip.stem)).is_file():
        return clip or picture
    return picture if (texts / text_name(picture.stem)).is_file() else clip


def _add_pair(inventory: Inventory, name: CacheName, positive: Path, negative: Path, text: Path) -> None:
    headers: dict[Path, CacheHeader] = {path: read_header(path) for path in (positive, negative, text)}
    shapes = [headers[path].shape for path in (positive, negative)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{positive} is {list(shapes[0])} and {negative} is {list(shapes[1])}; cache both folders with the same "
            "resolution and frames"
        )
    inventory.headers |= headers
    inventory.items.append(
        CachedItem(
            key=name.key,
            stem=name.stem,
            latent_path=positive,
            text_path=text,
            audio_path=None,
            dino_path=None,
            reference_path=negative,
            reference_audio_path=None,
            frames=name.frames or 1,
            size=(name.width, name.height),
            latent_shape=shapes[0],
            audio_steps=None,
            bucket_key=shapes[0],
        )
    )


def slider_data(config: SliderConfig, mode: str) -> DatasetConfig:
    """The slider's data as the rest of the suite knows data: one dataset, of which mode text has the folder alone.

    Args:
        mode: video or av, that of the previews.
    """
    return DatasetConfig(config.path, mode, (_dataset(config),))


def _dataset(config: SliderConfig) -> Dataset:
    """Clips at the slider's frame rate, one in a batch; side files lie beside the latents, or the slider file."""
    options = {"target_fps": config.fps, "batch_size": 1}
    folder = config.positive_cache or config.path.parent
    return dataset_from_options(options, "video", "pos_cache_dir", 0, False, cache_directory=folder)
