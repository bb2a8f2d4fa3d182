"""The main job: from a config to an adapter file, with everything around the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.config.config import Config
from lora_booth.config.resolved import Filled, Resolved
from lora_booth.errors import (
    ConfigError,
    DeviceMemoryError,
    DiskError,
    LoraBoothError,
    ModelError,
    ProcessLostError,
    lacks_memory,
)
from lora_booth.models import abilities, devices, loading
from lora_booth.models.bases import sources
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.devices import dtype_for
from lora_booth.models.families.family import Family
from lora_booth.models.families.noise import Diffusion
from lora_booth.planning import decide, memory
from lora_booth.run import identity, notes, systems, versions
from lora_booth.run.checkpoints import Checkpoint
from lora_booth.run.folder import Run, require_free_space
from lora_booth.run.interrupts import stop_requests
from lora_booth.run.notes import Notes
from lora_booth.run.report import Report, Silent
from lora_booth.run.state import is_begun, is_finished
from lora_booth.run.stopwatch import Stopwatch
from lora_booth.run.summary import Summary
from lora_booth.training import (
    adapting,
    candidates,
    choosing,
    compiling,
    drift,
    ending,
    loop,
    prepare,
    session,
    trackers,
    watching,
)
from lora_booth.training.adapting import Adapted
from lora_booth.training.objective import objective_for
from lora_booth.training.shared import SharedBase

PATIENCE = timedelta(hours=12)
"""How long a process waits for another that is alive: the first draws all class images while the others wait."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the adapter and two moments, float32."""


def train(
    config: Config,
    *,
    inputs: decide.Inputs | None = None,
    report: Report | None = None,
    continue_command: str = "the same command",
    shared: SharedBase | None = None,
) -> Summary:
    """Train the run of `config`, or continue it, and export its adapter; a finished run is returned as it is.

    `inputs`: what `decide.look` gave for the same config, if it was asked already; `shared`: keeps the base for the
    next run of this process. Raises Interrupted when a signal asked to stop, after everything was saved.
    """
    report, stopwatch = report or Silent(), Stopwatch()
    inputs = inputs or decide.look(config, report)
    accelerator = _accelerator(config, report)
    device = accelerator.device
    wished = _allowed(config, device)
    if (finished := _finished_before(wished, inputs, accelerator, report)) is not None:
        return finished
    config = _resolved(wished, inputs, report, device)
    with stop_requests() as stop, _opened(config, inputs, accelerator) as run:
        if (finished := _told_finished(run, report)) is not None:  # by another process, while this one looked around
            return finished
        stopwatch.peak_gib = partial(_peak_gib, device)
        report, refresh = _reported(wished, config, inputs, run, accelerator, report)
        cuts = _drawn_sheet(config, inputs, run, accelerator)
        dtype = dtype_for(config.model.precision, device)
        judge = choosing.judge(config, inputs.pictures, report) if accelerator.is_main_process else None
        family = _load(config, inputs.facts, device, dtype, report, shared)
        listeners: dict[str, Any] = {"report": report, "stop": stop}
        stopwatch.lap("loading")
        newest = run.latest(report.warn)
        prepared, watched = _prepared(config, family, inputs, run, accelerator, newest=newest, cuts=cuts, **listeners)
        stopwatch.seconds_of["class images"] = prepared.drawing_seconds
        stopwatch.lap("encoding", without="class images")
        family.move_vae("cpu")
        adapted = _adapt(config, family, inputs, run)
        trained, optimizer = adapting.optimizer_(config, adapted, dtype, device.type, report)
        s = session.Session(
            config=config,
            family=family,
            adapted=adapted.modules,
            word=adapted.word,
            prepared=prepared,
            objective=objective_for(config.objective, family.schedule),
            trained=trained,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            accelerator=accelerator,
            run=run,
            continue_command=continue_command,
            drift=watched,
            **listeners,
        )
        trackers.begin(accelerator, config)
        start = session.restore(s, newest)
        del cuts, newest  # nothing needs them any more
        given_back = () if shared is None else (partial(shared.give_back_, adapted),)
        return _trained(s, start, stopwatch, judge, (refresh, *given_back))


def _trained(
    s: session.Session,
    start: int,
    stopwatch: Stopwatch,
    judge: choosing.Judge | None,
    after: Sequence[Callable[[], None]],
) -> Summary:
    """The steps from `start` on, the end, and what comes `after` it."""
    session.draw_preview(s, start)  # of a run killed between a checkpoint and its pictures
    with compiling.where_it_pays(s, start) as run_pass:
        loop.optimize(s, start, run_pass)
    stopwatch.lap("steps and previews")
    summary = ending.finish(s, stopwatch, judge)
    for finishing in after:
        finishing()
    return summary


