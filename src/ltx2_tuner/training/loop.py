"""The training loop: draw, forward, backward, step; and on a schedule save, validate, sample.

It knows no mode, no regularizer and no file format; those are the objects it is given.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ltx2_tuner.training.balance import AudioBalancer
from ltx2_tuner.training.draws import Draws, TrainingDraws
from ltx2_tuner.training.health import AdapterHealth
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.notes import RunNotes
from ltx2_tuner.training.objective import LossTerms, task_loss
from ltx2_tuner.training.optimizers import drops_by_itself, step_unless
from ltx2_tuner.training.progress import LossAverage, Progress, StepLine, StopFlag, stop_requests
from ltx2_tuner.training.random import DrawKey, default_generator_states, restore_default_generators
from ltx2_tuner.training.run import Run
from ltx2_tuner.training.saving import Moment
from ltx2_tuner.training.window import ClosedWindow, Fetch, MicroBatch, WindowValues, several_processes

logger = logging.getLogger(__name__)


class Trainer:
    """Runs a `Run` from where its progress stands to the last step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.progress = Progress()
        self.average = LossAverage()
        self.metrics: dict[str, float] = {}
        self._used_sigmas: dict[str, list[float]] = {}
        self._told_idle = False
        self._health = AdapterHealth()
        self._notes = RunNotes(run.device, run.swapped)
        self._recent: dict | None = None  # the batch trained on last
        self._closed: ClosedWindow | None = None  # whose step the host has not counted yet
        self._waiting = 0.0  # seconds for data since a step was counted
        self._stopping = False  # a process asked for the end while another batch had begun
        self.steps_per_epoch = math.ceil(len(run.data) / run.loop.accumulation)
        self.max_steps = run.loop.max_steps
        self.epochs = math.ceil(self.max_steps / self.steps_per_epoch)

    def start_loading(self) -> None:
        """Have the first batches loaded beside whatever comes before `train`."""
        epoch = self._next_epoch
        self.run.data.set_epoch(epoch, self.progress.step_in_epoch if epoch == self.progress.epoch else 0)
        self.run.data.start()

    @property
    def _next_epoch(self) -> int:
        """The epoch of the next batch."""
        ended = self.progress.step_in_epoch == 0 and self.progress.micro_batches > 0
        return self.progress.epoch + ended

    def train(self) -> None:
        """Train to the last step and save.

        Raises:
            KeyboardInterrupt: the user asked to stop; what was trained is saved.
            UserError: non-finite values in too many steps, missing caches, a full disk.
        """
        run = self.run
        self._set_training(True)
        line = StepLine(self.max_steps, self.progress.step, run.device, shown=run.rank == 0)
        with contextlib.closing(line), stop_requests(told=run.rank == 0) as stop:
            if self.progress.step == 0 and run.samples.at_first:
                self._sample(None)
                line.pause()
            epoch = self._next_epoch
            # Skipped steps are made up for, unless the run's length was given in epochs.
            try:
                while self.progress.step < self.max_steps and epoch <= (run.loop.max_epochs or epoch):
                    self._run_epoch(epoch, line, stop)
                    epoch += 1
            except Exception:
                with contextlib.suppress(RuntimeError):  # the device may be what failed
                    self._settle(line)  # the step before is done, and may be what is at fault
                raise
        self._save(Moment("final", self.progress.step, self.progress.epoch))

    def _run_epoch(self, epoch: int, line: StepLine, stop: StopFlag) -> None:
        progress = self.progress
        if epoch != progress.epoch:
            progress.epoch, progress.step_in_epoch = epoch, 0
        skip = progress.step_in_epoch
        window: list[MicroBatch] = []
        self.run.data.set_epoch(epoch, skip)
        batches = iter(self.run.data)
        last_slot = len(self.run.data) - 1
        for slot in range(skip, len(self.run.data)):
            before = time.perf_counter()
            batch = next(batches)
            self._waiting += time.perf_counter() - before
            window.append(self._micro_batch(batch, slot))
            self._stopping |= self._settle(line)  # the window before
            progress.step_in_epoch = slot + 1
            if len(window) < self.run.loop.accumulation and slot != last_slot:
                continue
            self._close(window, stop)
            window = []
            if slot == last_slot or not self._may_run_ahead(stop):
                self._settle_for_good(line)
            if progress.step >= self.max_steps and slot != last_slot:
                return
        progress.step_in_epoch = 0
        self._end_epoch(epoch, line)

    def _micro_batch(self, batch: dict, slot: int) -> MicroBatch:
        """Forward and backward of one batch; nothing here waits for the device."""
        run, progress = self.run, self.progress
        key = DrawKey(run.loop.seed, run.rank, progress.micro_batches)
        progress.micro_batches += 1
        prepared, terms = self._learn(batch, self._draws(key))
        return MicroBatch(
            items=list(batch["item_keys"]),
            slot=slot,
            has_audio=prepared.has_audio,
            total=terms.total.detach(),
            terms=terms.detached(),
            video_sigma=[] if prepared.video_task is None else prepared.video_task.sigma.tolist(),
            audio_sigma=[] if prepared.audio_task is None else prepared.audio_task.sigma.tolist(),
        )

    def rehearse(self, batch: dict) -> None:
        """Forward and backward of a batch for the memory they take; only gradients are left behind."""
        run = self.run
        states, balancer = default_generator_states(), run.balancer
        run.balancer = AudioBalancer(run.loss.balance, run.device)
        self._set_training(True)
        try:
            self._learn(batch, self._draws(DrawKey(run.loop.seed, run.rank, 0)))
        finally:
            run.balancer = balancer
            run.regularizers.metrics()  # those of the rehearsal are no step's
            restore_default_generators(states)

    def _draws(self, key: DrawKey) -> TrainingDraws:
        """What a micro-batch draws from; the default generators are seeded with it."""
        key.seed_default_generators()
        return TrainingDraws(
            key,
            self.run.draws.sampler,
            self.run.device,
            first_frame_p=self.run.draws.first_frame_p,
            caption_dropout_rate=self.run.draws.caption_dropout_rate,
        )

    def _learn(self, batch: dict, draws: Draws) -> tuple[Prepared, LossTerms]:
        """Forward and backward; what the batch became, and its losses."""
        run = self.run
        self._recent = batch
        work = run.regularizers.start(run.mode.prepare(batch, draws), batch, draws, self.progress.step)
        prepared = work.prepared
        with run.autocast(), run.regularizers.watching(work):
            video, audio = prepared.run(run.model)
        terms = task_loss(prepared, video, audio, run.loss, run.balancer)
        terms = run.regularizers.add(work, terms, video, audio)
        self._backward(terms.total)
        run.regularizers.finish(work, self._backward)
        return prepared, terms

    def _backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the window's gradients.

        There is none where no adapter ran, as when a preset of sound layers meets a clip without sound.
        """
        if not loss.requires_grad:
            if not self._told_idle:
                logger.warning(
                    "the loss of a batch reaches no adapter and trains nothing (a preset of sound layers and no "
                    "sound?); further ones are not mentioned"
                )
            self._told_idle = True
            return
        loss = loss / self.run.loop.accumulation
        (loss if self.run.scaler is None else self.run.scaler.scale(loss)).backward()

    def _close(self, batches: list[MicroBatch], stop: StopFlag) -> None:
        """Gather, unscale and measure the gradients, and step if the device can drop it; nothing here waits for it."""
        run = self.run
        if run.monitor is not None:
            for batch in batches:
                run.monitor.observe(batch.has_audio)
        bad = sum((~torch.isfinite(batch.total)).float() for batch in batches).reshape(1).to(run.device)
        stopped = torch.full((1,), float(stop.raised), device=run.device)
        run.gradients.gather(bad, stopped)
        # After gathering, so that every process finds the same overflows.
        if run.scaler is not None and run.gradients.present:
            run.scaler.unscale_(run.optimizer)
        norms = run.gradients.norms().to(run.device)
        run.gradients.clip(norms[0])
        extra = {**run.balancer.metrics(), **run.regularizers.metrics()}
        bad = bad.bool() | ~torch.isfinite(norms[:1])
        stepped = run.scaler is None and run.gradients.present and drops_by_itself(run.optimizer)
        if stepped:
            # The host goes through thousands of parameters, which it does while the device is busy.
            step_unless((bad[0] & run.guard.drops).float(), run.optimizer)
        self._closed = ClosedWindow(batches, Fetch(batches, norms, bad, stopped, extra), stepped)
        if stepped:
            self._zero_gradients()

    def _may_run_ahead(self, stop: StopFlag) -> bool:
        """Whether the next micro-batch may begin before the host knows how the closed window's step went.

        The device then does not idle while the host logs and prepares. It has to where the host does more between two
        steps: saving, validation, previews, whatever else reads or changes the network. All processes decide alike.
        """
        run, step = self.run, self.progress.step + 1
        often = (run.saver.options.every_steps, run.validation.every_steps, run.samples.every_steps)
        return (
            self._closed.stepped
            and step < self.max_steps
            and not any(_due(every, step) for every in often)
            and not run.regularizers.members
            and not run.loop.scale_weight_norms
            and not self._stopping
            and (several_processes() or not stop.raised)
        )

    def _settle_for_good(self, line: StepLine) -> None:
        """Settle, and end the run if that was asked for; no later batch has begun."""
        if self._settle(line):
            self._save(Moment("interrupt", self.progress.step, self.progress.epoch))
            raise KeyboardInterrupt

    def _settle(self, line: StepLine) -> bool:
        """Wait for the window that was closed last and count its step; whether a process wants to stop."""
        if self._closed is None:
            return False
        run, closed, self._closed = self.run, self._closed, None
        values = closed.fetch.values()
        for batch in closed.batches:
            self._used_sigmas.setdefault("timestep/used_values", []).extend(batch.video_sigma)
            self._used_sigmas.setdefault("timestep/used_values_audio", []).extend(batch.audio_sigma)
        if run.guard.accept(values.finite, closed.items):
            self._step(closed, values, line)
        elif run.scaler is not None and run.gradients.present:
            run.scaler.update()  # which halves a scale that was too large
        if not closed.stepped:
            self._zero_gradients()
        return values.stop

    def _step(self, closed: ClosedWindow, values: WindowValues, line: StepLine) -> None:
        run, progress = self.run, self.progress
        rates = self._learning_rates()
        if run.scaler is not None and run.gradients.present:
            run.scaler.step(run.optimizer)
            run.scaler.update()
        elif run.gradients.present and not closed.stepped:
            run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
        progress.step += 1
        for slot, loss in values.losses:
            self.average.add(slot, loss)
        self.metrics = {**values.metrics, "loss/average": self.average.value, **self._norm_limit()}
        run.regularizers.after_step()
        if run.monitor is not None:
            self.metrics |= run.monitor.follow(self.metrics)
        perf = line.advance(self.metrics, balanced=run.loss.balance.mode != "none")
        perf["perf/data_wait_seconds"], self._waiting = self._waiting, 0.0
        run.log({**self.metrics, **perf, **rates}, progress.step)
        if run.rank == 0:
            self._notes.step(progress.step, {**self.metrics, **perf})
        self._log_used_sigmas()
        self._after_step(line)

    def _log_used_sigmas(self) -> None:
        """Every so often, the distribution of sigma * 1000 since the last time."""
        step = self.progress.step
        if not _due(self.run.histogram_interval, step):
            return
        for name, sigmas in self._used_sigmas.items():
            if sigmas:
                self.run.histogram(name, [1000 * sigma for sigma in sigmas], step)
        self._used_sigmas.clear()

    def _norm_limit(self) -> dict[str, float]:
        limit = self.run.loop.scale_weight_norms
        if not limit:
            return {}
        scaled, average, largest = self.run.network.apply_max_norm_regularization(limit, self.run.device)
        names = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")
        return {name: float(value) for name, value in zip(names, (scaled, average, largest))}

    def _learning_rates(self) -> dict[str, float]:
        rates = {}
        for name, group in zip(self.run.group_names, self.run.optimizer.param_groups):
            rates[f"lr/{name}"] = float(group["lr"] or 0.0)
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
        return rates

    def _after_step(self, line: StepLine) -> None:
        run, step = self.run, self.progress.step
        if _due(run.saver.options.every_steps, step):
            self._save(Moment("step", step, self.progress.epoch))
        if _due(run.validation.every_steps, step):
            self._validate()
        if _due(run.samples.every_steps, step):
            self._sample(None)
        line.pause()

    def _end_epoch(self, epoch: int, line: StepLine) -> None:
        run = self.run
        run.log({"loss/epoch": self.average.value}, self.progress.step)
        if _due(run.saver.options.every_epochs, epoch) and self.progress.step < self.max_steps:
            self._save(Moment("epoch", self.progress.step, epoch))
        if _due(run.validation.every_epochs, epoch):
            self._validate()
        if _due(run.samples.every_epochs, epoch):
            self._sample(epoch)
        line.pause()

    def _save(self, moment: Moment) -> None:
        with self._evaluation():
            if moment.kind != "interrupt" and self.run.rank == 0:
                self._check_health()
            self.run.saver.save(moment, self)

    def _check_health(self) -> None:
        run, prepared = self.run, None
        if self._recent is not None:
            draws = TrainingDraws(DrawKey(run.loop.seed, run.rank, 0), run.draws.sampler, run.device)
            prepared = run.mode.prepare(self._recent, draws)
        with run.autocast():
            self._health.check(run.network, run.model, prepared)

    def _validate(self) -> None:
        if self.run.validator is None:
            return
        with self._evaluation(), torch.no_grad(), self.run.autocast():
            found = self.run.validator.measure()
        if self.run.rank == 0:
            found |= self._notes.validation(found, self.average.value)
        self.run.log(found, self.progress.step)

    def _sample(self, epoch: int | None) -> None:
        if self.run.sampler is None:
            return
        self.run.before_samples()
        with self._evaluation(), torch.no_grad():
            self._make_samples(epoch)

    def _make_samples(self, epoch: int | None, label: str = "") -> None:
        """The previews, shown to the trackers under their number and `label`."""
        step = self.progress.step

        def show(index: int, paths: Sequence[Path], sample: object) -> None:
            self.run.show_sample(index, paths, step, label)

        self.run.sampler.sample(self.run.model, step=step, epoch=epoch, label=label, on_sample=show)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Nothing within the block may change what is trained afterwards: modes and generators come back."""
        states = default_generator_states()
        self._set_training(False)
        try:
            yield
        finally:
            self._set_training(True)
            restore_default_generators(states)

    def _set_training(self, training: bool) -> None:
        self.run.model.train(training)
        self.run.network.train(training)
        switch = getattr(self.run.optimizer, "train" if training else "eval", None)
        if callable(switch):
            switch()

    def _zero_gradients(self) -> None:
        self.run.optimizer.zero_grad(set_to_none=True)


def _due(every: int | None, count: int) -> bool:
    """Whether what happens every so many steps or epochs, or never, happens after this one."""
    return bool(every) and count % every == 0
