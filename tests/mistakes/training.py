"""Mistakes in the loop, crops, augmentation, loader, objectives, optimizer and checkpoints."""

from . import Mistake

GOLDEN = "tests/test_golden_runs.py::"
DINO = GOLDEN + "test_a_run_gives_the_stored_numbers[dino]"
OTHER = GOLDEN + "test_a_run_gives_the_stored_numbers[dino_other]"
MAE = GOLDEN + "test_a_run_gives_the_stored_numbers[mae]"
DISTILL = "tests/objectives/test_distill.py::"
PIXELS = GOLDEN + "test_a_run_gives_the_stored_numbers[mae_other]"
TWO = GOLDEN + "test_two_processes_give_the_numbers_of_two_micro_batches[dino]"

LOOP = [
    Mistake(
        "the loop never calls before_step",
        "step.py",
        "    if before_step:\n",
        "    if False:\n",
        DINO,
        issue=True,
    ),
    Mistake(
        "the loop uses the schedule of step + 1",
        "pretraining.py",
        "optim.set_schedule(optimizer, training.schedule, step)",
        "optim.set_schedule(optimizer, training.schedule, step + 1)",
        MAE,
        issue=True,
    ),
    Mistake(
        "the skip on a non-finite gradient removed",
        "step.py",
        "skip = torch.maximum(skip, (~torch.isfinite(norm)).float())",
        "skip = torch.maximum(skip, skip)",
        "tests/test_step.py",
        issue=True,
    ),
    Mistake(
        "losses of micro-batches are added up instead of averaged",
        "step.py",
        'values["loss"] / accumulate',
        'values["loss"]',
        MAE,
    ),
    Mistake(
        "gradients are averaged over processes at the first micro-batch only",
        "step.py",
        "last = micro == accumulate - 1 and",
        "last = micro == 0 and",
        "tests/test_run.py::test_micro_batches_and_processes_do_not_change_a_run",
    ),
    Mistake(
        "gradients are averaged over processes in the first part of a micro-batch only",
        "step.py",
        "last = micro == accumulate - 1 and part is parts[-1]",
        "last = micro == accumulate - 1 and part is parts[0]",
        "tests/test_step.py",
    ),
    Mistake(
        "the last part of a micro-batch is left out",
        "step.py",
        "for part in (parts := split(batch)):",
        "for part in (parts := split(batch)[: max(1, len(split(batch)) - 1)]):",
        "tests/objectives/test_dino.py",
    ),
    Mistake(
        "the loss of a part is a mean over its own crops",
        "objectives/dino.py",
        "(batch.images * 2 * (num_views - 1))",
        "(len(crops) * 2 * (num_views - 1))",
        "tests/objectives/test_dino.py",
    ),
    Mistake(
        "a part of the global crops learns from the teacher's answer to itself",
        "objectives/dino.py",
        "rows = (rows + batch.images) % (2 * batch.images) if is_global",
        "rows = rows if is_global",
        "tests/objectives/test_dino.py",
    ),
    Mistake(
        "every step draws the same dropout",
        "step.py",
        'rng.fold_in(seed, "model", step, micro, rank())',
        'rng.fold_in(seed, "model", micro, rank())',
        "tests/test_step.py",
    ),
    Mistake(
        "all micro-batches draw the same dropout",
        "step.py",
        'rng.fold_in(seed, "model", step, micro, rank())',
        'rng.fold_in(seed, "model", step, rank())',
        "tests/test_step.py",
    ),
    Mistake("gradients are never cleared", "step.py", "    optimizer.zero_grad()\n", "    pass\n", MAE),
    Mistake(
        "buffers of a skipped step are kept",
        "step.py",
        "    buffers.restore_if(skip)\n",
        "    pass\n",
        "tests/test_nonfinite.py::test_a_step_that_is_not_finite_changes_nothing_but_the_counts[true]",
    ),
    Mistake(
        "each process evaluates with statistics of its own images",
        "step.py",
        "    average_statistics(module)\n",
        "    pass\n",
        "tests/test_step.py",
    ),
    Mistake(
        "values of micro-batches are logged as their sum",
        "step.py",
        "window.add(values, 1 / accumulate,",
        "window.add(values, 1.0,",
        MAE,
    ),
    Mistake(
        "a logged line averages over skipped steps too",
        "metrics.py",
        "{name: value / taken for",
        '{name: value / state["steps"] for',
        "tests/test_metrics.py",
    ),
    Mistake(
        "a resumed run reads the images of its first step",
        "pretraining.py",
        "config.data.jpeg_scaling, (run.step, sys.maxsize",
        "config.data.jpeg_scaling, (0, sys.maxsize",
        "tests/test_run.py::test_a_line_of_the_log_that_a_kill_interrupts_is_the_same_line",
    ),
    Mistake(
        "images of one micro-batch are counted as those of a step",
        "pretraining.py",
        "run.images_seen + plan.layout.global_batch_size",
        "run.images_seen + plan.layout.batch_size",
        MAE,
    ),
    Mistake(
        "k-NN is asked one step late",
        "pretraining.py",
        "run.step % evaluate_every == 0",
        "(run.step - 1) % evaluate_every == 0",
        MAE,
    ),
]

