"""Fine-tune Würstchen v2's prior (Stage C) on captioned pictures: all of its weights.

    python train.py --train_data_dir my_pictures --mixed_precision bf16 --gradient_checkpointing
    torchrun --nproc_per_node=gpu train.py --dataset_name owner/name --resume_from_checkpoint latest

The page reads from the top: set-up, the loop, the export. `--help` lists the settings.

    B  pictures of one micro-step    h, w  cells of a latent, resolution / 32
    D  width of the text states      step  optimizer steps, counted from 1
"""

import math

import torch

from minwurst import checkpoint, config, cost, data, diffusion, dist, draws, hub, models, optim, report


def main(settings):
    # ---- Who we are, and where we stand: a fresh run, or one that goes on.
    rank, world, device = dist.start()
    output_dir = dist.on_main(checkpoint.make_folder, settings.output_dir)
    resumed = dist.on_main(checkpoint.find, settings.resume_from_checkpoint, output_dir)
    saved, state = checkpoint.load(resumed) if resumed else ({}, checkpoint.FRESH)
    seed = settings.seed = dist.on_main(draws.choose_seed, settings.seed, state["seed"])
    report.opening(settings, device, world, resumed, checkpoint.changes(state["settings"], vars(settings)))

    # ---- Data. Every row is read once before anything large is loaded.
    rows = data.open_rows(
        settings.dataset_name, settings.dataset_config_name, settings.train_data_dir,
        settings.image_column, settings.caption_column, settings.cache_dir,
    )  # fmt: skip
    rows = data.sample_rows(rows, settings.max_train_samples, seed)
    batch, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
    identity = {"global_batch": batch * accumulation * world, "data": data.check_rows(rows)}
    checkpoint.changes(state["identity"], identity)
    total_pictures = settings.num_train_epochs * len(rows)
    last_step = settings.max_train_steps or math.ceil(total_pictures / identity["global_batch"])

    # ---- Precision: trained weights are fp32; autocast runs the forward pass in the compute type.
    compute_type = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.mixed_precision]
    autocast = torch.autocast(device.type, compute_type, enabled=compute_type != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_type == torch.float16)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32

    # ---- The frozen encoders: a batch becomes what the prior sees.
    base = models.locate(
        settings.pretrained_prior_model_name_or_path, "--pretrained_prior_model_name_or_path", settings.cache_dir
    )
    tokenizer, text_encoder = models.load_text(base, compute_type, settings.cache_dir)
    image_encoder = models.load_image_encoder(
        models.locate(settings.image_encoder_name_or_path, "--image_encoder_name_or_path", settings.cache_dir)
    )
    text_encoder.to(device), image_encoder.to(device)

    @torch.no_grad()
    def encode(samples):
        """{"pixels": (B, 3, R, R), "captions": B texts} → latents (B, 16, h, w) fp32, text (B, 77, D)."""
        encoded = image_encoder(samples["pixels"].to(device, non_blocking=True))
        return diffusion.scale_latents(encoded), models.encode_text(tokenizer, text_encoder, samples["captions"])

    # ---- The network, and by name what of it is trained: here, everything.
    prior = models.load_prior(base).to(device).train()
    models.check_fit(prior, text_encoder, image_encoder)
    if settings.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    trainable = dict(prior.named_parameters())
    if resumed:
        optim.copy_into(trainable, saved["weights"])
    model = dist.wrap(prior, device)

    # ---- What moves it.
    optimizer = optim.adamw(
        trainable.values(), lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon, eight_bit=settings.use_8bit_adam,
    )  # fmt: skip
    ema = optim.EMA(trainable, settings.ema_decay) if settings.use_ema else optim.NoEMA()
    if resumed:
        optim.restore_state(optimizer, trainable, saved.get("optimizer", {}), state["optimizer"])
        optim.copy_into(ema.average, saved.get("ema", {}))
        optim.restore_scaler(scaler, state["scaler"])
    schedule = optim.learning_rates(
        optimizer, settings.lr_scheduler, warmup=settings.lr_warmup_steps, total=last_step, updates=state["updates"]
    )
    guard = optim.FiniteGuard(scaler.is_enabled())

    def save_checkpoint(step, updates):
        """All that a resumed run needs. Random numbers are not in it: they follow from (seed, step)."""
        tensors, numbers = optim.state_by_name(optimizer, trainable)
        groups = {"weights": trainable, "optimizer": tensors, "ema": ema.average}
        facts = {
            "step": step, "updates": updates, "seed": seed, "world": world, "identity": identity,
            "settings": config.public(settings), "optimizer": numbers, "scaler": scaler.state_dict(),
        }  # fmt: skip
        dist.on_main(checkpoint.save, output_dir, step, groups, facts, settings.checkpoints_total_limit)

    # ---- The stream of samples from where we stand, and where the numbers go.
    first_step = state["step"] + 1
    share = dict(rank=rank, batch=batch, accumulation=accumulation, world=world)
    micro_batches = [
        draws.positions(step, micro_step, **share)
        for step in range(first_step, last_step + 1)
        for micro_step in range(accumulation)
    ]
    pairs = data.Pairs(rows, settings.resolution, seed, settings.caption_dropout)
    stream = data.batches(pairs, micro_batches, settings.dataloader_num_workers, device.type == "cuda")
    cost.announce(settings, prior, trainable, text_encoder, image_encoder, len(rows), first_step, last_step, world)
    log = report.Log(settings, output_dir, first_step, last_step, identity["global_batch"])
    updates = state["updates"]

    # ================================================================================== the loop
    for step in range(first_step, last_step + 1):
        torch.manual_seed(draws.dropout_seed(seed, step, rank))  # for dropout inside the network
        step_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            samples = next(stream)
            latents, text = encode(samples)                             # (B, 16, h, w), (B, 77, D)

            # Each sample's time and noise follow from (seed, its position in the stream).
            uniform = draws.uniform(seed, samples["positions"])                              # (B,)
            t = diffusion.timesteps(uniform, settings.timestep_sampling).to(device)          # (B,)
            noise = draws.noise(seed, samples["positions"], latents.shape[1:]).to(device)
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
        finite = guard.check(step, step_loss, norm)  # the only time the device is waited for
        scaler.step(optimizer)  # in fp16 an overflowed gradient leaves the weights as they are
        scaler.update()
        optimizer.zero_grad()
        log.step(step, step_loss, norm, schedule.get_last_lr()[0])
        if finite:
            updates += 1
            schedule.step()
            ema.update(updates)

        if step % settings.checkpointing_steps == 0 or step == last_step:
            save_checkpoint(step, updates)
    # ============================================================================================

    log.close()
    with ema.in_place():
        dist.on_main(hub.export_prior, output_dir / "prior_pipeline", prior, base, settings.cache_dir)
    report.closing(output_dir, settings)
    dist.stop()


if __name__ == "__main__":
    config.run(main, config.Settings)
