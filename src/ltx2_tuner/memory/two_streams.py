"""The sound stream's kernels beside the picture's, on a CUDA stream of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from ltx2_tuner.models.transformer.block import BasicAVTransformerBlock
from ltx2_tuner.models.transformer.model import run_block


class TwoStreams:
    """A block runner that puts the sound stream's parts on a second CUDA stream; a block starts and ends on the first.

    What one stream made and the other reads is held in `kept`, so that its memory is not given out again while the
    other still reads: until the backward pass reaches the block before, where the streams meet.
    """

    recomputes = True

    def __init__(self) -> None:
        self.side = torch.cuda.Stream()
        self.kept: dict[int, list[object]] = {}

    def __call__(
        self, block: BasicAVTransformerBlock, index: int, *arguments: object, recompute: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        video, audio, video_inputs, audio_inputs, skips = arguments
        if video is None or audio is None or skips is not None or not (video_inputs.updated and audio_inputs.updated):
            return run_block(block, index, *arguments, recompute=recompute)
        main, side = torch.cuda.current_stream(), self.side
        opening = block.opening(recompute)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            audio = opening(block.open_audio, audio, audio_inputs, None)
        video = opening(block.open_video, video, video_inputs, None)
        opened = (video, audio)
        side.wait_stream(main)
        main.wait_stream(side)
        with opening.closing():
            with torch.cuda.stream(side):
                lent = _Lent.apply(video, self.kept, index)
                audio = block.close_audio(audio, lent, audio_inputs, video_inputs, None, recompute=recompute)
            video = block.close_video(*opened, video_inputs, audio_inputs, None, recompute=recompute)
        main.wait_stream(side)
        # Nobody reads any more, now that the streams have met, what will be made anew for the backward pass or comes
        # back for it from elsewhere.
        kept = [tensor for tensor in opened if not opening.makes_anew(tensor)]
        self.kept[index] = [arguments[2:], kept] if opening.parks else [arguments, kept, (video, audio)]
        if video.requires_grad:
            video.register_hook(lambda _: self._enter_backward(index, main))
        return video, audio

    def _enter_backward(self, index: int, main: torch.cuda.Stream) -> None:
        """Before the backward pass of a block: later ones are done with what was kept for them."""
        self.side.wait_stream(main)
        main.wait_stream(self.side)
        for later in [other for other in self.kept if other > index]:
            del self.kept[later]


class _Lent(torch.autograd.Function):
    """The picture as the sound's stream reads it, whose gradient, made on that stream, is kept until the streams meet.

    Autograd has the allocator watch what it hands from one stream to another, and what is watched while a graph is
    recorded is given out again only when that is over: a hidden state of the picture would be lost for each block (of
    the sound one is, the other way: those are small). What came through DLPack is not the allocator's to watch. It is
    kept, and its memory with it; nor does autograd add other gradients into what somebody else holds, and hand it on.
    """

    @staticmethod
    def forward(ctx, video: Tensor, kept: dict[int, list[object]], index: int) -> Tensor:
        ctx.kept, ctx.index = kept, index
        return video

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        unwatched = from_dlpack(to_dlpack(grad))
        ctx.kept[ctx.index].append(unwatched)
        return unwatched, None, None