CROPS = [
    Mistake(
        "local crops cut with global_crop_scale",
        "objectives/dino.py",
        "data.pair(config.local_crop_size), config.local_crop_scale",
        "data.pair(config.local_crop_size), config.global_crop_scale",
        DINO,
        issue=True,
    ),
    Mistake(
        "every crop of an image has the same place",
        "data/crops.py",
        "[crop_key(key, name, v) for v",
        "[crop_key(key, name, 0) for v",
        DINO,
    ),
    Mistake(
        "a box's ratio is drawn evenly instead of on a logarithmic scale",
        "data/crops.py",
        "torch.exp(log_lo + (log_hi - log_lo) * u[:, tries : 2 * tries])",
        "crop.ratio[0] + (crop.ratio[1] - crop.ratio[0]) * u[:, tries : 2 * tries]",
        MAE,
    ),
    Mistake(
        "a box never touches the lower edge",
        "data/crops.py",
        "(u[:, -2] * (height - h + 1)).long()",
        "(u[:, -2] * (height - h)).long()",
        MAE,
    ),
    Mistake(
        "a box is as wide as it is high",
        "data/crops.py",
        "w = (area * ratio).sqrt()",
        "w = (area / ratio).sqrt()",
        MAE,
    ),
    Mistake(
        "crops are resized bilinearly",
        "data/crops.py",
        'interpolation: Literal["bicubic", "bilinear"] = "bicubic"',
        'interpolation: Literal["bicubic", "bilinear"] = "bilinear"',
        MAE,
    ),
    Mistake("crops are resized without antialiasing", "data/crops.py", "antialias=True", "antialias=False", MAE),
    Mistake(
        "a box's area is a share of the image's height squared",
        "data/crops.py",
        "(height * width).double()",
        "(height * height).double()",
        "tests/data/test_crops.py",
    ),
]

