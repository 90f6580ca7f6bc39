"""Stage 2: a reward model from preference groups, or the policy itself tuned on them."""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from agrpo.config import RewardConfig, parse_command_line
from agrpo.data.load import encode_groups, read_preference_groups, require_batch
from agrpo.data.records import leak_notes
from agrpo.data.streams import Stream
from agrpo.doctor.estimate import before_loading
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.modules import Policy, Scorer
from agrpo.evaluation.preferences import evaluate_scores
from agrpo.models import (
    load_language_model,
    load_tokenizer,
    make_trainable,
    save_language_model,
    save_reward_model,
    stop_ids,
)
from agrpo.training.batches import Sequences
from agrpo.training.controllers import lambda_controller, out_of_reach
from agrpo.training.preference import fit_preferences, margin_scale, score_groups
from agrpo.training.schedule import learning_rate
from agrpo.training.session import Session, readable_errors


def main(config: RewardConfig) -> None:
    session = Session(config, "reward")
    session.notes(before_loading(config))
    log, training, evaluation = session.log, config.training, config.evaluation
    data = read_preference_groups(config.data, log.note)

    tokenizer, notes = load_tokenizer(config.model)
    session.notes(notes)
    groups, prompts, completions = encode_groups(data, tokenizer, config.max_length, log.note)
    require_batch(len(prompts), training.batch_size, "preference groups", "training.batch_size")
    scale = margin_scale(groups)
    lm = load_language_model(config.model, tokenizer, config.seed)
    torch.manual_seed(config.seed)
    policy = Policy(make_trainable(lm, config.model, config.seed))
    engine = HybridEngine(
        Scorer(policy, config.heads) if config.kind == "head" else policy,
        engine=config.engine,
        training=training,
        tokenizer=tokenizer,
        stop=stop_ids(tokenizer, lm),
        dtype=config.model.dtype,
        with_reference=config.kind == "implicit",
    )
    session.describe(policy)

    held_out = {}
    for name, source in (("validation", evaluation.data), ("test", evaluation.test)):
        if source is not None:
            found = read_preference_groups(source, log.note)
            session.notes(leak_notes(name, data, found))
            rows, *tokens = encode_groups(found, tokenizer, config.max_length, log.note)
            held_out[name] = (rows, Sequences.of(*tokens))

    stream = Stream(len(prompts), training.batch_size, config.seed, distributed.rank(), distributed.world())
    lambda_ = lambda_controller(config.lambda_)
    session.restore(engine, stream=stream, lambda_=lambda_)
    save_model = partial(save, engine, config, tokenizer)
    session.push_saves(save_model)
    for step in session.steps():
        began = time.perf_counter()
        rows = [index for _, index in next(stream)]
        batch = Sequences.of([prompts[i] for i in rows], [completions[i] for i in rows])
        rate = learning_rate(step, training)
        ranked = [groups[i] for i in rows]
        with session.guard(step, ranked):
            how = {"lambda_": lambda_.value, "margin_scale": scale, "learning_rate": rate}
            update = partial(fit_preferences, engine, batch, ranked, **how)
            metrics = session.in_micro_batches(lambda own, update=update: update(own))
        seconds = time.perf_counter() - began
        metrics |= {"learning_rate": rate, "time/step_s": seconds, "agrpo/lambda": lambda_.value}
        metrics["throughput/completion_tokens_per_s"] = metrics["num_tokens"] / seconds
        lambda_.observe(metrics["agrpo/uncertainty"])
        if step == session.first_step and config.lambda_.kind == "adaptive":
            session.notes(filter(None, [out_of_reach(config.lambda_.target, metrics)]))
        if session.evaluation_due(step):
            rows, batch = held_out["validation"]
            scores = score_groups(engine, batch, config)
            metrics["evaluation/pairwise_accuracy"] = evaluate_scores(scores, rows).accuracy
        log.step(step, metrics)

    results = {}
    if held_out:
        rows, batch = held_out.get("test") or held_out["validation"]
        measured = evaluate_scores(score_groups(engine, batch, config), rows)
        results = measured.summary()
        log.note(measured.in_words())
    engine.gather()
    session.finish(results, save_model)


def save(engine: HybridEngine, config: RewardConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A sequence-classification model, or with `kind: implicit` the policy itself."""
    if config.kind == "head":
        save_reward_model(engine.whole_policy.lm, engine.whole_module.score.weight, tokenizer, folder)
    else:
        save_language_model(engine.whole_policy.lm, tokenizer, folder)


if __name__ == "__main__":
    with readable_errors():
        main(parse_command_line("reward", sys.argv[1:]))
