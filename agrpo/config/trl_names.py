"""TRL's keys: those of GRPOConfig, SFTConfig, RewardConfig, DPOConfig and of their scripts' arguments.

A key is one of five: it has a name of its own here (`NAMES`), decides another together with others or in other words
(`COMPOSED`, in trl.py), asks for what agrpo does anyway (`ANYWAY`), is refused with what to do instead (`INSTEAD`), or
has no counterpart (`OTHERS`). Of TRL 1.16, and keys of earlier releases that recipes still use.
"""

from __future__ import annotations

from typing import Any

_EVERYWHERE = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_path": "model.chat_template",
    "dataset_name": "data.source",
    "dataset_config": "data.parameters.name",
    "dataset_train_split": "data.split",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.gradient_clipping",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "save_total_limit": "checkpoint.keep",
    "run_name": "run.name",
}
_SAMPLING = ("num_generations", "max_prompt_length", "max_completion_length", "temperature", "top_p")
# stage: TRL's name → ours
NAMES: dict[str, dict[str, str]] = {
    "agrpo": {
        **_EVERYWHERE,
        **{key: f"sampling.{key}" for key in _SAMPLING},
        "eval_on_start": "evaluation.test_before",
        "beta": "objective.beta",
        "num_iterations": "objective.updates_per_rollout",
        "delta": "objective.dual_clip",
        "entropy_coef": "objective.entropy_coef",
        "entropy_target": "controllers.entropy.target",
        "importance_sampling_level": "objective.ratio",
        "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
        "vllm_max_model_length": "rollout.vllm.max_model_len",
        "vllm_max_model_len": "rollout.vllm.max_model_len",
        "vllm_importance_sampling_clip_max": "objective.sampler_cap",
        "vllm_importance_sampling_cap": "objective.sampler_cap",
        "num_completions_to_print": "logging.samples_per_step",
    },
    "sft": {
        **_EVERYWHERE,
        "eval_on_start": "evaluation.test_before",
        "max_length": "max_length",
        "dataset_text_field": "data.columns.text",
    },
    "reward": {
        **_EVERYWHERE,
        "max_length": "max_length",
        "center_rewards_coefficient": "centring",
        "beta": "objective.alpha",
        "label_smoothing": "objective.label_smoothing",
    },
}
REWARDS = {
    "accuracy_reward": "reward_models.rules.accuracy",
    "think_format_reward": "reward_models.rules.format",
}
# TRL's name → (the values that ask for what agrpo does, or None for any; what it does)
ANYWAY: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "attn_implementation": (None, "attention is the engine's own"),
    "bnb_4bit_quant_type": (("nf4",), "four bits are nf4"),
    "bf16_full_eval": (None, "evaluation computes as training does"),
    "completion_only_loss": ((True, None), "only completions are learnt"),
    "dataset_num_proc": (None, "tokens are made in one process"),
    "ddp_timeout": (None, "DeepSpeed's own"),
    "disable_dropout": (None, "dropout is off"),
    "do_eval": (None, "evaluation.every says when"),
    "ds3_gather_for_generation": ((True,), "the sampler reads whole weights"),
    "gradient_checkpointing_kwargs": (None, "engine.activation_checkpointing decides"),
    "log_completions": (None, "samples.jsonl holds some of every step"),
    "log_level": (None, "the log is log.txt"),
    "logging_first_step": (None, "every step is logged"),
    "logging_steps": (None, "every step is logged"),
    "logging_strategy": (None, "every step is logged"),
    "lora_task_type": (("CAUSAL_LM",), "adapters are a language model's"),
    "mask_truncated_completions": ((False,), "a completion cut at its limit counts"),
    "optim": (("adamw_torch", "adamw_torch_fused"), "AdamW"),
    "packing": (None, "a micro-batch has no padding"),
    "padding_free": (None, "a micro-batch has no padding"),
    "pad_to_multiple_of": (None, "a micro-batch has no padding"),
    "per_device_eval_batch_size": (None, "training.micro_batch_tokens bounds a forward"),
    "precompute_ref_log_probs": (None, "the reference is read when it is needed"),
    "push_to_hub": ((False,), "the model stays here"),
    "remove_unused_columns": (None, "every column reaches the rewards"),
    "report_to": (("none", "tensorboard", ["none"], ["tensorboard"], []), "metrics.jsonl and tensorboard/"),
    "save_strategy": (("steps",), "checkpoint.every counts steps"),
    "eval_strategy": (("steps",), "evaluation.every counts steps"),
    "shuffle_dataset": ((True,), "every epoch is a permutation"),
    "sync_ref_model": ((False,), "the reference stays"),
    "tf32": (None, "PyTorch's own setting"),
    "top_entropy_quantile": ((1.0, 1), "every token counts"),
    "use_cache": (None, "the cache is the sampler's"),
    "use_liger_kernel": (None, "the head runs in chunks"),
    "vllm_device": (None, "vLLM shares the rank's device"),
    "vllm_enable_sleep_mode": ((True,), "vLLM sleeps while the engine trains"),
    "vllm_mode": (("colocate",), "vLLM runs in the same process"),
    "vllm_tensor_parallel_size": ((1,), "a vLLM has one device"),
}
# TRL's name → what to do instead
INSTEAD = {
    "assistant_only_loss": "the last assistant turn is learnt, and nothing else",
    "dataset_test_split": "set evaluation.test, a data section",
    "deepspeed": "set engine.zero_stage and engine.offload",
    "fp16": "use bf16: true",
    "fsdp": "set engine.zero_stage: 3",
    "hub_model_id": "upload the model's folder once it is there",
    "load_in_8bit": "use lora, or bfloat16",
    "load_in_4bit": "set use_peft: true beside it: four bits are for weights under adapters",
    "lr_scheduler_kwargs": "set training.min_lr_ratio",
    "num_train_epochs": "set max_steps: rows × epochs / prompts (or rows) of a step",
    "push_to_hub": "upload the model's folder once it is there",
    "resume_from_checkpoint": "a run resumes from its newest checkpoint; checkpoint.resume: false starts over",
    "sync_ref_model": "the reference stays: leave it out",
    "vllm_mode": "only colocate is known under this name",
    "vllm_importance_sampling_clip_min": "set vllm_importance_sampling_mode: token_mask, whose lower end is 1/cap",
}
# TRL's other names: known, so that they are not taken for typing errors, and without a counterpart.
OTHERS = frozenset(
    """accelerator_config activation_offloading adam_epsilon auto_find_batch_size average_tokens_across_devices
    batch_eval_metrics bnb_4bit_quant_storage cache_implementation cast_lm_head_to_fp32
    chat_template_kwargs data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_kwargs dataset_streaming ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph debug disable_tqdm discopop_tau do_predict do_train enable_jit_checkpoint entropy_coef_delta
    eos_token eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_packing
    eval_use_gather_object f_alpha_divergence_coef f_divergence_type fp16_full_eval fsdp_config full_determinism
    generation_kwargs greater_is_better hub_always_push hub_private_repo hub_revision hub_strategy hub_token
    ignore_bias_buffers ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
    label_smoothing_factor ld_alpha length_column_name liger_kernel_config load_best_model_at_end load_in_4bit
    local_rank log_completions_hub_repo log_level_replica log_multimodal log_on_each_node log_unique_prompts
    logging_nan_inf_filter lora_modules_to_save lora_target_parameters loss_weights max_tool_calling_iterations
    metric_for_best_model model_init_kwargs neftune_noise_alpha num_generations_eval off_policy_mask_threshold
    optim_args optim_target_modules packing_strategy pad_token parallelism_config precompute_ref_batch_size
    prediction_loss_only project ref_model_mixup_alpha ref_model_sync_steps repetition_penalty
    restore_callback_states_from_checkpoint reward_model_revision router_aux_loss_coef sapo_temperature_neg
    sapo_temperature_pos save_on_each_node save_only_model skip_memory_metrics torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy transformers_continuous_batching_config truncation_mode use_bias_correction_kl
    use_bnb_nested_quant use_cpu use_dora use_rslora use_transformers_continuous_batching use_transformers_paged
    use_weighting vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_group_port vllm_model_impl
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex""".split()  # noqa: SIM905
)


LOSSES = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
SCALES = {"group": "group", True: "group", "batch": "batch", "none": "none", False: "none"}
MODES = {"token_truncate": "token", "sequence_truncate": "sequence", "token_mask": "mask"}
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
PREFERENCE_LOSSES = {"sigmoid": "logistic", "ipo": "ipo", "robust": "robust"}
LORA = {
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
}
# Names that decide another key together, or whose values are other words.
COMPOSED = """output_dir lr_scheduler_type warmup_steps adam_beta1 adam_beta2 bf16 dtype torch_dtype save_steps
    load_in_4bit save_strategy eval_steps eval_strategy use_peft lora_r lora_alpha lora_dropout lora_target_modules
    per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation epsilon
    epsilon_high top_k min_p loss_type scale_rewards multi_objective_aggregation use_vllm
    vllm_importance_sampling_correction vllm_importance_sampling_mode entropy_coef_min entropy_coef_max
    use_adaptive_entropy reward_funcs reward_weights reward_model_name_or_path""".split()  # noqa: SIM905