def _allowed(config: Config, device: torch.device) -> Config:
    """`config` without what gains nothing on `device`. Raises ConfigError for what it cannot do."""
    able = devices.abilities(device)
    abilities.require(config, able)
    return abilities.without_moving(config, able)


def _resolved(config: Config, inputs: decide.Inputs, report: Report, device: torch.device) -> Resolved:
    """`config` with every choice made; what can be wrong with it is found first, where the run does not exist yet."""
    modules = None
    if not is_begun(config.folder):
        filled = decide.filled(abilities.decided(config, devices.abilities(device)), inputs)
        modules = decide.check(filled, device_type=device.type, facts=inputs.facts)
    return decide.resolve(config, inputs, report, device=device, free_gib=devices.free_gib(device), modules=modules)


def _finished_before(config: Config, inputs: decide.Inputs, accelerator: Accelerator, report: Report) -> Summary | None:
    """What the run left if it is finished already: then nothing that depends on the device is chosen any more."""
    if not is_finished(config.folder):
        return None
    with _opened(decide.filled(config, inputs), inputs, accelerator) as run:
        return _told_finished(run, report)


def _told_finished(run: Run, report: Report) -> Summary | None:
    """What a finished run left, None where it is not finished. Raises DiskError when it cannot be read."""
    summary = run.summary()
    if summary is not None:
        report.event("finished", f"{run.folder} is finished already; name another run.folder to train again")
    return summary