AUGMENTATION = [
    Mistake(
        "the same colours for every crop of an image",
        "data/augment.py",
        "crop_key(key, name, v)",
        "crop_key(key, name, 0)",
        DINO,
        issue=True,
    ),
    Mistake(
        "blur cut short: two box filters instead of three",  # the issue's "cut at 1.5 sigma"; nothing is cut now
        "data/augment.py",
        "_box_filter(n, radius), 3)",
        "_box_filter(n, radius), 2)",
        DINO,
        issue=True,
    ),
    Mistake(
        "images are flipped upside down instead of left-right",
        "data/augment.py",
        "on_rows(p.flip, lambda y: y.flip(-1))",
        "on_rows(p.flip, lambda y: y.flip(-2))",
        MAE,
    ),
    Mistake(
        "jitter comes in one order",
        "data/augment.py",
        "order=u[:, 2:6].argsort(dim=1)",
        "order=torch.arange(4).expand(len(u), 4)",
        DINO,
    ),
    Mistake("hue turns the other way", "data/augment.py", "angle + 6 * shift", "angle - 6 * shift", DINO),
    Mistake("dark pixels are solarised", "data/augment.py", "x >= SOLARIZE_THRESHOLD", "x < SOLARIZE_THRESHOLD", DINO),
    Mistake(
        "gray weights in the order of BGR", "data/augment.py", "(0.2989, 0.587, 0.114)", "(0.114, 0.587, 0.2989)", DINO
    ),
    Mistake(
        "images are not normalised", "data/augment.py", "normalize(apply(pixels / 255,", "(apply(pixels / 255,", MAE
    ),
    Mistake(
        "contrast is about the mean of all images",
        "data/augment.py",
        "gray(x).mean(dim=(-2, -1), keepdim=True)\n",
        "gray(x).mean()\n",
        DINO,
    ),
    Mistake(
        "the second global crop is blurred as often as the first",
        "objectives/dino.py",
        "config.blur_prob[1], solarize_prob",
        "config.blur_prob[0], solarize_prob",
        DINO,
    ),
]

LOADER = [
    Mistake(
        "every epoch has the same order",
        "data/loader.py",
        'rng.fold_in(self.seed, "order", epoch), epoch',
        'rng.fold_in(self.seed, "order", 0), epoch',
        MAE,
    ),
    Mistake(
        "an image is cropped alike in every epoch",
        "data/loader.py",
        'rng.fold_in(self.seed, "image", epoch)',
        'rng.fold_in(self.seed, "image", 0)',
        MAE,
    ),
    Mistake(
        "all processes get the same images",
        "data/loader.py",
        "* layout.world_size + layout.rank\n",
        "* layout.world_size\n",
        TWO,
    ),
    Mistake(
        "micro-batches of several processes overlap",
        "data/loader.py",
        "layout.accumulate + micro) * layout.world_size + layout.rank\n",
        "layout.accumulate) * layout.world_size + micro + layout.rank\n",
        "tests/data/test_loader.py",
    ),
    Mistake(
        "a substitute is counted as the image that could not be read",
        "data/loader.py",
        "image, index[b] = self._substitute(k, bad)",
        "image, _ = self._substitute(k, bad)",
        "tests/data/test_loader.py",
    ),
]

