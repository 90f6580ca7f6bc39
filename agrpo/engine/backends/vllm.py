"""vLLM in this process: a copy of the policy's weights that is brought up to date in place, and vLLM's own sampler.

vLLM is imported when the backend is made, and in this file alone.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from agrpo.config import RolloutConfig
from agrpo.engine import distributed
from agrpo.engine.attention import head_size
from agrpo.engine.backends.checking import require_policy
from agrpo.engine.backends.native import Sampling
from agrpo.engine.modules import Policy, causal_lm, whole_weights
from agrpo.types import InputError, Prompt, Rollout

if TYPE_CHECKING:
    from vllm import LLM

_NO_VERSION = -1
_LEAST_BATCHED_TOKENS = 2048  # vLLM's own default is this or more


class VllmBackend:
    """Samples by vLLM from a copy of the policy's weights.

    vLLM starts with made-up weights, so that the check of the first rollout sees every weight that did not arrive.

    On a GPU each completion has a random stream of its own, as with the native sampler. vLLM's CPU build has one stream
    for all: there the same call draws the same completions, but a completion depends on what else is in the call.

    Args:
        policy: what trains, or at ZeRO-3 the whole copy of it.
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        rollout: its section of the configuration.
        longest: tokens of the longest prompt and completion; None takes as many as the model has positions.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        rollout: RolloutConfig,
        longest: int | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.stop = policy, tokenizer, list(stop)
        self.weight_version = _NO_VERSION
        self._on_cpu = policy.head.device.type == "cpu"
        self._tied = bool(causal_lm(policy.lm).config.tie_word_embeddings)
        self._asleep, self._checked = False, False
        self._llm = _start(policy, tokenizer, rollout, longest, self._on_cpu)

    # Weights

    def follow(self, weight_version: int) -> None:
        """Wake, and take over the policy's weights if they are newer."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        if self.weight_version != weight_version:
            self._take_weights()
            self.weight_version = weight_version

    def rest(self) -> None:
        """On a GPU: weights to the host's memory, the KV cache given up."""
        if not self._on_cpu and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def shrink(self) -> bool:
        """vLLM has reserved its memory: there is nothing to give up."""
        return False

    @torch.no_grad()
    def _take_weights(self) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole_weights(self.policy)})
        self._llm.reset_prefix_cache()  # its keys and values are those of the old weights
        if self._on_cpu and self._tied:
            self._llm.apply_model(_repack_head)

    # Generation

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
    ) -> Rollout:
        """Sample counts[p] completions of each prompt; log-probabilities are those of the distribution drawn from.

        That is the one after top_k, top_p and min_p, where the native sampler's are those before them.
        """
        from vllm import SamplingParams, TokensPrompt

        asked = [(TokensPrompt(prompt_token_ids=list(p.ids)), p.slot, n) for p, n in zip(prompts, counts, strict=True)]
        asked = [one for one in asked if one[2] > 0]
        how = [
            SamplingParams(
                n=n,
                temperature=0.0 if sampling.greedy else sampling.temperature,
                top_k=0 if sampling.greedy else sampling.top_k,
                top_p=1.0 if sampling.greedy else sampling.top_p,
                min_p=0.0 if sampling.greedy else sampling.min_p,
                max_tokens=sampling.max_completion_length,
                seed=None if self._on_cpu or sampling.greedy else _seed(*key, slot) + first,  # sample i: + i, by vLLM
                stop_token_ids=self.stop,
                ignore_eos=True,  # `stop` has every token that ends a completion
                logprobs=0,
                stop=list(sampling.stop) or None,
                include_stop_str_in_output=True,
                detokenize=bool(sampling.stop),
            )
            for _, slot, n in asked
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(*key, first, *(slot for _, slot, _ in asked)))
            answers = self._llm.generate([prompt for prompt, _, _ in asked], how, use_tqdm=False) if asked else []
        outputs = [output for answer in answers for output in sorted(answer.outputs, key=lambda o: o.index)]
        tokens = [list(o.token_ids) for o in outputs]
        logp = [step[t].logprob for o in outputs for t, step in zip(o.token_ids, o.logprobs, strict=True)]
        rollout = Rollout(
            prompts=tuple(prompts),
            group=torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts, dtype=torch.long)),
            lengths=torch.tensor([len(t) for t in tokens], dtype=torch.long),
            tokens=torch.tensor([t for ids in tokens for t in ids], dtype=torch.long),
            logp=torch.tensor(logp, dtype=torch.float32),
            finished=torch.tensor([o.finish_reason == "stop" for o in outputs], dtype=torch.bool),
            texts=tuple(self.tokenizer.batch_decode(tokens, skip_special_tokens=True)),
            weight_version=self.weight_version,
        )
        if not self._checked and outputs:
            self.check(rollout, sampling)
            self._checked = True
        return rollout

    def check(self, rollout: Rollout, sampling: Sampling) -> float:
        """The mean distance to the training forward, nats a token (`require_policy`)."""
        return require_policy(self.policy, rollout, sampling, "vllm")