def _accelerator(config: Config, report: Report) -> Accelerator:
    if systems.lost_processes():
        report.warn(
            "accelerate has begun one process of several, as it does without several cards; the result is the same, "
            "only later. `torchrun --nproc-per-node 2 -m lora_booth train …` begins two."
        )
    return Accelerator(
        cpu=config.memory.device == "cpu",
        log_with=list(config.run.trackers) or None,
        project_dir=config.folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def _load(
    config: Resolved,
    facts: BaseFacts,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    shared: SharedBase | None,
) -> Family:
    is_offloaded = config.memory.offload_denoiser
    load = partial(
        loading.load,
        config.model,
        device=device,
        dtype=dtype,
        base=facts,
        does_vae_wait=not memory.draws(config),
        do_text_encoders_wait=not config.adapter.is_text_trained,
        is_denoiser_offloaded=is_offloaded,
    )
    files = sources.fingerprint(facts.path)
    key = (files, config.model, str(device), dtype, is_offloaded, config.train.compile)
    is_here = shared is not None and shared.has(key)
    told = f"base {decide.described(config, facts)}, in {dtype} on {device}".replace("torch.", "")
    report.event("base", f"{told}, is here already" if is_here else told)
    family = load() if shared is None else shared.take(key, load, is_denoiser_offloaded=is_offloaded)
    if config.objective.zero_terminal_snr:
        assert isinstance(family.schedule, Diffusion), "refused before for all others"
        family.schedule = family.schedule.rescaled_to_zero_terminal_snr()
    return family


@contextmanager
def _opened(config: Filled, inputs: decide.Inputs, accelerator: Accelerator) -> Iterator[Run]:
    """The run folder, locked by the main process; what goes wrong while it is open is told plainly."""
    folder = config.folder
    given = inputs.identity()
    run = Run.open(folder, config, given, inputs.to_pin()) if accelerator.is_main_process else Run(folder)
    try:
        with _told_plainly(config, inputs, accelerator):
            _require_one_run(accelerator, identity.digest(config, given))
            yield run
    except DiskError:
        if accelerator.is_main_process:
            run.require_taken()  # else it was another process that removed what was half written
        raise
    finally:
        run.close()


def _require_one_run(accelerator: Accelerator, digest: str) -> None:
    """Raises ConfigError where this process would train something else than the main one: each looks for itself, and a
    picture, or the newest commit of a base, may have changed between two looks."""
    if accelerator.num_processes == 1:
        return
    own = torch.tensor([float(int(digest[i : i + 4], 16)) for i in range(0, len(digest), 4)], device=accelerator.device)
    main = accelerator.reduce(own if accelerator.is_main_process else torch.zeros_like(own), "sum")
    if not torch.equal(main, own):
        raise ConfigError(
            f"process {accelerator.process_index} of {accelerator.num_processes} reads other pictures, captions or "
            "files of the base than the first; start them again together."
        )


@contextmanager
def _told_plainly(config: Filled, inputs: decide.Inputs, accelerator: Accelerator) -> Iterator[None]:
    """Turn what torch raises when memory or another process is gone into errors that say what to do."""
    try:
        yield
    except LoraBoothError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise DeviceMemoryError(decide.memory_advice(config, inputs.facts)) from error
        is_lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not is_lost:
            raise
        raise ProcessLostError(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one, whose own output "
            "says why it ended; every checkpoint so far is good, and the same command goes on from the last."
        ) from error


def _notes(wished: Config, config: Resolved, inputs: decide.Inputs, device: torch.device) -> Notes:
    """What this run chose and left out, and what it runs on."""
    found, installed = inputs.pictures.all, versions.versions()
    return Notes(
        chosen=notes.choices(wished, config),
        left_out=notes.by_name((fault.path.name, fault.reason) for one in found for fault in one.left_out),
        remarks=notes.by_name((fault.path.name, fault.reason) for one in found for fault in one.warnings),
        versions={name: text for name, text in installed.items() if name != "platform"},
        device=devices.name(device),
    )


def _reported(
    wished: Config, config: Resolved, inputs: decide.Inputs, run: Run, accelerator: Accelerator, report: Report
) -> tuple[Report, Callable[[], None]]:
    """`report`, or one that also keeps report.html, and what makes that anew; the notes for it are written (main
    process)."""
    if accelerator.is_main_process:
        _notes(wished, config, inputs, accelerator.device).write(run.folder)
    if not config.run.report or not accelerator.is_main_process:
        return report, lambda: None
    from lora_booth.report.write import Refreshing  # a room that runs do without

    refreshing = Refreshing(report, run)
    return refreshing, refreshing.refresh


def _peak_gib(device: torch.device) -> float:
    """Most device memory of tensors so far; on a CPU, most memory of this process."""
    return devices.peak_gib(device) or systems.peak_memory_bytes() / 2**30


def _drawn_sheet(config: Resolved, inputs: decide.Inputs, run: Run, accelerator: Accelerator) -> prepare.Cuts:
    """Draw the contact sheet if it is not there yet (main process); gives the pictures as they were cut for it."""
    cuts = prepare.Cuts()
    if accelerator.is_main_process and not run.has_picture(run.sheet_path):
        run.write_picture(run.sheet_path, prepare.sheet(config, inputs.pictures, cuts))
    return cuts


def _prepared(
    config: Resolved,
    family: Family,
    inputs: decide.Inputs,
    run: Run,
    accelerator: Accelerator,
    *,
    newest: Checkpoint | None,
    **listeners: Any,
) -> tuple[prepare.Prepared, drift.Drift | None]:
    """What is computed once for the steps after the `newest` checkpoint: the main process fills the caches, the others
    find them full; and, of the main process, what drift is measured against."""
    watched, first = None, 0 if newest is None else newest.step
    with accelerator.main_process_first():
        pinned = run.stored()["pinned"]
        rows = pinned.get("watched_rows", None if newest is None else watching.MAX_ROWS)  # as older versions had
        together, watch = pinned.get("class_images_together"), watching.of(config, rows)
        needed: dict[str, Any] = {"validation_rows": watch.rows, "first_step": first, "together": together}
        needed["judged_by"] = [*candidates.prompts(config), *(candidates.drifted(config) if watch.has_drift else ())]
        prepared = prepare.prepare(config, family, inputs.pictures, **needed, **listeners)
        if accelerator.is_main_process:
            run.pin("class_images_together", prepared.drawn_together)
            run.pin("watched_rows", watch.rows)
            if watch.has_drift:
                watched = drift.of_base(config, family, prepared.prompts, watch.rows, listeners["stop"])
    return prepared, watched


def _adapt(config: Resolved, family: Family, inputs: decide.Inputs, run: Run) -> Adapted:
    """Put in what is trained, whose checkpoints the disk must have room for, and set how the denoiser computes."""
    adapted = adapting.adapt_(config, family)
    if config.adapter.continue_from is not None:
        if decide.continued_adapter(config) != inputs.continued:
            raise ModelError(
                f"adapter.continue_from {config.adapter.continue_from} has changed since this run looked at it; run "
                "the same command again."
            )
        inject.load_into_(adapted.modules, storage.read(config.adapter.continue_from))
    checkpoint_bytes = adapted.num_parameters * BYTES_PER_PARAMETER
    require_free_space(run.folder, checkpoint_bytes * (config.train.keep_last + 2))
    family.prepare_denoiser_(
        gradient_checkpointing=config.train.gradient_checkpointing,
        attention=config.model.attention,
        is_offloading=config.memory.offload_activations,
    )
    if config.train.compile is True:
        family.compile_denoiser_()
    return adapted