OBJECTIVES = [
    Mistake(
        "prototypes multiplied in bf16",
        "model/heads.py",
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast(x.device.type, torch.bfloat16)",
        "tests/model/test_heads.py",
        issue=True,
    ),
    Mistake(
        "the class token's own initialisation removed",
        "objectives/dino.py",
        "trunc_normal_(cls_token, std=0.02)",
        "pass",
        DINO,
        issue=True,
    ),
    Mistake(
        "one drop-path key for all crops",
        "objectives/dino.py",
        'crop_key(views["key"], name, v) for v',
        'crop_key(views["key"], name, 0) for v',
        DINO,
        issue=True,
    ),
    Mistake(
        "MAE's 1e-6 outside the root",
        "objectives/mae.py",
        "(variance + 1e-6).sqrt()",
        "(variance.sqrt() + 1e-6)",
        MAE,
        issue=True,
    ),
    Mistake(
        "the teacher is sharpened with the student's temperature",
        "objectives/dino.py",
        "/ teacher_temp).softmax",
        "/ self.config.student_temp).softmax",
        DINO,
    ),
    Mistake(
        "the teacher's temperature warms up at every step",
        "objectives/dino.py",
        "if whole else",
        "if False else",
        DINO,
    ),
    Mistake(
        "the center is not taken off", "objectives/dino.py", "(teacher_logits - self.center)", "(teacher_logits)", DINO
    ),
    Mistake(
        "the center moves by its momentum instead of the rest",
        "objectives/dino.py",
        "1 - self.config.center_momentum",
        "self.config.center_momentum",
        DINO,
    ),
    Mistake(
        "the center's mean is not divided by the number of processes",
        "objectives/dino.py",
        "(self.logit_count * world_size())",
        "self.logit_count",
        TWO,
    ),
    Mistake("the center's sums are never cleared", "objectives/dino.py", "        self.logit_sum.zero_()\n", "", DINO),
    Mistake(
        "a global crop is compared with itself",
        "objectives/dino.py",
        "torch.cat([second, first, *",
        "torch.cat([first, second, *",
        DINO,
    ),
    Mistake(
        "local crops are compared with the first global crop only",
        "objectives/dino.py",
        "[first + second]",
        "[2 * first]",
        DINO,
    ),
    Mistake(
        "the teacher moves by its momentum instead of the rest",
        "model/ema.py",
        "1 - self.momentum(step)",
        "self.momentum(step)",
        DINO,
    ),
    Mistake(
        "the teacher drops paths too",
        "objectives/dino.py",
        "teacher = factory.create(model, size, data_config.in_chans)",
        "teacher = factory.create(model, size, data_config.in_chans, drop_path=config.drop_path)",
        DINO,
    ),
    Mistake(
        "prototypes stay frozen one step too long",
        "objectives/dino.py",
        "if step < self.config.freeze_last_layer_epochs",
        "if step <= self.config.freeze_last_layer_epochs",
        DINO,
    ),
    Mistake(
        "the student is evaluated and exported",
        "objectives/dino.py",
        "return self.teacher.encoder",
        "return self.student.encoder",
        DINO,
    ),
    Mistake("KoLeo draws features together", "model/heads.py", "return -(distance", "return (distance", MAE),
    Mistake("KoLeo's nearest feature is the feature itself", "model/heads.py", ".fill_(-2)", ".fill_(2)", MAE),
    Mistake(
        "MAE normalises patches by their biased variance",
        "objectives/mae.py",
        "torch.var_mean(patches, dim=-1, keepdim=True)",
        "torch.var_mean(patches, dim=-1, keepdim=True, correction=0)",
        MAE,
    ),
    Mistake(
        "MAE's targets have the order of channels of a convolution",
        "objectives/mae.py",
        "patchify(images, self.patch_size, channels_last=True)",
        "patchify(images, self.patch_size)",
        MAE,
    ),
    Mistake(
        "MAE's decoder sees hidden patches at the places of others",
        "objectives/mae.py",
        "patches[torch.cat([keep, hide], dim=1)]",
        "patches[torch.cat([keep, hide.flip(1)], dim=1)]",
        MAE,
    ),
    Mistake(
        "hidden and visible patches are swapped",
        "model/masks.py",
        "return order[:, :kept], order[:, kept:]",
        "return order[:, kept:], order[:, :kept]",
        "tests/model/test_masks.py",
    ),
    Mistake(
        "the number of visible patches is rounded",
        "model/masks.py",
        "int(num_patches * (1 - mask_ratio))",
        "round(num_patches * (1 - mask_ratio))",
        "tests/model/test_masks.py",
    ),
    Mistake(
        "rows come before columns in the sine-cosine positions",
        "model/encoder.py",
        "[column.sin(), column.cos(), row.sin(), row.cos()]",
        "[row.sin(), row.cos(), column.sin(), column.cos()]",
        MAE,
    ),
]