def _start(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig, longest: int | None, on_cpu: bool
) -> LLM:
    settings = rollout.vllm
    _set_environment(rollout)
    from vllm import LLM

    base = causal_lm(policy.lm)
    config = copy.deepcopy(base.config)
    if on_cpu:
        require_attention(config, rollout)
    config.architectures = [type(base).__name__]
    length = settings.max_model_len or longest
    positions = getattr(config, "max_position_embeddings", None)
    if length is not None and positions is not None:
        length = min(length, positions)
    options: dict[str, Any] = {}
    if on_cpu:
        options["block_size"] = 32  # measured much faster than its default there
    else:
        options |= {"gpu_memory_utilization": settings.gpu_memory_utilization, "enable_sleep_mode": True}
    if rollout.max_sequences > _LEAST_BATCHED_TOKENS:
        options["max_num_batched_tokens"] = rollout.max_sequences  # a decoding step has a token of each
    if distributed.world() > 1:
        options["distributed_executor_backend"] = "external_launcher"  # one vLLM in each process of this job
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # it decodes what it samples, to find the strings that end a completion
        set_num_threads = torch.set_num_threads  # its CPU build puts a function that does nothing in the place
        try:
            llm = LLM(
                folder,
                load_format="dummy",
                generation_config="vllm",  # its defaults: what is sampled, and how, each call says
                dtype=str(policy.head.dtype).removeprefix("torch."),
                max_model_len=length,
                max_num_seqs=rollout.max_sequences,
                enforce_eager=on_cpu if settings.enforce_eager is None else settings.enforce_eager,
                logprobs_mode="processed_logprobs",
                **options,
            )
        finally:
            torch.set_num_threads = set_num_threads
    # At its end, and at the process's, it would take the process groups of the whole job down with it.
    llm.llm_engine.engine_core._finalizer.detach()
    gc.unfreeze()  # it froze all objects there are, and would have undone that at its end
    return llm


def _set_environment(rollout: RolloutConfig) -> None:
    """What vLLM reads when it is imported, unless a person has set it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(rollout.vllm.kv_cache_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def require_attention(config: PretrainedConfig, rollout: RolloutConfig) -> None:
    """Refuse a model whose heads vLLM's CPU build has no attention for; its weights are not asked for."""
    _set_environment(rollout)
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = head_size(config)
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise InputError(
            f"rollout.backend: vllm on a CPU has no attention for heads of {size}"
            f" (it has {', '.join(map(str, known))}): use rollout.backend=native;{_other_heads(config, known)}"
        )


def _other_heads(config: PretrainedConfig, known: Sequence[int]) -> str:
    """How to make a model of this width with heads that are known, for those who train their own."""
    width = config.hidden_size
    size = next((size for size in known if width % size == 0), None)
    if size is None or head_size(config) * config.num_attention_heads != width:
        return " or a model with heads of another size"
    heads = width // size
    return (
        f" or train the model with other heads from stage 1 on, there with"
        f" model.config.num_attention_heads={heads} model.config.num_key_value_heads={heads} (heads of {size})"
    )


def _repack_head(model: Any) -> None:
    """vLLM's CPU build keeps a packed copy of a tied head, which reloading weights leaves as it was."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def _seed(*parts: int) -> int:
    """Below 2⁶², so that a sample's number can be added."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 2)
