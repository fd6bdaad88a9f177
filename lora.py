"""Fine-tune Würstchen v2's prior (Stage C) on captioned pictures: low-rank adapters in its layers.

    python lora.py --train_data_dir my_pictures --mixed_precision bf16 --rank 16
    torchrun --nproc_per_node=gpu lora.py --dataset_name owner/name --resume_from_checkpoint latest

The page is train.py's twin: `diff train.py lora.py` shows all that LoRA changes, and between the
two rules they are the same to the letter. `--help` lists the settings.

    B  pictures of one micro-step    h, w  cells of a latent, resolution / 32
    D  width of the text states      step  optimizer steps, counted from 1
"""

import functools
import math

import torch

from minwurst import (
    cache, checkpoint, config, cost, data, diffusion, dist, draws, hub, lora, models, optim,
    pictures, pipelines, signals, validation,
)  # fmt: skip
from minwurst.report import Log, check_trackers, closing, make_trackers, opening, say, write_run


def main(settings):
    # ---- Who we are, and where we stand: a fresh run, or one that goes on.
    rank, world, device = dist.start()
    output_dir = dist.on_main(checkpoint.make_folder, settings.output_dir)
    dist.on_main(checkpoint.lock, output_dir)
    resumed = dist.on_main(checkpoint.find, settings.resume_from_checkpoint, output_dir)
    saved, state = checkpoint.load(resumed) if resumed else ({}, checkpoint.FRESH)
    seed = settings.seed = dist.on_main(draws.choose_seed, settings.seed, state["seed"])
    opening(settings, device, world, resumed)
    dist.on_main(check_trackers, settings.report_to)
    if settings.push_to_hub:  # a wrong token fails now
        settings.hub_model_id = dist.on_main(
            hub.make_repository, settings.hub_model_id or output_dir.resolve().name,
            settings.hub_private, settings.hub_token,
        )  # fmt: skip
    changes = checkpoint.changes(state["settings"], config.public(settings))

    # ---- Data and models are found; then every row is read once, before anything large is loaded.
    rows = data.open_rows(
        settings.dataset_name, settings.dataset_config_name, settings.train_data_dir,
        settings.image_column, settings.caption_column, settings.cache_dir,
    )  # fmt: skip
    all_rows = data.sample_rows(rows, settings.max_train_samples, seed)
    prior_folder = models.locate(
        "pretrained_prior_model_name_or_path",
        settings.pretrained_prior_model_name_or_path,
        settings.cache_dir,
    )
    encoder_folder = models.locate(
        "image_encoder_name_or_path", settings.image_encoder_name_or_path, settings.cache_dir
    )
    text_folder = models.text_folder(prior_folder, settings.cache_dir)
    models.check_parts(prior_folder, text_folder, encoder_folder)
    decoder_folder = None
    if settings.validation_prompts and settings.validation_decoder == "full":
        decoder_folder = pipelines.find_decoder(
            settings.pretrained_decoder_model_name_or_path, settings.cache_dir
        )
    found_good = None
    if settings.cache_latents:
        cache_dir = settings.cache_dir or output_dir
        cache_dir = dist.on_main(checkpoint.make_folder, cache_dir, "cache_dir")
        found_good = cache_dir / "good_rows.txt"
    all_rows, fingerprint = data.check_rows(all_rows, settings.skip_bad_samples, found_good)
    rows, held_out = data.hold_out(all_rows, settings.validation_split, seed)

    # ---- Length: a step is one update of the weights, whatever number of ranks share its batch.
    batch, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
    global_batch = batch * accumulation * world
    last_step = settings.max_train_steps
    if last_step is None:
        last_step = math.ceil(settings.num_train_epochs * len(rows) / global_batch)
    steps = range(state["step"] + 1, last_step + 1)
    if not steps:
        say(f"Step {state['step']} is reached already: --max_train_steps would have to be larger.")

    # ---- What makes it this run and no other; one that goes on must agree.
    identity = {
        "global_batch": global_batch,
        "data": fingerprint,
        "encoders": dist.on_main(
            models.fingerprint,
            encoder_folder, text_folder / "text_encoder", text_folder / "tokenizer",
        ),
        "prior": dist.on_main(models.fingerprint, models.prior_part(prior_folder)),
        "world": world,
    }
    for change in changes + checkpoint.changes(state["identity"], identity):
        say(f"changed since then: {change}")
    dist.on_main(checkpoint.set_aside_later, output_dir, state["step"])

    # ---- Precision: trained weights are fp32; autocast runs the forward pass in the compute type.
    compute_types = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    compute_type = compute_types[settings.mixed_precision]
    autocast = torch.autocast(device.type, compute_type, enabled=compute_type != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_type == torch.float16)
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    torch.backends.cudnn.allow_tf32 = settings.allow_tf32

    # ---- The frozen encoders turn a batch into what the prior sees; or all beforehand.
    encoders = models.Encoders(text_folder, encoder_folder, compute_type, device)
    prompts = settings.validation_prompts or []
    if prompts:
        models.tell_cut(encoders.for_text[0], prompts)
    prompts = {prompt: encoders.text([prompt, ""]) for prompt in prompts}

    def encode(samples):
        """{"pixels": (B, 3, R, R), "captions": B texts} → (B, 16, h, w) fp32, (B, 77, D)."""
        return encoders.latents(samples["pixels"]), encoders.text(samples["captions"])

    make_pairs, workers = data.Pairs, settings.dataloader_num_workers
    if settings.cache_latents:
        folder = cache.place(
            cache_dir, data=fingerprint, encoders=identity["encoders"],
            resolution=settings.resolution, text_type=str(compute_type),
        )  # fmt: skip
        store = cache.fill(folder, all_rows, encoders, settings.resolution, workers)
        encode, make_pairs = store.encode, functools.partial(cache.Pairs, store=store)

    # ---- The network, frozen in the compute type, and by name what is trained: adapters in fp32.
    prior = models.load_prior(prior_folder, compute_type).to(device).train()
    models.check_fit(prior, encoders)
    if settings.gradient_checkpointing:
        prior.enable_gradient_checkpointing()

    def adapt(prior):
        """In the target layers W becomes W + (alpha/rank)·B·A, with A drawn and B zero."""
        alpha = settings.rank if settings.lora_alpha is None else settings.lora_alpha
        targets, dropout = settings.lora_targets, settings.lora_dropout
        return lora.inject(prior, settings.rank, alpha, targets, dropout)

    torch.manual_seed(seed)
    trainable = adapt(prior)
    if settings.lora_weights and not resumed:
        lora.start_from(prior, settings.lora_weights)

    # ---- What moves it; and, in a resumed run, how far it had come.
    optimizer = optim.adamw(
        trainable.values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        eight_bit=settings.use_8bit_adam,
    )
    ema = optim.EMA(trainable, settings.ema_decay) if settings.use_ema else optim.NoEMA()
    if resumed:
        optim.copy_into(trainable, saved["weights"])
        optim.copy_into(ema.average, saved.get("ema", {}))
        optim.restore_state(optimizer, trainable, saved.get("optimizer", {}), state["optimizer"])
        optim.restore_scaler(scaler, state["scaler"])
    del saved  # it keeps the checkpoint's files open, which rotation wants to remove
    updates = state["updates"]
    schedule = optim.learning_rates(
        optimizer,
        settings.lr_scheduler,
        warmup=settings.lr_warmup_steps,
        total=last_step,
        updates=updates,
    )
    model = dist.wrap(prior, device, autocast)

    def save_checkpoint(step, updates):
        """All that a resumed run needs; random numbers are not in it, they follow from the seed."""
        tensors, numbers = optim.state_by_name(optimizer, trainable)
        groups = {"weights": trainable, "optimizer": tensors, "ema": ema.average}
        facts = {
            "step": step, "updates": updates, "seed": seed, "identity": identity,
            "settings": config.public(settings),
            "scaler": scaler.state_dict(), "optimizer": numbers,
        }  # fmt: skip
        limit = settings.checkpoints_total_limit
        dist.on_main(checkpoint.save, output_dir, step, groups, facts, limit)

    # ---- The stream of samples from where we stand, and where the numbers go.
    pairs = make_pairs(rows, settings.resolution, seed, settings.caption_dropout)
    cut = {"batch": batch, "accumulation": accumulation, "world": world}
    places = (place for step in steps for place in draws.micro_batches(step, rank, **cut))
    stream = data.batches(pairs, places, workers, pin_memory=device.type == "cuda")
    guard = optim.FiniteGuard(
        fp16=scaler.is_enabled(),
        rows_of=lambda step, rank: pairs.row_numbers(draws.micro_batches(step, rank, **cut)),
    )
    frozen = [] if settings.cache_latents else encoders.parts()
    cost.announce(
        settings, prior, trainable, frozen, compute_type,
        rows=len(rows), world=world, steps=steps, adapt=adapt,
    )  # fmt: skip
    public, log_folder = config.public(settings), output_dir / settings.logging_dir
    run = dist.on_main(
        write_run, output_dir / "run.json", public, identity, hub.published(public, prior_folder),
        max(last_step, state["step"]), device, resumed,
    )  # fmt: skip
    project = settings.tracker_project_name
    trackers = make_trackers(settings.report_to, log_folder, steps.start, project, run)
    log = Log(trackers, every=settings.logging_steps, steps=steps, global_batch=global_batch)

    # ---- Validation, before, during and after: pictures of the prompts, the loss on other rows.
    looks, picture_folder = [], output_dir / "validation"

    def make_decoder():
        if settings.validation_decoder == "preview":
            return pictures.PreviewDecoder(pairs, encode)
        return pictures.FullDecoder(decoder_folder, device, half=compute_type != torch.float32)

    if prompts:
        looks += [validation.Draw(
            prior, autocast, log, prompts, seed=seed, cells=settings.resolution // 32,
            decoder=make_decoder, folder=picture_folder,
        )]  # fmt: skip
    if held_out:
        others = make_pairs(held_out, settings.resolution, draws.held_out_seed(seed))
        looks += [validation.HeldOutLoss(
            prior, autocast, log, others, encode, batch=batch, workers=workers, device=device
        )]  # fmt: skip
    every = settings.validation_steps
    every = every or max(1, round(settings.validation_epochs * len(rows) / global_batch))
    validate = validation.Validation(prior, ema, log, looks, every=every, last_step=last_step)
    if not resumed:
        validate(0)
    asked = signals.listen()  # until here a signal just ends the run

    # ================================================================================== the loop
    for step in steps:
        torch.manual_seed(draws.dropout_seed(seed, step, rank))  # for dropout inside the network
        step_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            samples = next(stream)
            latents, text = encode(samples)                             # (B, 16, h, w), (B, 77, D)

            # A sample's time and noise follow from the seed and its position in the stream.
            uniform = draws.uniform(seed, samples["positions"])                              # (B,)
            t = diffusion.timesteps(uniform, settings.timestep_sampling)                     # (B,)
            noise = draws.noise(seed, samples["positions"], latents.shape[1:])     # (B, 16, h, w)
            t, noise = data.to_device(t, device), data.to_device(noise, device)
            noisy = diffusion.add_noise(latents, noise, t)                         # (B, 16, h, w)

            with dist.sync_gradients(model, last=micro_step == accumulation - 1):
                with autocast:
                    predicted = model(noisy, t, text)                              # (B, 16, h, w)
                error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))             # (B,)
                weight = diffusion.loss_weight(t, settings.loss_weighting)                   # (B,)
                loss = (weight * error).mean() / accumulation
                scaler.scale(loss).backward()
            step_loss += loss.detach()

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), settings.max_grad_norm)
        # The one time in a step that the device is read, and that ranks agree.
        finite, asked = guard.check(step, step_loss, norm, signals.heard())
        scaler.step(optimizer)  # in fp16, an overflowed gradient leaves the weights as they are
        scaler.update()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients stay in its buckets
        log.step(step, step_loss, norm, schedule.get_last_lr()[0])
        if finite:
            updates += 1
            schedule.step()
            ema.update(updates)

        if asked not in signals.ENDS:
            validate(step)
        if asked or step % settings.checkpointing_steps == 0 or step == last_step:
            save_checkpoint(step, updates)
        if asked in signals.ENDS:
            break
    # ============================================================================================

    log.close()
    if signals.ended(asked):
        return asked
    result = output_dir / lora.FILE
    with ema.in_place():
        dist.on_main(lora.save, prior, result)
    closing(result, picture_folder / validation.Draw.BOTH, log_folder, settings)


if __name__ == "__main__":
    dist.run(main, hub.share, config.LoRASettings)
