"""Fine-tune Würstchen v2's prior (Stage C) on captioned images: all of its weights.

    python train.py --train_data_dir my_images --mixed_precision bf16 --gradient_checkpointing
    torchrun --nproc_per_node=gpu train.py --dataset_name owner/name --resume_from_checkpoint latest

Read it from top to bottom: set-up, the loop, the export. train.py trains all weights and lora.py
low-rank adapters; `diff train.py lora.py` shows the difference. `--help` lists the settings.

    B  images per rank and micro-step       h, w  height and width of the latents, resolution / 32
    D  width of the text encoder's states   step  an optimizer step, counted from 1
"""

# The command line is parsed before torch is imported, so that --help is fast. miniature.TRAIN and
# LORA are what --demo sets. This block of imports differs between train.py and lora.py.
from minwurst import miniature
from minwurst.base.settings import Settings, from_command_line
SETTINGS = from_command_line(Settings, miniature.TRAIN) if __name__ == "__main__" else None
from minwurst.edge import export

import torch

from minwurst.edge import dataset, models, push
from minwurst.edge.cache import open_source
from minwurst.run.log import open_log
from minwurst.run.run import Run
from minwurst.run.state import State
from minwurst.run.validation import EvaluationModel, Validation
from minwurst.step import diffusion, distributed, metrics, randomness, signals
from minwurst.step.guard import FiniteGuard
from minwurst.step.optimizer import EMA, NoEMA, choose_adamw, learning_rates
from minwurst.step.samples import batches


def main(settings):
    # The run claims its folder and finds its seed (also settings.seed) and its checkpoint, if any.
    device = distributed.start()
    run = Run.open(settings, device)

    # Data and models are found, then every row is read once, before anything large is loaded.
    table = dataset.find(settings)
    parts = models.find(settings)  # the folders of prior, text encoder, image encoder, decoder
    data = dataset.check_and_split(table, run)
    run.identify(parts, data)  # refuses to resume another run; sets run.steps and run.last_step

    # Precision: trained weights are fp32; autocast runs the forward pass in the compute type.
    compute_types = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    compute_type = compute_types[settings.mixed_precision]
    autocast = torch.autocast(device.type, compute_type, enabled=compute_type != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_type == torch.float16)
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    torch.backends.cudnn.allow_tf32 = settings.allow_tf32

    # The source of latents and conditions: the frozen encoders, which encode every batch, or with
    # --cache_latents a cache that is filled here. It also holds the encoded validation prompts.
    source = open_source(run, data, compute_type)

    # ---- What is trained: all weights of the prior, in fp32. With --from_scratch, it is a new one.
    prior = models.initial_prior(parts, run.seed).to(device).train()
    trainable = dict(prior.named_parameters())
    # ----
    if settings.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    if settings.compile:
        prior.compile_blocks()

    # What updates it; in a resumed run, from where the checkpoint left off. The schedule needs no
    # state: it follows from the number of updates, which are the steps that were not skipped.
    AdamW = choose_adamw(settings.use_8bit_adam)  # torch's (fused), or bitsandbytes'
    optimizer = AdamW(
        trainable.values(), lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon,
    )  # fmt: skip
    ema = EMA(trainable, settings.ema_decay) if settings.use_ema else NoEMA()
    state = State(weights=trainable, optimizer=optimizer, ema=ema.average, scaler=scaler)
    updates = run.restore(state)
    schedule = learning_rates(
        optimizer, settings.lr_scheduler, settings.lr_warmup_steps, run.last_step, updates
    )
    model = distributed.wrap_ddp(prior, device, autocast)  # on one rank, the prior itself

    # Samples: one endless shuffled stream, of which every rank reads its own positions.
    samples = source.samples(data, run)
    stream = batches(samples, run.positions(), settings.dataloader_num_workers)
    objective = diffusion.objective_of(prior.config, **settings.objective_options())

    # What watches: memory and disk before the first step, then non-finite numbers, log, validation.
    run.announce(prior, source)
    guard = FiniteGuard(
        fp16=scaler.is_enabled(), samples=samples, layout=run.layout, weights=trainable,
        first_after_resuming=run.checkpoint and run.steps and run.steps[0],
    )  # fmt: skip
    log = open_log(run)
    evaluated = EvaluationModel(prior, ema, autocast)  # without DDP; with averaged weights, if any
    validate = Validation(run, data, source, evaluated, log)
    validate.catch_up()  # before training, and what a kill prevented
    accumulation = settings.gradient_accumulation_steps
    signal = signals.listen()  # none yet; until here, a signal simply ends the process

    # ================================================================================== the loop
    for step in run.steps:
        torch.manual_seed(randomness.dropout_seed(run.seed, step, run.rank))  # network's dropout
        step_loss = 0.0
        for micro_step in range(accumulation):
            batch = next(stream)  # {"pixels", "captions"} or what is cached of them, "positions"
            latents, condition = source.encode(batch)      # (B, 16, h, w), {"text": (B, 77, D)}

            # Time (0 is clean, 1 is noise) and noise follow from the seed and a sample's position.
            positions = batch["positions"]                                       # B integers
            uniform = randomness.uniform(run.seed, positions, latents.device)                # (B,)
            t = objective.timesteps(uniform)                                                 # (B,)
            noise = randomness.noise_like(latents, run.seed, positions)            # (B, 16, h, w)
            noisy = objective.add_noise(latents, noise, t)                         # (B, 16, h, w)
            target = objective.target(latents, noise, t)          # usually the noise, (B, 16, h, w)

            with distributed.sync_gradients(model, last=micro_step == accumulation - 1):
                with autocast:
                    predicted = model(noisy, t, **condition)                       # (B, 16, h, w)
                error = (predicted.float() - target).square().mean(dim=(1, 2, 3))           # (B,)
                weight = objective.loss_weight(t)                                            # (B,)
                loss = (weight * error).mean() / accumulation
                scaler.scale(loss).backward()
            step_loss += loss.detach()
            metrics.by_time("loss", error, t)  # for the log, in each quarter of t

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), settings.max_grad_norm)
        # Here the host waits for the device, and ranks agree whether to update, save or stop.
        finite, signal = guard.check(step, step_loss, norm)
        scaler.step(optimizer)  # skips the update if not finite, which happens in fp16 only
        scaler.update()
        optimizer.zero_grad(set_to_none=model is prior)  # under DDP, gradients stay in its buckets
        log.step(step, step_loss, norm, schedule.get_last_lr()[0])
        if finite:
            updates += 1
            schedule.step()
            ema.update(updates)

        if signal or run.is_save_due(step):  # any signal asks for a checkpoint
            run.save(step, updates, state, stop=signal in signals.ENDING)
        if signal in signals.ENDING:
            break
        validate(step)  # whatever goes wrong there, training is saved and continues
    # ============================================================================================

    log.close()
    if signals.finish(signal):
        return signal  # the exit code is 128 more
    with ema.in_place():
        folder = run.folder / export.FOLDER
        result = distributed.on_main(
            export.save_pipeline, prior, folder, parts.text, settings.said()
        )
    run.report(result)


if __name__ == "__main__":
    distributed.launch(main, SETTINGS, then=push.push_result)  # pushes if --push_to_hub is given