OPTIMIZER = [
    Mistake(
        "one-dimensional parameters are decayed",
        "optim.py",
        "parameter.ndim == 1 or name.endswith",
        "name.endswith",
        "tests/test_optim.py",
    ),
    Mistake(
        "biases are decayed by the schedule",
        "optim.py",
        'if group["decayed"]:',
        "if True:",
        MAE,
    ),
    Mistake(
        "the teacher of a distillation is in training mode",
        "checkpoints/named.py",
        "Named(encoder.eval(),",
        "Named(encoder.train(),",
        DISTILL + "test_the_student_and_its_projections_learn_and_the_teacher_stays",
    ),
    Mistake(
        "the projections of a distillation do not learn",
        "objectives/distill.py",
        "            nn.init.zeros_(layer.bias)\n",
        "            layer.requires_grad_(False)\n",
        DISTILL + "test_the_student_and_its_projections_learn_and_the_teacher_stays",
    ),
    Mistake(
        "a distillation does not centre its teacher's features",
        "objectives/distill.py",
        "centred = theirs - mean",
        "centred = theirs",
        DISTILL + "test_the_loss_is_the_share_of_the_teachers_variance_that_the_student_does_not_explain",
    ),
    Mistake(
        "a run goes on with another teacher",
        "objectives/distill.py",
        'if not torch.equal(state_dict["teacher_sha256"].cpu(), self.teacher_sha256.cpu()):',
        "if False:",
        DISTILL + "test_a_run_goes_on_bit_for_bit_with_its_teacher_only_and_its_student_is_exported",
    ),
    Mistake("AdamW takes MAE's betas for DINO", "objectives/keys/dino.py", "(0.9, 0.999)", "(0.9, 0.95)", DINO),
    Mistake(
        "each tensor is clipped by itself where all should be",
        "optim.py",
        'config.clip_mode == "tensor"',
        "True",
        MAE,
    ),
    Mistake(
        "all tensors are clipped together where each should be",
        "optim.py",
        'config.clip_mode == "tensor"',
        "False",
        DINO,
    ),
    Mistake(
        "the learning rate does not scale with the batch",
        "schedule.py",
        "self.config.base_lr * self.global_batch_size / REFERENCE_BATCH",
        "self.config.base_lr",
        MAE,
    ),
    Mistake(
        "the warm-up is one step ahead",
        "schedule.py",
        "peak * step / max",
        "peak * (step + 1) / max",
        MAE,
    ),
    Mistake(
        "weight decay falls instead of rising",
        "schedule.py",
        "cosine(start, end, step / self.total_steps)",
        "cosine(end, start, step / self.total_steps)",
        MAE,
    ),
]

CHECKPOINTS = [
    Mistake(
        "AdamW's moments are not restored",
        "checkpoints/state.py",
        "    load_optimizer_tensors(objective, optimizer, moments)\n",
        "",
        "tests/checkpoints/test_state.py",
    ),
    Mistake(
        "the oldest checkpoint is restored",
        "checkpoints/state.py",
        "for step in reversed(steps_saved(run_dir)):",
        "for step in steps_saved(run_dir):",
        "tests/checkpoints/test_state.py",
    ),
    Mistake(
        "one checkpoint too few is kept",
        "checkpoints/state.py",
        "-max(1, keep_last)",
        "-max(1, keep_last - 1)",
        "tests/checkpoints/test_state.py",
    ),
    Mistake(
        "the best checkpoint is deleted",
        "checkpoints/saving.py",
        "best if config.keep_best else None",
        "None",
        "tests/checkpoints/test_saving.py",
    ),
    Mistake(
        "the worst checkpoint counts as the best",
        "pretraining.py",
        "top1 > (run.best_knn or 0.0)",
        "top1 < (run.best_knn or 100.0)",
        "tests/checkpoints/test_saving.py",
    ),
    Mistake(
        "checkpoints lack DINO's center",
        "objectives/dino.py",
        'self.register_buffer("center", torch.zeros(1, config.prototypes))',
        'self.register_buffer("center", torch.zeros(1, config.prototypes), persistent=False)',
        DINO,
    ),
]

TRAINING = LOOP + CROPS + AUGMENTATION + LOADER + OBJECTIVES + OPTIMIZER + CHECKPOINTS

# Not on the list, as no number can tell them apart:
# - the teacher's forward pass without no_grad: its parameters never require gradients, so it costs memory only;
# - `objective.train()` before the loop removed: modules begin in training mode, and evaluations restore it.
